"""User-mode Linux: a real driver behind a front-end that knows nothing of network devices (virtio_uml)."""

from __future__ import annotations

import base64
import itertools
import subprocess
import time
from pathlib import Path

from interop import image, requirements
from interop.host import Result, Station
from interop.process import Child, wait_until

BOOT_SECONDS = 60  # 1 s on an idle machine
_numbers = itertools.count(1)


class UmlGuest(Station):
    """A Linux in a process, with one vhost-user device, commanded over its console.

    Parameters
    ----------
    sock : Path
        The back-end's socket.
    scratch : Path
        Folder for its logs.
    device_id : int
        What the back-end is: a network device, or another.
    """

    def __init__(self, sock: Path, scratch: Path, device_id: int = 1) -> None:
        found = requirements.find_uml()
        assert found
        program, modules = found
        self.name = f"uml{next(_numbers)}"
        self.scratch = "/tmp"
        self.interface = "eth0"
        self._requests = itertools.count(1)
        folder = scratch / self.name
        folder.mkdir()
        words = [
            *("mem=128M", f"initrd={image.build(modules, image.UML_MODULES)}", "rdinit=/init", f"uml_dir={folder}"),
            *("con0=fd:0,fd:1", "con=null", "ssl=null", "quiet", "loglevel=4", "net.ifnames=0"),
            *("vq_port=/dev/console", f"virtio_uml.device={sock}:{device_id}"),
        ]
        library = folder / "uml_ptrace.so"
        source = Path(__file__).with_name("uml_ptrace.c")
        subprocess.run(["gcc", "-O2", "-Wall", "-Werror", "-shared", "-fPIC", "-o", library, source], check=True)
        self.child = Child(self.name, ["env", f"LD_PRELOAD={library}", str(program), *words], scratch)

    def wait_booted(self) -> None:
        """Wait until it obeys commands."""
        wait_until(f"{self.name} boots", lambda: "\nready " in self.child.output(), BOOT_SECONDS, [self.child])

    def run(self, command: str, timeout: float = 60) -> Result:
        number = next(self._requests)
        self.child.write(f"{number} {timeout:.0f} {base64.b64encode(command.encode()).decode()}\n")
        deadline = time.monotonic() + timeout + 20
        while True:
            *lines, _ = self.child.output().split("\n")
            for line in lines:
                words = [*line.strip().split(" "), ""]
                if words[0] == str(number):
                    return Result(int(words[1]), base64.b64decode(words[2]).decode(errors="replace"))
            assert self.child.running and time.monotonic() < deadline, (
                f"{self.name} does not answer\n{self.child.story()}"
            )
            time.sleep(0.02)

    def kill(self) -> None:
        """End it."""
        self.child.kill()
