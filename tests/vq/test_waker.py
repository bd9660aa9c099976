"""Waking a loop that may be on its way out."""

from __future__ import annotations

import os
import select
import signal
import threading

import pytest

from vq.waker import Waker


def test_it_wakes_until_it_is_closed() -> None:
    with Waker() as waker:
        assert not select.select([waker], [], [], 0)[0]
        waker.wake()
        waker.wake()
        assert select.select([waker], [], [], 0)[0]
        assert os.eventfd_read(waker.fileno()) == 2
    assert waker.fileno() == -1
    waker.wake()
    waker.close()


def test_threads_that_wake_what_is_being_closed() -> None:
    """None of them writes to a descriptor that is closed, or is somebody else's by then."""
    problems: list[BaseException] = []

    def hammer(waker: Waker, begin: threading.Barrier) -> None:
        begin.wait()
        try:
            for _ in range(50):
                waker.wake()
        except OSError as error:
            problems.append(error)

    for _ in range(200):
        waker, begin = Waker(), threading.Barrier(3)
        threads = [threading.Thread(target=hammer, args=(waker, begin)) for _ in range(2)]
        for thread in threads:
            thread.start()
        begin.wait()
        fd = waker.fileno()
        waker.close()
        other = os.memfd_create("other")
        for thread in threads:
            thread.join()
        assert other != fd or os.fstat(other).st_size == 0
        os.close(other)
    assert not problems


def test_a_signal_in_the_middle_of_closing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A handler runs in the thread that it interrupts, which may hold the lock."""
    waker = Waker()
    close = os.close

    def interrupted(fd: int) -> None:
        signal.raise_signal(signal.SIGUSR1)
        close(fd)

    before = signal.signal(signal.SIGUSR1, lambda *_: waker.wake())
    try:
        monkeypatch.setattr(os, "close", interrupted)
        waker.close()
    finally:
        monkeypatch.undo()
        signal.signal(signal.SIGUSR1, before)
    assert waker.fileno() == -1
