"""DPDK's testpmd, driven over its prompt: front-end with virtio-user, and stand-in for our back-end."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from interop.process import Child, wait_until

PROMPT = "testpmd> "


class PortStatistics(NamedTuple):
    """Packets of one testpmd port, in testpmd's words: received from and transmitted to its device."""

    received: int
    transmitted: int
    transmit_errors: int


class Testpmd:
    """One testpmd at its prompt.

    Parameters
    ----------
    name : str
    vdevs : sequence of str
        Virtual devices, one port each.
    scratch : Path
    core : int
        CPU that runs it.
    options : sequence of str
        Further options of testpmd itself (after ``--``).
    memory_mib : int
        Hugepages it takes.
    netns : str, optional
        Network namespace it runs in.
    """

    __test__ = False  # pytest takes every class by the name of Test* for a test

    def __init__(
        self,
        name: str,
        vdevs: Sequence[str],
        scratch: Path,
        *,
        core: int,
        options: Sequence[str] = (),
        memory_mib: int = 256,
        netns: str | None = None,
    ) -> None:
        self.name = name
        command = ["stdbuf", "-oL", "dpdk-testpmd", "--lcores", f"0@{core},1@{core}", "--main-lcore", "0", "--no-pci"]
        # In memory: hugepage files would outlive a killed process, and keep their pages. One file, since virtio-user
        # has to hand its memory over as few file descriptors.
        command += ["-m", str(memory_mib), "--single-file-segments", "--in-memory"]
        for vdev in vdevs:
            command += ["--vdev", vdev]
        # The default pool of mbufs is for real cards; these ports hold a few rings of 256.
        command += ["--", "-i", "--no-flush-rx", "--total-num-mbufs=8192", *options]
        self.child = Child(name, command, scratch, netns=netns)
        self._seen = 0

    def wait_prompt(self, timeout: float = 60) -> str:
        """Wait for the prompt; gives what was printed since the last one."""
        wait_until(f"{self.name}: prompt", lambda: PROMPT in self.child.output()[self._seen :], timeout, [self.child])
        text = self.child.output()
        begin, self._seen = self._seen, text.index(PROMPT, self._seen) + len(PROMPT)
        return text[begin : self._seen]

    def command(self, line: str) -> str:
        """Give one command; gives what it printed."""
        self.child.write(line + "\n")
        return self.wait_prompt()

    def statistics(self) -> list[PortStatistics]:
        """Read the counters of every port."""
        text = self.command("show port stats all")
        pattern = r"RX-packets:\s+(\d+).*?TX-packets:\s+(\d+)\s+TX-errors:\s+(\d+)"
        return [PortStatistics(*map(int, found)) for found in re.findall(pattern, text, re.DOTALL)]

    def streams(self) -> dict[tuple[int, int], int]:
        """Read how many packets each (port, queue) received; stopped forwarding only.

        Testpmd prints a stream only if it has moved packets.
        """
        pattern = r"RX Port=\s*(\d+)/Queue=\s*(\d+).*?RX-packets:\s+(\d+)"
        text = self.command("show fwd stats all")
        return {(int(port), int(queue)): int(count) for port, queue, count in re.findall(pattern, text, re.DOTALL)}

    def quit(self, timeout: float = 60) -> int:
        """Leave in order (queues stopped, connection closed); gives the exit code."""
        self.child.write("quit\n")
        return self.child.wait(timeout)

    def kill(self) -> None:
        self.child.kill()
