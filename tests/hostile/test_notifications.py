"""Lines 37, 41 and 43: kicks, calls, and a guest that wants all the attention."""

from __future__ import annotations

import os
import select
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from pathlib import Path

import pytest

from hostile.conftest import Connect, every_layout
from hostile.guest import CALL, INDIRECT, KICK, NEXT, PLAIN, WRITE, A, Guest
from hostile.process import Host, Neighbour, wait_until
from vq import virtio as v
from vq.errors import BackendError, VqError
from vq.frontend import Frontend
from vq.message import Request

EVENT = PLAIN | v.mask(v.VIRTIO_F_EVENT_IDX)
MRG = PLAIN | v.mask(v.VIRTIO_NET_F_MRG_RXBUF)
BUFFERS = A + 0x200000
NUM = 16
SECONDS = 0.4


def idle(host: Host, neighbour: Neighbour, limit: float = 0.25) -> None:
    """Insist that the process sleeps, for most of a while, once the neighbour is quiet."""
    neighbour.quiet = True
    try:
        time.sleep(0.1)
        before = host.cpu_seconds()
        time.sleep(SECONDS)
        share = (host.cpu_seconds() - before) / SECONDS
        assert share < limit, f"{share:.0%} of a processor without any work"
    finally:
        neighbour.quiet = False


@contextmanager
def busy(act: Callable[[], None]) -> Iterator[None]:
    """Do something as often as possible in another thread."""
    ending = threading.Event()
    failures: list[BaseException] = []

    def run() -> None:
        try:
            while not ending.is_set():
                act()
        except BaseException as failure:
            failures.append(failure)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ending.set()
        thread.join()
    assert not failures, failures


# -- line 37 --


@pytest.mark.checklist(37)
@pytest.mark.parametrize("event", [0, 1, 15, 16, 0x7FFF, 0x8000, 0xFFFF])
def test_any_used_event(host: Host, neighbour: Neighbour, connect: Connect, event: int) -> None:
    """Line 37: wherever the guest wants its next call, packets move and nothing spins."""
    guest = connect(EVENT)
    for index in (0, 1):
        (guest.receive, guest.transmit)[index].avail[2 + NUM] = event
    guest.write(BUFFERS, bytes(12) + b"e" * 68)
    guest.transmit.put(0, BUFFERS, 80)
    guest.receive.put(0, BUFFERS + 4096, 80, WRITE)
    for number in range(40):
        guest.receive.offer(0)
        guest.transmit.offer(0)
        guest.kick(1)
        wait_until("the packet is received", lambda number=number: guest.receive.used_idx == number + 1)
    guest.well()


@every_layout
@pytest.mark.checklist(37)
def test_calls_are_not_wanted_and_then_wanted(host: Host, neighbour: Neighbour, connect: Connect) -> None:
    """Line 37: a guest that never wants calls loses none of its packets, and gets calls again when it asks."""
    guest = connect(EVENT, num=64)
    for round_number in range(3):
        calls = host.queue("receiveq0")["calls"]
        for ring in guest.rings:
            ring.want_no_calls()
        position = guest.receive.used_idx
        for number in range(64):
            guest.receive.put(number, BUFFERS + 256 * number, 256, WRITE)
            guest.transmit.put(number, BUFFERS + 0x40000, 80)
        guest.receive.offer(*range(64))
        guest.transmit.offer(*range(64))
        guest.kick(1)
        wait_until("all are received", lambda position=position: (guest.receive.used_idx - position) % 65536 == 64)
        assert host.queue("receiveq0")["calls"] - calls <= (1 if round_number == 0 else 0)
    idle(host, neighbour)
    guest.receive.want_call()
    before = host.queue("receiveq0")["calls"]
    guest.receive.offer(0)
    guest.transmit.offer(0)
    guest.kick(1)
    wait_until("the call comes", lambda: host.queue("receiveq0")["calls"] == before + 1)


@pytest.mark.checklist(37)
@pytest.mark.parametrize("flags", [1, 2, 3, 0xFFFE, 0xFFFF])
@pytest.mark.parametrize("features", [PLAIN, EVENT])
def test_any_flags_of_the_available_ring(guest: Guest, connect: Connect, flags: int, features: int) -> None:
    """Line 37: unknown flags mean nothing; NO_INTERRUPT without EVENT_IDX means no call."""
    guest.close()
    guest = connect(features)
    guest.transmit.avail[0] = guest.receive.avail[0] = flags
    if features == EVENT:
        guest.exchange(b"flags are ignored" * 5)
        return
    guest.write(BUFFERS, bytes(12) + b"f" * 68)
    guest.transmit.put(0, BUFFERS, 80)
    guest.receive.put(0, BUFFERS + 4096, 80, WRITE)
    before = guest.host.queue("receiveq0")["calls"]
    for number in range(5):
        guest.receive.offer(0)
        guest.transmit.offer(0)
        guest.kick(1)
        wait_until("it is received", lambda number=number: guest.receive.used_idx == number + 1)
    wait_until("it was thought about", lambda: guest.host.queue("receiveq0")["calls_suppressed"] or not flags & 1)
    assert (guest.host.queue("receiveq0")["calls"] == before) == bool(flags & 1)


@every_layout
@pytest.mark.checklist(37)
def test_the_guest_writes_the_device_s_wishes(
    host: Host, neighbour: Neighbour, connect: Connect, layout: str
) -> None:
    """Line 37: flags of the used ring and avail_event are the device's; overwriting them harms the guest at most."""
    guest = connect(EVENT)

    def scribble() -> None:
        for queue in guest.queues:
            if layout == "packed":
                queue.device_event[:] = ((int(queue.device_event[0]) + 12345) % 65536, 0xFFFF)
            else:
                queue.used_head[0] = 0xFFFF
                queue.avail_event[0] = (int(queue.avail_event[0]) + 12345) % 65536
        time.sleep(0)

    with busy(scribble):
        neighbour.check(10)
        for _ in range(20):
            guest.exchange_kicking(b"scribbled" * 9)
    guest.well()


# -- line 41 --


@every_layout
@pytest.mark.checklist(41)
def test_kick_storm_without_buffers(host: Host, neighbour: Neighbour, guest: Guest) -> None:
    """Line 41: kicks as fast as they can be, with nothing to do; then the process sleeps again."""
    with busy(lambda: [guest.kick(index) for index in (0, 1)] and None):
        neighbour.check(20)
        assert guest.frontend.request(Request.GET_FEATURES)
    guest.exchange(b"after the storm" * 6)
    idle(host, neighbour)


@every_layout
@pytest.mark.checklist(41)
def test_full_kick_counter(host: Host, neighbour: Neighbour, guest: Guest) -> None:
    """Line 41: the kick eventfd is never read, so it may be full: it is readable for ever, and nothing spins."""
    fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
    try:
        os.eventfd_write(fd, 0xFFFF_FFFF_FFFF_FFFE)
        assert guest.ring_word(KICK, 1, fd) == "done"
        idle(host, neighbour)
        os.eventfd_read(fd)
        guest.transmit.put(0, BUFFERS, 80)
        guest.transmit.offer(0)
        os.eventfd_write(fd, 1)
        wait_until("the kick is seen", lambda: guest.transmit.used_idx == 1)
    finally:
        os.close(fd)


@every_layout
@pytest.mark.checklist(41)
def test_full_call_counter(host: Host, neighbour: Neighbour, guest: Guest) -> None:
    """Line 41: a call that cannot be added to is a call; a thousand packets later nothing has waited for it."""
    fds = [os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC) for _ in range(2)]
    try:
        for index, fd in enumerate(fds):
            os.eventfd_write(fd, 0xFFFF_FFFF_FFFF_FFFE)
            assert guest.ring_word(CALL, index, fd) == "done"
        guest.transmit.put(0, BUFFERS, 80)
        guest.receive.put(0, BUFFERS + 4096, 80, WRITE)
        for number in range(300):
            guest.receive.offer(0)
            guest.transmit.offer(0)
            guest.kick(1)
            wait_until("it is received", lambda number=number: guest.receive.used_idx == number + 1)
        assert os.eventfd_read(fds[0]) >= 0xFFFF_FFFF_FFFF_FFFE
    finally:
        for fd in fds:
            os.close(fd)
    neighbour.check()


@pytest.mark.checklist(41)
@pytest.mark.parametrize("kind", ["pipe", "socket"])
def test_kick_fd_whose_other_end_is_closed(host: Host, neighbour: Neighbour, guest: Guest, kind: str) -> None:
    """Line 41: a hang-up is one edge, not a loop."""
    if kind == "pipe":
        ours, theirs = os.pipe2(os.O_CLOEXEC)
    else:
        one, other = socket.socketpair()
        ours, theirs = one.detach(), other.detach()
    assert guest.ring_word(KICK, 1, ours) == "done"
    os.close(ours)
    os.close(theirs)
    idle(host, neighbour)
    guest.well()


@pytest.mark.checklist(41, 5)
@pytest.mark.parametrize("index", [0, 1])
def test_call_fd_whose_other_end_is_closed(neighbour: Neighbour, guest: Guest, index: int) -> None:
    """Lines 5, 41: a call into a closed pipe is no signal that ends the process."""
    reading, writing = os.pipe2(os.O_CLOEXEC)
    assert guest.ring_word(CALL, index, writing) == "done"
    assert guest.ring_word(Request.SET_VRING_ERR, index, writing) == "done"
    os.close(reading)
    os.close(writing)
    guest.exchange(b"nobody hears the call" * 4)
    guest.transmit.avail[1] += 100
    guest.kick(1)
    wait_until("the ring is broken", lambda: guest.host.queue("transmitq0")["broken"])
    neighbour.check()


@pytest.mark.checklist(5, 41)
@pytest.mark.parametrize("kind", ["eventfd", "pipe"])
def test_call_fd_that_is_made_blocking_again(neighbour: Neighbour, guest: Guest, kind: str) -> None:
    """Lines 5, 41: the flag belongs to the open file, which the front-end keeps and may change, as it may fill it."""
    others = []
    if kind == "eventfd":
        fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
    else:
        reading, fd = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        others.append(reading)
    try:
        assert guest.ring_word(CALL, 0, fd) == "done"
        assert guest.ring_word(Request.SET_VRING_ERR, 1, fd) == "done"
        with suppress(BlockingIOError):
            if kind == "eventfd":
                os.eventfd_read(fd)
            while kind == "pipe":
                os.write(fd, bytes(65536))
        if kind == "eventfd":
            os.eventfd_write(fd, 0xFFFF_FFFF_FFFF_FFFE)
        os.set_blocking(fd, True)
        for _ in range(5):
            guest.exchange(b"nobody waits" * 8)
            neighbour.check()
        guest.transmit.avail[1] += 100  # breaks the ring: the err fd is used
        guest.kick(1)
        wait_until("the ring is broken", lambda: guest.host.queue("transmitq0")["broken"])
        neighbour.check()
    finally:
        # Whoever waits in spite of all this goes on now, so that only this test fails.
        os.set_blocking(fd, False)
        with suppress(BlockingIOError):
            os.read(others[0] if others else fd, 1 << 20)
        for each in (fd, *others):
            os.close(each)


@pytest.mark.checklist(41)
def test_full_call_pipe(neighbour: Neighbour, guest: Guest) -> None:
    """Line 41: a pipe that nobody empties takes no more calls, and delays none."""
    reading, writing = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        with suppress(BlockingIOError):
            while True:
                os.write(writing, bytes(65536))
        os.set_blocking(writing, True)
        assert guest.ring_word(CALL, 0, writing) == "done"
        for _ in range(10):
            guest.exchange(b"nobody empties it" * 4)
    finally:
        os.close(reading)
        os.close(writing)
    neighbour.check()


@contextmanager
def awaited(fd: int, duplicates: int, polls: int) -> Iterator[None]:
    """Let so many epoll entries wait for a descriptor: each of them is woken by whoever signals it."""
    with ExitStack() as ending:
        fds = [os.dup(fd) for _ in range(duplicates)]
        for copy in fds:
            ending.callback(os.close, copy)
        for _ in range(polls):
            poll = ending.enter_context(select.epoll())
            for copy in fds:
                poll.register(copy, select.EPOLLIN | select.EPOLLET)
        yield


@pytest.mark.checklist(5, 41)
@pytest.mark.parametrize("which", ["call", "err", "new call"])
def test_signals_that_wake_a_crowd(tmp_path: Path, which: str) -> None:
    """Lines 5, 41: each call wakes all who wait for its descriptor, in our time; when it adds up, there are no more."""
    host = Host(tmp_path)
    neighbour = Neighbour(host.neighbour_path)
    neighbour.check()
    guest = Guest(host)
    fd = guest.err_fds[1] if which == "err" else guest.transmitq.call_fd
    guest.write(BUFFERS, bytes(12) + b"p" * 68)

    def send() -> bool:
        with suppress(OSError, VqError):
            if which == "err" and guest.errors(1):
                guest.restart(1)
            elif which == "new call":
                guest.frontend.send(CALL, (1).to_bytes(8, "little"), [fd])
        guest.transmit.put(0, BUFFERS, 80, NEXT if which == "err" else 0, NUM)
        guest.transmit.offer(0)
        guest.kick(1)
        return host.port()["state"] == "listening"

    with awaited(fd, 1000, 50):
        neighbour.slowest = 0.0
        wait_until("the front-end is shown out", send)
    neighbour.check()
    assert neighbour.slowest < 0.25
    with closing(Frontend.connect(host.path, timeout=0.1)) as again, pytest.raises(BackendError, match="time is over"):
        again.request(Request.GET_FEATURES)
    assert "Traceback" not in host.messages
    guest.close()
    neighbour.close()
    assert host.close() == 0


# -- line 43 --


def served(host: Host) -> int:
    """Chains that the transmitq has taken so far."""
    queue = host.queue("transmitq0")
    return int(queue["packets"]) + sum(queue["dropped"].values())


@every_layout
@pytest.mark.checklist(43)
@pytest.mark.parametrize("what", ["packets", "nothing", "long chains", "empty tables"])
def test_a_ring_that_never_ends(
    host: Host, neighbour: Neighbour, connect: Connect, layout: str, what: str
) -> None:
    """Line 43 (CVE-2020-14378): a ring that is refilled as fast as it is emptied; messages and the neighbour go on."""
    num = 32768 if what == "long chains" else 1024
    guest = connect(num=num)
    # Packets wait for room in a ring that runs, and a packed ring that is always overwritten looks empty by turns.
    guest.stop(0)
    ring = guest.transmit
    guest.write(BUFFERS, bytes(12) + b"p" * 68)
    if what == "packets":
        ring.desc["addr"], ring.desc["len"] = BUFFERS, 80
    elif what == "long chains":
        ring.desc["addr"], ring.desc["len"] = BUFFERS, 0
        ring.desc["flags"] = NEXT
        step = 7919 if layout == "split" else 1  # packed: in the order of the ring, in any case
        ring.desc["next"] = [(number + step) % num for number in range(num)]
        ring.desc["flags"][-step % num] = 0  # from head 0 through all of them
    elif what == "empty tables":
        rows = [(0, 0, NEXT if number < 1023 else 0, (number + 1) % 1024) for number in range(1024)]
        guest.write(BUFFERS + 0x10000, guest.table(rows))
        ring.desc["addr"], ring.desc["len"], ring.desc["flags"] = BUFFERS + 0x10000, 16 * 1024, INDIRECT
    if layout == "split":
        ring.avail[2:-1] = 0
    before = served(host)

    def refill() -> None:
        ring.again()
        guest.kick(1)

    def is_served() -> bool:
        # The device's used descriptors and ours may meet in one slot of a packed ring, which then makes no sense.
        if guest.errors(1):
            guest.start(1, base=guest.stop(1))
        return served(host) > before

    neighbour.slowest = 0.0
    with busy(refill):
        begin = time.monotonic()
        neighbour.check(10)
        for _ in range(5):
            assert guest.frontend.request(Request.GET_FEATURES)
            assert neighbour.frontend.request(Request.GET_FEATURES)
        assert time.monotonic() - begin < 4
        wait_until("the ring is served as well", is_served)
        guest.frontend.timeout = 2
        guest.stop(1)
    assert neighbour.slowest < 0.5
    guest.queues[1].reset()


@every_layout
@pytest.mark.checklist(43, 34)
def test_packets_that_never_fit(host: Host, neighbour: Neighbour, connect: Connect) -> None:
    """Lines 34, 43: long packets for the largest ring of one-byte buffers, all in vain; the neighbour goes on."""
    guest = connect(MRG, num=32768)
    guest.receive.desc["addr"], guest.receive.desc["len"], guest.receive.desc["flags"] = BUFFERS, 1, WRITE
    guest.receive.offer(*range(32768))
    guest.transmit.desc["addr"], guest.transmit.desc["len"] = BUFFERS + 4096, 12 + 65000
    guest.transmit.heads_in_order(0)

    def refill() -> None:
        guest.transmit.again()
        guest.kick(1)

    neighbour.slowest = 0.0
    with busy(refill):
        neighbour.check(10)
        guest.frontend.timeout = 2
        guest.stop(1)
    assert guest.receive.used_idx == 0
    assert neighbour.slowest < 0.25
    guest.queues[1].reset()
