"""QEMU guests: a Linux kernel over vhost-user, commanded over virtio-serial."""

from __future__ import annotations

import base64
import itertools
import os
import re
import socket
import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any, ClassVar, Self

from qemu.qmp.legacy import QEMUMonitorProtocol

from interop import image, requirements
from interop.host import Result, Station
from interop.process import Child, wait_until

BOOT_SECONDS = 90  # 3 s on an idle machine; two cores that also compile take their time
_numbers = itertools.count(1)


@cache
def _reconnect() -> str:
    """Give the option for a client that comes back; its finer unit is there from QEMU 9.2 on."""
    text = subprocess.run(["qemu-system-x86_64", "--version"], capture_output=True, text=True).stdout
    match = re.search(r"version (\d+)\.(\d+)", text)
    assert match, text
    return "reconnect-ms=100" if (int(match[1]), int(match[2])) >= (9, 2) else "reconnect=1"


def shared_words(sock: Path, *, server: bool = False) -> list[str]:
    """QEMU's options for memory that is shared with a back-end, and for the way to it."""
    role = "server=on" if server else _reconnect()
    words = ["-m", "192M", "-object", "memory-backend-memfd,id=m,size=192M,share=on", "-machine", "memory-backend=m"]
    return [*words, "-chardev", f"socket,id=c0,path={sock},{role}"]


class Guest(Station):
    """One guest with one vhost-user network device.

    Parameters
    ----------
    sock : Path
        The back-end's socket, at most 107 bytes long.
    scratch : Path
        Folder for this guest's sockets and logs.
    server : bool
        QEMU listens on ``sock``, instead of connecting to it.
    queues : int
        Queue pairs.
    properties : mapping, optional
        Properties of virtio-net-pci, such as ``mrg_rxbuf: "off"``.
    options : sequence of str, optional
        QEMU options that make memory and network device, as somebody else has written them; what is said of these above
        does not count then.
    cpus : int
        Virtual CPUs; as many as queue pairs, or Linux leaves the others unused.
    machine : str
        QEMU's machine, with its properties.
    kernel_words : str
        Added to the guest kernel's command line.
    more : sequence of str
        QEMU options that come before all devices, such as an IOMMU or ``-incoming``.
    """

    running: ClassVar[list[Guest]] = []  # for the report of a failure

    def __init__(
        self,
        sock: Path,
        scratch: Path,
        *,
        server: bool = False,
        queues: int = 1,
        properties: Mapping[str, str | int] | None = None,
        cpus: int = 1,
        options: Sequence[str] = (),
        machine: str = "q35",
        kernel_words: str = "",
        more: Sequence[str] = (),
    ) -> None:
        number = next(_numbers)
        self.name = f"guest{number}"
        self.scratch = "/tmp"
        self.interface = "eth0"
        self.mac = f"52:54:00:76:71:{number % 256:02x}"
        self._folder = scratch
        self._sock = sock
        self._agent_path = scratch / f"{self.name}.agent"
        self._qmp_path = scratch / f"{self.name}.qmp"
        self.console_path = scratch / f"{self.name}.console"
        self.migration_path = scratch / f"{self.name}.migration"  # where a guest comes in from another QEMU
        self._requests = itertools.count(1)
        self._agent: socket.socket | None = None
        self._received = b""
        self._qmp: QEMUMonitorProtocol | None = None
        device = {
            "netdev": "n0",
            "mac": self.mac,
            "romfile": "",
            "mq": "on" if queues > 1 else "off",
            "vectors": 2 * queues + 2,
            **(properties or {}),
        }
        net = list(options) or self._net(device, server, queues)
        self.child = Child(self.name, [*self._command(cpus, machine, kernel_words, more), *net], scratch)
        self.running.append(self)

    def _net(self, device: Mapping[str, Any], server: bool, queues: int) -> list[str]:
        """Memory that is shared with the back-end, and the network device."""
        words = [*shared_words(self._sock, server=server), "-netdev", f"vhost-user,id=n0,chardev=c0,queues={queues}"]
        return [*words, "-device", "virtio-net-pci," + ",".join(f"{key}={value}" for key, value in device.items())]

    def _command(self, cpus: int, machine: str, kernel_words: str, more: Sequence[str]) -> list[str]:
        found = requirements.find_kernel()
        assert found
        kernel, modules = found
        accel = os.environ.get("VQ_TEST_ACCEL", "tcg")
        options = {
            "-machine": machine,
            "-accel": accel,
            "-cpu": "host" if accel == "kvm" else "max",
            "-smp": cpus,
            "-kernel": kernel,
            "-initrd": image.build(modules),
            "-append": f"console=ttyS0 quiet loglevel=4 panic=0 random.trust_cpu=on net.ifnames=0 mitigations=off "
            f"{kernel_words}".rstrip(),
            "-serial": f"file:{self.console_path}",
            "-qmp": f"unix:{self._qmp_path},server=on,wait=off",
        }
        command = ["qemu-system-x86_64", "-nodefaults", "-no-user-config", "-display", "none"]
        command += [str(word) for pair in options.items() for word in pair]
        command += [*more, "-chardev", f"socket,id=agent,path={self._agent_path},server=on,wait=off"]
        return [*command, "-device", "virtio-serial-pci", "-device", "virtserialport,chardev=agent,name=vq"]

    # -- life ---------------------------------------------------------------------------------------------------------

    def wait_booted(self, timeout: float = BOOT_SECONDS) -> Self:
        """Wait until the guest obeys commands."""
        if self._agent is None:
            wait_until(f"{self.name}: QEMU's sockets", self._connect_agent, timeout, [self.child])
        deadline = time.monotonic() + timeout
        while not self._line(deadline).startswith("ready"):
            pass
        return self

    def _connect_agent(self) -> bool:
        agent = socket.socket(socket.AF_UNIX)
        try:
            agent.connect(str(self._agent_path))
        except OSError:  # QEMU has not bound it yet, or bound it and does not listen
            agent.close()
            return False
        self._agent = agent
        return True

    def inherit(self, source: Guest) -> None:
        """Stand in for a guest that is going to move here: its commands, its name in the network.

        The answer to a command that is under way at the source is lost.
        """
        if self._agent is None:
            wait_until(f"{self.name}: QEMU's sockets", self._connect_agent, BOOT_SECONDS, [self.child])
            wait_until(f"{self.name}: QMP", self._qmp_path.exists, BOOT_SECONDS, [self.child])
        self._requests = source._requests
        self.mac, self.interface = source.mac, source.interface
        for name in ("address", "address6"):
            if hasattr(source, name):
                setattr(self, name, getattr(source, name))

    def reboot(self) -> None:
        """Reboot as a user does it in the guest, and wait until it is back."""
        self.background("usleep 100000; reboot -f")
        self.wait_booted()

    def reset(self) -> None:
        """Press the reset button: the driver has no time to say goodbye."""
        self.qmp("system_reset")
        self.wait_booted()

    def qmp(self, command: str, **arguments: Any) -> Any:
        """Give QEMU a command over QMP."""
        if self._qmp is None:
            self._qmp = QEMUMonitorProtocol(str(self._qmp_path))
            self._qmp.connect()
        return self._qmp.cmd(command, **arguments)

    def kill(self) -> None:
        """Kill QEMU."""
        if self._qmp is not None:
            with suppress(EOFError, OSError):  # QEMU may have ended by itself
                self._qmp.close()
            self._qmp = None
        if self._agent is not None:
            self._agent.close()
            self._agent = None
        self.child.kill()
        if self in self.running:
            self.running.remove(self)

    close = kill

    # -- commands -----------------------------------------------------------------------------------------------------

    def run(self, command: str, timeout: float = 60) -> Result:
        assert self._agent, f"{self.name} has not booted"
        number = next(self._requests)
        text = base64.b64encode(command.encode()).decode()
        self._agent.settimeout(10)
        self._agent.sendall(f"{number} {timeout:.0f} {text}\n".encode())
        # The guest ends the command itself; beyond its limit the guest is at fault, not the command.
        deadline = time.monotonic() + timeout + 20
        while True:
            words = [*self._line(deadline).split(" "), ""]  # no output, no third word
            if words[0] == str(number):
                return Result(int(words[1]), base64.b64decode(words[2]).decode(errors="replace"))

    def _line(self, deadline: float) -> str:
        assert self._agent
        while b"\n" not in self._received:
            left = deadline - time.monotonic()
            if left <= 0 or not self.child.running:
                why = "does not answer" if left <= 0 else "ended"
                raise AssertionError(f"{self.name} {why}\n{self.child.story()}\n--- console\n{self.console()}")
            self._agent.settimeout(min(left, 0.5))
            try:
                data = self._agent.recv(65536)
            except TimeoutError:
                continue
            if not data:
                time.sleep(0.05)  # QEMU closed its end, so it is about to end; the check above says so
            self._received += data
        line, self._received = self._received.split(b"\n", 1)
        return line.decode(errors="replace").strip()

    def modprobe(self, name: str = "virtio_net") -> None:
        """Load a driver, and wait for its interface."""
        self.check(f"modprobe {name}")
        wait_until(f"eth0 of {self.name}", lambda: self.run("[ -e /sys/class/net/eth0 ]").code == 0, 10)

    def rmmod(self, name: str = "virtio_net") -> None:
        """Remove a driver."""
        self.check(f"rmmod {name}")

    def queue_packets(self) -> dict[str, list[int]]:
        """Read the driver's packet counters of each queue.

        Returns
        -------
        dict
            ``{"receiveq": [n, ...], "transmitq": [n, ...]}``.
        """
        found: dict[str, dict[int, int]] = {"rx": {}, "tx": {}}
        # Linux 6.1 says rx_queue_0_packets, later ones rx0_packets.
        pattern = r"([rt]x)(?:_queue_)?_?(\d+)_packets: (\d+)"
        for kind, number, count in re.findall(pattern, self.check("ethtool -S eth0")):
            found[kind][int(number)] = int(count)
        names = {"receiveq": found["rx"], "transmitq": found["tx"]}
        return {name: [counts[i] for i in sorted(counts)] for name, counts in names.items()}

    def console(self) -> str:
        """Give the end of the guest's console."""
        return self.console_path.read_text(errors="replace")[-3000:] if self.console_path.exists() else ""


class DiskGuest(Guest):
    """One guest with one vhost-user block device, ``/dev/vda``; QEMU connects to the back-end.

    Parameters
    ----------
    sock, scratch, more
        As for `Guest`.
    queues : int
        Request queues.
    properties : mapping, optional
        Properties of vhost-user-blk-pci, such as ``packed: "on"``.
    """

    def __init__(
        self,
        sock: Path,
        scratch: Path,
        *,
        queues: int = 1,
        properties: Mapping[str, str | int] | None = None,
        **more: Any,
    ) -> None:
        device = {"chardev": "c0", "num-queues": queues, "bootindex": 1, **(properties or {})}
        words = ["-device", "vhost-user-blk-pci," + ",".join(f"{key}={value}" for key, value in device.items())]
        super().__init__(sock, scratch, options=[*shared_words(sock), *words], **more)
