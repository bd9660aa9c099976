"""A program that is measured: started in a session of its own, its output in a file, and surely ended."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from vq.errors import ResourceError

__all__ = ["Child", "complaints", "halted"]

END_S: Final = 5.0  # for an orderly end
TAIL: Final = 800  # characters of output that an error shows
ESCAPES: Final = re.compile(r"\x1b\[[0-9;?]*[a-zA-Z]")
# The lack of larger pages than are needed is noise of every start.
COMPLAINT: Final = re.compile(r"^(?!.*hugepages reported).*\b(?:error|failed|failure|invalid|cannot|no probed)\b", re.I)


def complaints(output: str) -> str:
    """What a program's output says about its trouble: lines that complain, else its end; no control sequences."""
    lines = [" ".join(line.split()) for line in ESCAPES.sub("\n", output).splitlines()]
    bad = [line for line in lines if COMPLAINT.search(line)]
    return "; ".join(dict.fromkeys(bad))[:TAIL] or " ".join(line for line in lines if line)[-TAIL:]


class Child:
    """One program.

    Parameters
    ----------
    name
        For messages, and for the file of its output.
    command
        Program and arguments.
    folder
        Where the output goes.

    Raises
    ------
    ResourceError
        It cannot be started.
    """

    def __init__(self, name: str, command: Sequence[str], folder: Path) -> None:
        self.name = name
        self._log = folder / f"{name}.log"
        # Ends with us whatever happens to us; testpmd would poll on with a core and its hugepages.
        guard = ["setpriv", "--pdeathsig", "KILL", "--"] if shutil.which("setpriv") else []
        try:
            with self._log.open("wb") as log:
                # A standard input that stays open: testpmd stops at its end.
                self._process = subprocess.Popen(
                    [*guard, *command],
                    stdin=subprocess.PIPE,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
        except OSError as error:
            raise ResourceError(f"{name} cannot be started", errno=error.errno or 0, path=command[0]) from error

    def output(self) -> str:
        """All that it has printed so far."""
        return self._log.read_text(errors="replace")

    def check(self) -> None:
        """Refuse to wait for a program that has ended.

        Raises
        ------
        ResourceError
            It has; with the end of its output.
        """
        code = self._process.poll()
        if code is not None:
            raise self.failure(f"ended early with code {code}")

    def failure(self, what: str) -> ResourceError:
        """An error that shows the end of the output."""
        return ResourceError(f"{self.name} {what}: {complaints(self.output()) or 'it printed nothing'}")

    def end(self) -> None:
        """Interrupt it, and kill it if that does not help; may be called twice."""
        if self._process.poll() is None:
            self._signal(signal.SIGINT)
            try:
                self._process.wait(END_S)
            except subprocess.TimeoutExpired:
                self._signal(signal.SIGKILL)
                self._process.wait()
        if self._process.stdin is not None:
            self._process.stdin.close()

    @contextmanager
    def halted(self) -> Iterator[None]:
        """Stop it for the time of the block, and let it go on from there."""
        self._signal(signal.SIGSTOP)
        try:
            yield
        finally:
            self._signal(signal.SIGCONT)

    def _signal(self, number: int) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, problem: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.end()


@contextmanager
def halted(children: Sequence[Child]) -> Iterator[None]:
    """Stop several programs for the time of the block: their processors are free meanwhile."""
    with ExitStack() as stack:
        for child in children:
            stack.enter_context(child.halted())
        yield
