"""One test's set-up: a scratch folder, and whatever was started in it."""

from __future__ import annotations

import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from interop import requirements
from interop.backend import BACKENDS, Backend
from interop.guest import DiskGuest, Guest
from interop.host import Host
from interop.process import Child, wait_until
from interop.testpmd import Testpmd
from interop.uml import UmlGuest

FACTS: list[tuple[str, str]] = []  # what tests measured, for the end of the run


class Rig:
    """Starts the parts of a test, and ends them all in the reverse order.

    Parameters
    ----------
    backend : str
        Name in ``BACKENDS``.
    title : str
        Names the test in the list of facts.
    """

    def __init__(self, backend: str, title: str) -> None:
        self.backend_class = BACKENDS[backend]
        self.title = title
        # Not pytest's own temporary folder: a Unix socket's path has at most 107 bytes.
        self.scratch = Path(tempfile.mkdtemp(prefix="vq", dir="/tmp"))
        self._ends: list[Callable[[], None]] = []
        if backend == "dpdk":
            requirements.need("dpdk")

    def sock(self, name: str = "a") -> Path:
        return self.scratch / f"{name}.sock"

    def host(self) -> Host:
        """Make a network namespace for the host's side of a TAP."""
        requirements.need("tap")
        host = Host(self.scratch)
        self._ends.append(host.close)
        return host

    def backend(self, *ports: str, host: Host | None = None, start: bool = True, **more: Any) -> Backend:
        """Make a back-end over PORT arguments, and start it."""
        backend = self.backend_class(ports, self.scratch, netns=host.netns if host else None, **more)
        self._ends.append(lambda: backend.kill() if hasattr(backend, "child") else None)
        return backend.start() if start else backend

    def guest(self, sock: Path, *, boot: bool = True, **more: Any) -> Guest:
        """Start a guest on a socket, and wait until it has booted."""
        requirements.need("guest")
        guest = Guest(sock, self.scratch, **more)
        self._ends.append(guest.close)
        return guest.wait_booted() if boot else guest

    def uml_guest(self, sock: Path, **more: Any) -> UmlGuest:
        """Start a user-mode Linux on a socket, and wait until it has booted."""
        requirements.need("uml")
        guest = UmlGuest(sock, self.scratch, **more)
        self._ends.append(guest.kill)
        guest.wait_booted()
        return guest

    def disk_guest(self, sock: Path, *, boot: bool = True, **more: Any) -> DiskGuest:
        """Start a guest with a disk, and wait until it has booted."""
        requirements.need("guest")
        guest = DiskGuest(sock, self.scratch, **more)
        self._ends.append(guest.close)
        return guest.wait_booted() if boot else guest

    def child(self, name: str, command: list[str]) -> Child:
        """Start any other program."""
        child = Child(name, command, self.scratch)
        self._ends.append(child.kill)
        return child

    def disk(self, path: Path, *words: str, name: str = "a") -> Child:
        """Start ``vq blk`` on a file, and wait until it listens on the socket of this name."""
        sock = self.sock(name)
        command = [sys.executable, "-m", "vq", "blk", "--socket-path", str(sock), "--blk-file", str(path)]
        child = self.child(f"blk-{name}", [*command, *words])
        wait_until("vq blk listens", lambda: sock.exists() or not child.running, 20, [child])
        return child

    def testpmd(self, name: str, *vdevs: str, **more: Any) -> Testpmd:
        """Start DPDK as front-end, and wait for its prompt."""
        requirements.need("dpdk")
        testpmd = Testpmd(name, vdevs, self.scratch, **more)
        self._ends.append(testpmd.kill)
        testpmd.wait_prompt()
        return testpmd

    def note(self, fact: str) -> None:
        """Keep a measured fact for the end of the run."""
        FACTS.append((self.title, fact))

    def __enter__(self) -> Rig:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End everything, the last one first."""
        try:
            while self._ends:
                self._ends.pop()()
        finally:
            shutil.rmtree(self.scratch, ignore_errors=True)
