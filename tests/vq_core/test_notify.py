"""Signals never wait for the peer, whatever it did to the descriptor."""

from __future__ import annotations

import os
import threading

from vq_core.notify import signal

FULL = 2**64 - 2


def test_each_signal_counts_one() -> None:
    fd = os.eventfd(0, os.EFD_NONBLOCK)
    for _ in range(1000):
        signal(fd)
    assert os.eventfd_read(fd) == 1000
    os.close(fd)


def test_signals_of_several_threads_all_count() -> None:
    """More threads than processors: each loses its processor now and then, in the middle of a signal."""

    def signals(fd: int) -> None:
        for _ in range(20000):
            signal(fd)

    for _ in range(10):
        fd = os.eventfd(0, os.EFD_NONBLOCK)
        threads = [threading.Thread(target=signals, args=(fd,)) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert os.eventfd_read(fd) == 8 * 20000
        os.close(fd)


def test_a_full_counter_that_blocks_does_not_hold_us() -> None:
    fd = os.eventfd(0)
    os.eventfd_write(fd, FULL)
    os.set_blocking(fd, True)
    thread = threading.Thread(target=signal, args=(fd,), daemon=True)
    thread.start()
    thread.join(60)
    assert not thread.is_alive()
    os.close(fd)


def test_what_cannot_be_signalled_is_ignored() -> None:
    read_end, write_end = os.pipe()
    os.close(read_end)
    signal(write_end)  # no reader
    os.close(write_end)
    signal(write_end)  # closed
    signal(-1)


def test_a_pipe_gets_a_word() -> None:
    read_end, write_end = os.pipe()
    signal(write_end)
    assert os.read(read_end, 64) == (1).to_bytes(8, "little")
    os.close(read_end)
    os.close(write_end)
