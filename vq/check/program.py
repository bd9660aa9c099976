"""A back-end that we start ourselves, and again when a check has ended it."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
from collections.abc import Sequence
from typing import Final

from vq.errors import ResourceError, UsageError

__all__ = ["Program"]

END_S: Final = 5.0  # for an orderly end


class Program:
    """The program behind the socket.

    Parameters
    ----------
    command
        Program and arguments; it must listen on the socket by itself. Its standard input stays open, what it prints
        goes to standard error.

    Raises
    ------
    UsageError
        There are no words.
    """

    def __init__(self, command: str | Sequence[str]) -> None:
        self._command = shlex.split(command) if isinstance(command, str) else list(command)
        if not self._command:
            raise UsageError("the command that starts the back-end is empty")
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it; it must not run.

        Raises
        ------
        ResourceError
            It cannot be started.
        """
        try:
            # In a group of its own, so that a Ctrl-C for us does not look like a crash of it.
            self._process = subprocess.Popen(self._command, stdin=subprocess.PIPE, stdout=2, process_group=0)
        except OSError as problem:
            what = "the back-end cannot be started"
            raise ResourceError(what, errno=problem.errno or 0, path=self._command[0]) from problem

    def death(self) -> str:
        """How it ended, for people; empty while it runs."""
        code = self._process.poll() if self._process is not None else None
        if code is None:
            return ""
        return f"it ended by {signal.Signals(-code).name}" if code < 0 else f"it ended with exit code {code}"

    def end(self) -> None:
        """Ask it to end, and kill it if that does not help; may be called twice."""
        process, self._process = self._process, None
        if process is None:
            return
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGTERM)
            try:
                process.wait(END_S)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        if process.stdin is not None:
            process.stdin.close()
