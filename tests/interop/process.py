"""Child processes that never outlive their test, and what they printed."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

LIVE: list[Child] = []  # in the order of their start; the report of a failing test shows them all
TAIL_BYTES = 3000


class Child:
    """One program in a process group of its own, its output kept in files.

    Parameters
    ----------
    name : str
        Names the program in reports and its files in ``scratch``.
    command : sequence of str
    scratch : Path
        Folder for ``NAME.out`` and ``NAME.err``.
    netns : str, optional
        Network namespace to run it in.
    core : int, optional
        CPU to pin it to.
    """

    def __init__(
        self, name: str, command: Sequence[str], scratch: Path, *, netns: str | None = None, core: int | None = None
    ) -> None:
        # PDEATHSIG outlasts exec, so it is set first; each of these programs replaces itself by the next.
        prefix = ["setpriv", "--pdeathsig", "KILL", "--"]
        if netns:
            prefix += ["ip", "netns", "exec", netns]
        if core is not None:
            prefix += ["taskset", "-c", str(core)]
        self.name = name
        self.command = list(command)
        self.out_path = scratch / f"{name}.out"
        self.err_path = scratch / f"{name}.err"
        with self.out_path.open("wb") as out, self.err_path.open("wb") as err:
            self.process = subprocess.Popen(
                prefix + self.command, stdin=subprocess.PIPE, stdout=out, stderr=err, process_group=0
            )
        self.started = time.monotonic()
        LIVE.append(self)

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def running(self) -> bool:
        return self.process.poll() is None

    def write(self, text: str) -> None:
        """Write to the standard input."""
        assert self.process.stdin
        self.process.stdin.write(text.encode())
        self.process.stdin.flush()

    def output(self) -> str:
        return self.out_path.read_text(errors="replace")

    def errors(self) -> str:
        return self.err_path.read_text(errors="replace")

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to this program alone."""
        if self.running:
            os.kill(self.pid, number)

    def wait(self, timeout: float) -> int:
        """Wait for the end; gives the exit code."""
        return self.process.wait(timeout)

    def kill(self) -> None:
        """End the whole group at once, and collect it."""
        if self.running:
            os.killpg(self.pid, signal.SIGKILL)
            self.process.wait()
        if self.process.stdin and not self.process.stdin.closed:
            # The program may have ended with text of ours unread; nobody wants it any more.
            with suppress(BrokenPipeError):
                self.process.stdin.close()
        if self in LIVE:
            LIVE.remove(self)

    def report(self) -> list[tuple[str, str]]:
        """Give titled pieces of text for the report of a failure."""
        state = "running" if self.running else f"exit code {self.process.returncode}"
        return [
            (f"{self.name} ({state}): command", " ".join(self.command)),
            (f"{self.name}: stderr", self.errors()[-TAIL_BYTES:]),
            (f"{self.name}: stdout", self.output()[-TAIL_BYTES:]),
        ]

    def story(self) -> str:
        """Give the report as one text, for exceptions."""
        return "\n".join(f"--- {title}\n{text}" for title, text in self.report() if text)


def wait_until(what: str, condition: Callable[[], bool], timeout: float, children: Sequence[Child] = ()) -> float:
    """Wait until ``condition()`` is true; fail when a child ends before, or the time is over.

    Returns
    -------
    float
        Seconds waited.
    """
    begin = time.monotonic()
    while not condition():
        waited = time.monotonic() - begin
        ended = [child for child in children if not child.running]
        if ended or waited > timeout:
            why = f"{ended[0].name} ended" if ended else f"not within {timeout} s"
            raise AssertionError(f"{what}: {why}\n" + "\n".join(child.story() for child in ended or children))
        time.sleep(0.02)
    return time.monotonic() - begin
