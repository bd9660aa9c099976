"""A child process that is stopped after each of its instructions, so that a test sees every store it makes."""

from __future__ import annotations

import ctypes
import os
import signal
from collections.abc import Callable, Iterator

PTRACE_TRACEME, PTRACE_SINGLESTEP = 0, 9
_libc = ctypes.CDLL(None, use_errno=True)
_libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p]


def _ptrace(request: int, pid: int) -> None:
    if _libc.ptrace(request, pid, None, None) != 0:
        raise OSError(ctypes.get_errno(), "ptrace: a process must be allowed to trace its child")


def forked(act: Callable[[], None]) -> int:
    """Do something in a child process, which never returns here; its id."""
    pid = os.fork()
    if pid:
        return pid
    try:
        act()
        os._exit(0)
    finally:
        os._exit(70)


def states(act: Callable[[], None], look: Callable[[], bytes]) -> Iterator[bytes]:
    """What `look` sees before `act` runs in a child, and after each of its instructions that has changed it.

    The child ends by SIGKILL when `act` returns, so nothing that follows is seen.
    """

    def traced() -> None:
        _ptrace(PTRACE_TRACEME, 0)
        os.kill(os.getpid(), signal.SIGSTOP)
        act()
        os.kill(os.getpid(), signal.SIGSTOP)

    pid = forked(traced)
    try:
        _, status = os.waitpid(pid, 0)
        assert os.WIFSTOPPED(status), f"the child has ended: {status:#x}"
        before = look()
        yield before
        while True:
            _ptrace(PTRACE_SINGLESTEP, pid)
            _, status = os.waitpid(pid, 0)
            assert os.WIFSTOPPED(status), f"the child has ended: {status:#x}"
            if os.WSTOPSIG(status) == signal.SIGSTOP:
                return
            assert os.WSTOPSIG(status) == signal.SIGTRAP, f"signal {os.WSTOPSIG(status)}"
            now = look()
            if now != before:
                yield now
                before = now
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
