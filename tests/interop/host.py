"""The host's side of a TAP: a network namespace of the test's own, with the same verbs as a guest."""

from __future__ import annotations

import itertools
import os
import subprocess
from pathlib import Path
from typing import NamedTuple

from interop.process import wait_until

_numbers = itertools.count(1)


class Result(NamedTuple):
    """What a shell command gave: exit code, and standard output with standard error."""

    code: int
    output: str


class CommandFailed(AssertionError):
    """A command that had to succeed did not."""


class Station:
    """Something with a network address that runs shell commands: the host's namespace, or a guest."""

    name: str
    scratch: str  # a folder on that side
    interface: str
    address: str
    address6: str

    def run(self, command: str, timeout: float = 60) -> Result:
        """Run a shell command to its end."""
        raise NotImplementedError

    def check(self, command: str, timeout: float = 60) -> str:
        """Run a shell command that has to succeed; gives its output."""
        code, output = self.run(command, timeout)
        if code:
            raise CommandFailed(f"{self.name}: exit code {code} from: {command}\n{output}")
        return output

    def background(self, command: str) -> None:
        """Start a shell command and do not wait for it."""
        self.check(f"setsid sh -c '{command}' >/dev/null 2>&1 &")

    def configure(self, number: int, interface: str | None = None) -> None:
        """Bring the interface up with 192.0.2.NUMBER and fd00::NUMBER."""
        self.interface = interface or self.interface
        self.address, self.address6 = f"192.0.2.{number}", f"fd00::{number}"
        self.check(
            f"ip addr flush dev {self.interface} && ip link set {self.interface} up"
            f" && ip addr add {self.address}/24 dev {self.interface}"
            # Without duplicate address detection the address can be used at once.
            f" && echo 0 > /proc/sys/net/ipv6/conf/{self.interface}/accept_dad"
            f" && ip addr add {self.address6}/64 dev {self.interface}"
        )

    def counters(self) -> dict[str, int]:
        """Read the interface's counters, by the kernel's names (rx is what this side received)."""
        names = ("rx_packets", "rx_bytes", "tx_packets", "tx_bytes")
        folder = f"/sys/class/net/{self.interface}/statistics"
        values = self.check(f"cd {folder} && cat {' '.join(names)}").split()
        return dict(zip(names, map(int, values), strict=True))


class Host(Station):
    """A network namespace, made by ``open`` and deleted by ``close``.

    Parameters
    ----------
    scratch : Path
        Folder for the data that is sent and received.
    """

    def __init__(self, scratch: Path) -> None:
        self.name = "host"
        self.netns = f"vqt{os.getpid()}n{next(_numbers)}"
        self.scratch = str(scratch)
        self.interface = "vq0"
        subprocess.run(["ip", "netns", "add", self.netns], check=True)
        self.check("ip link set lo up")

    def run(self, command: str, timeout: float = 60) -> Result:
        done = subprocess.run(
            ["ip", "netns", "exec", self.netns, "sh", "-c", command],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            timeout=timeout,
        )
        return Result(done.returncode, done.stdout)

    def configure(self, number: int, interface: str | None = None) -> None:
        """As every station; the address of the hardware stays the same when a new TAP takes the place of an old one.

        Otherwise a guest would send to the old one until its neighbour entry expires, unless it has seen the link go.
        """
        self.interface = interface or self.interface
        self.check(f"ip link set {self.interface} address 52:54:00:76:72:{number:02x}")
        super().configure(number)

    def await_interface(self, name: str, timeout: float = 60) -> None:
        """Wait until a TAP appears in this namespace."""
        wait_until(f"interface {name}", lambda: self.run(f"ip link show {name}").code == 0, timeout)

    def close(self) -> None:
        """End what still runs in the namespace, and delete it."""
        pids = subprocess.run(["ip", "netns", "pids", self.netns], capture_output=True, text=True).stdout.split()
        for pid in pids:
            subprocess.run(["kill", "-9", pid], stderr=subprocess.DEVNULL)
        subprocess.run(["ip", "netns", "delete", self.netns], check=True)
