"""A TCP stream between host and guest that runs while the test does other things; every byte of it is checked."""

from __future__ import annotations

import itertools
import signal
import sys
from pathlib import Path
from types import TracebackType

from interop.guest import Guest
from interop.host import Host
from interop.process import Child, wait_until
from interop.traffic import listening

CLIENT = Path(__file__).with_name("echo_client.py")
ARRIVE_SECONDS = 60  # for the guest to send something back, whatever else the machine does
_numbers = itertools.count(1)


class EchoStream:
    """The host sends numbered bytes as fast as the guest sends them back.

    Parameters
    ----------
    host, guest
        The guest may move, or go away for a while.
    """

    def __init__(self, host: Host, guest: Guest) -> None:
        number = next(_numbers)
        port = 7000 + number
        guest.background(f"busybox nc -l -p {port} -e cat")
        wait_until("the echo service", listening(guest, port), 20)
        command = [sys.executable, str(CLIENT), guest.address, str(port)]
        self.child = Child(f"echo{number}", command, Path(host.scratch), netns=host.netns)
        self.wait_progress()

    def _last(self) -> tuple[int, int]:
        lines = [line.split() for line in self.child.output().split("\n")[:-1]]
        return (int(lines[-1][0]), int(lines[-1][1])) if lines else (0, 0)

    @property
    def verified(self) -> int:
        """Bytes that came back as they were sent."""
        assert self.child.running, self.child.story()
        return self._last()[0]

    def take_gap(self) -> int:
        """Milliseconds of the longest silence since the last call."""
        gap = self._last()[1]
        self.child.write("\n")
        return gap

    def wait_progress(self, amount: int = 1 << 20) -> None:
        """Wait until so many more bytes have come back."""
        wanted = self.verified + amount
        wait_until(f"{amount} bytes come back", lambda: self.verified >= wanted, ARRIVE_SECONDS, [self.child])

    def finish(self) -> int:
        """Have it end: all that was sent must have come back. Gives the bytes."""
        self.child.signal(signal.SIGTERM)
        code = self.child.wait(ARRIVE_SECONDS)
        assert code == 0, self.child.story()
        return self._last()[0]

    def __enter__(self) -> EchoStream:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if kind is None:
            self.finish()
        self.child.kill()
