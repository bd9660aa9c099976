"""A program in the host's namespace: sends numbered data to an echo service, and checks each byte that comes back.

``python echo_client.py ADDRESS PORT`` prints ``VERIFIED GAP`` some times a second: bytes that came back as they were
sent, and the longest time in milliseconds that none came. On SIGTERM it sends no more, waits for the rest and ends with
0; at the first wrong byte it says where, and ends with 1. A line on its standard input starts GAP anew.
"""

from __future__ import annotations

import signal
import socket
import sys
import threading
import time

import numpy

WORDS = 8192  # of a block: 64 KiB
ODD = numpy.uint64(0x9E3779B97F4A7C15)
END_SECONDS = 30
INTERVAL = 0.05


def block(number: int) -> bytes:
    """A part of the stream; a word says its place, so that nothing can be lost, doubled or stale unseen."""
    words = numpy.arange(number * WORDS + 1, (number + 1) * WORDS + 1, dtype=numpy.uint64)
    return (words * ODD).tobytes()


class Echo:
    """A connection, what was sent on it and what came back."""

    def __init__(self, address: str, port: int) -> None:
        self.peer = socket.create_connection((address, port), END_SECONDS)
        self.peer.settimeout(None)
        self.sent = self.verified = 0
        self.gap = 0.0
        self.last = time.monotonic()
        self.ending = threading.Event()
        self.wrong = ""

    def send(self) -> None:
        """Send until the end is asked for; another thread reads."""
        number = 0
        while not self.ending.is_set() and not self.wrong:
            self.peer.sendall(block(number))
            number += 1
            self.sent = number * WORDS * 8
        self.peer.shutdown(socket.SHUT_WR)

    def check(self) -> None:
        """Compare what comes with what was sent."""
        number, wanted = 0, memoryview(block(0))
        while data := self.peer.recv(1 << 18):
            now = time.monotonic()
            self.gap, self.last = max(self.gap, now - self.last), now
            while data:
                piece = data[: len(wanted)]
                if piece != wanted[: len(piece)]:
                    differs = next(at for at, (a, b) in enumerate(zip(piece, wanted, strict=False)) if a != b)
                    self.wrong = f"byte {self.verified + differs} of the stream came back wrong"
                    self.peer.shutdown(socket.SHUT_RDWR)
                    return
                self.verified += len(piece)
                data, wanted = data[len(piece) :], wanted[len(piece) :]
                if not wanted:
                    number += 1
                    wanted = memoryview(block(number))

    def take_gap(self) -> None:
        """Start the longest gap anew with each line that comes in."""
        for _ in sys.stdin:
            self.gap = 0.0


def main() -> int:
    echo = Echo(sys.argv[1], int(sys.argv[2]))
    signal.signal(signal.SIGTERM, lambda *_: echo.ending.set())
    threading.Thread(target=echo.take_gap, daemon=True).start()
    threads = [threading.Thread(target=work, daemon=True) for work in (echo.send, echo.check)]
    for thread in threads:
        thread.start()
    while threads[1].is_alive():
        threads[1].join(INTERVAL)
        print(echo.verified, round(1000 * max(echo.gap, time.monotonic() - echo.last)), flush=True)
    threads[0].join(END_SECONDS)
    if not echo.wrong and echo.verified != echo.sent:
        echo.wrong = f"{echo.sent} bytes were sent, and {echo.verified} came back"
    print(echo.wrong, file=sys.stderr)
    return 1 if echo.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
