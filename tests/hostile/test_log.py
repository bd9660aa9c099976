"""Lines 12 and 44, and the log's part of line 11: the dirty log of a migration."""

from __future__ import annotations

import mmap
import os
import time
from collections.abc import Iterator

import pytest

from hostile.conftest import Connect, every_layout
from hostile.guest import A_BYTES, A_USER, PAGE, PLAIN, WRITE, A, C, Guest
from hostile.memory import HUGE_PAGE, huge_pages_free
from hostile.process import Host, Neighbour, wait_until
from vq import virtio as v
from vq.frontend import RingSetup
from vq.message import Request
from vq.payload import Log, VringAddr

R = Request
LOGGED = PLAIN | v.mask(v.VHOST_F_LOG_ALL)
MRG_LOGGED = LOGGED | v.mask(v.VIRTIO_NET_F_MRG_RXBUF)
BUFFERS = A + 0x200000
LOG_BYTES = (C >> 15) + PAGE  # of a log that covers all memory of a guest
F_LOG = 1


class LogFile:
    """A log that can be read, too large, too small, or taken away."""

    def __init__(self, size: int, *, huge: bool = False) -> None:
        self.size = size
        self.fd = os.memfd_create("dirty-log", os.MFD_CLOEXEC | (os.MFD_HUGETLB if huge else 0))
        os.ftruncate(self.fd, size)
        self.bytes = mmap.mmap(self.fd, size)

    def pages(self) -> set[int]:
        """The pages that are marked."""
        data = self.bytes[:]
        return {8 * at + bit for at, byte in enumerate(data) if byte for bit in range(8) if byte >> bit & 1}

    def clear(self) -> None:
        self.bytes[:] = bytes(self.size)

    def close(self) -> None:
        os.close(self.fd)


@pytest.fixture
def log() -> Iterator[LogFile]:
    file = LogFile(-(-LOG_BYTES // PAGE) * PAGE)
    yield file
    file.close()


def restart_logged(guest: Guest, index: int, log_guest_addr: int) -> None:
    """Start a ring anew with VRING_F_LOG."""
    base = guest.stop(index)
    queue = guest.queues[index]
    queue.reset(base)
    guest.frontend.start_ring(
        RingSetup(
            index,
            queue.size,
            *queue.addresses,
            base,
            queue.kick_fd,
            queue.call_fd,
            guest.err_fds[index],
            log_guest_addr,
            F_LOG,
        )
    )


def receive_into(guest: Guest, addr: int, length: int, packet: int = 100) -> None:
    """Have a packet written to `addr`."""
    position = guest.receive.used_idx
    guest.receive.put(0, addr, length, WRITE)
    guest.receive.offer(0)
    guest.transmitq.add([bytes(12 + packet)])
    guest.transmitq.kick()
    wait_until("it is received", lambda: guest.receive.used_idx != position)
    wait_until("its buffer is back", lambda: guest.transmitq.poll())


# -- line 12 --


@pytest.mark.checklist(12)
@pytest.mark.parametrize(
    ("size", "offset"),
    [
        (0, 0),
        (PAGE, (1 << 64) - 1),
        ((1 << 64) - 1, 1),
        ((1 << 64) - PAGE, PAGE),
        (1 << 63, 0),
        (1 << 63, 1 << 63),
        ((1 << 63) + PAGE, (1 << 63)),
        (2 * PAGE, 1 << 20),
        ((1 << 20) + 1, 0),
        (1, 1 << 20),
        ((1 << 62) + 1, 0),
        (PAGE, (1 << 63) - PAGE),
        (1 << 40, 0),
    ],
)
def test_log_that_cannot_be(host: Host, connect: Connect, size: int, offset: int) -> None:
    """Line 12 (CVE-2020-10722): size and offset that overflow or leave the file: closed, nothing is mapped."""
    guest = connect(LOGGED)
    maps = host.holdings().shared_maps
    file = LogFile(1 << 20)
    try:
        assert guest.say(R.SET_LOG_BASE, Log(size, offset), [file.fd]) == "closed"
        wait_until("nothing is mapped", lambda: host.holdings().shared_maps <= maps)
    finally:
        file.close()


@every_layout
@pytest.mark.checklist(12, 44)
def test_log_smaller_than_memory(connect: Connect, neighbour: Neighbour) -> None:
    """Lines 12, 44: pages beyond the log are not marked; nothing is written behind it; packets go on."""
    guest = connect(LOGGED)
    covered = A // PAGE + 16  # 16 pages of A
    file = LogFile(1 << 20)
    try:
        size = covered // 8
        guest.frontend.set_log_base(file.fd, size, 0)
        for addr in (A + 15 * PAGE + 100, BUFFERS, C, A + 16 * PAGE - 50):
            receive_into(guest, addr, 200)
        assert file.pages() == {A // PAGE + 15}  # the last one reaches over the end: all of it is left out
        assert file.bytes[size:] == bytes(len(file.bytes) - size)
        neighbour.check()
        guest.well()
        time.sleep(1.1)  # the log takes one warning a second when there were many
        guest.close()
        wait_until("the log tells", lambda: "writes lay beyond the dirty log" in guest.host.messages)
    finally:
        file.close()


@pytest.mark.checklist(12, 44)
@pytest.mark.parametrize("offset", [0, 1, 8, 100, PAGE - 1, PAGE, 5000])
def test_log_at_any_offset(connect: Connect, offset: int) -> None:
    """Lines 12, 44: the bits begin where the offset says, and end with the size."""
    guest = connect(LOGGED)
    file = LogFile((LOG_BYTES + 16 * PAGE) // PAGE * PAGE)
    try:
        guest.frontend.set_log_base(file.fd, LOG_BYTES, offset)
        receive_into(guest, BUFFERS + 10, 200)
        byte = offset + (BUFFERS >> 15)
        assert file.bytes[byte] == 1 << (BUFFERS >> 12 & 7)
        assert sum(map(bool, file.bytes[:])) == 1
    finally:
        file.close()


@every_layout
@pytest.mark.checklist(12, 44)
def test_log_replaced_and_switched_while_packets_move(connect: Connect, neighbour: Neighbour) -> None:
    """Lines 12, 44: a hundred logs, one after the other, on and off in the middle of bursts; each is unmapped."""
    guest = connect(LOGGED, num=256)
    features = guest.frontend.features
    maps = guest.host.holdings().shared_maps
    for number in range(100):
        file = LogFile(-(-LOG_BYTES // PAGE) * PAGE)
        for _ in range(32):
            guest.receiveq.add(writable=[128])
            guest.transmitq.add([bytes(12 + 64)])
        guest.receiveq.publish()
        guest.transmitq.publish()
        guest.kick(1)
        guest.frontend.set_log_base(file.fd, LOG_BYTES, 0)
        if number % 3 == 1:
            guest.frontend.set_features(features & ~v.mask(v.VHOST_F_LOG_ALL))
            guest.frontend.set_features(features)
        for queue in guest.queues:
            taken = 0
            while taken < 32:
                wait_until("all is used", lambda queue=queue: queue.wait(0.2))
                taken += len(queue.poll())
        file.close()
    assert guest.host.holdings().shared_maps == maps + 1
    neighbour.check()


@pytest.mark.checklist(12, 46)
def test_log_of_huge_pages(host: Host, connect: Connect) -> None:
    """Lines 12, 46: a log in huge pages is mapped whole, and unmapped whole, however small its size is."""
    if huge_pages_free() == 0:
        pytest.skip("no huge pages; sudo sysctl vm.nr_hugepages=64")
    guest = connect(LOGGED)
    maps = host.holdings().shared_maps
    for number in range(10):
        file = LogFile(HUGE_PAGE, huge=True)
        guest.frontend.set_log_base(file.fd, LOG_BYTES + number, number * PAGE + 3)
        receive_into(guest, BUFFERS, 200)
        assert file.bytes[number * PAGE + 3 + (BUFFERS >> 15)] == 1
        assert host.holdings().shared_maps == maps + 1
        file.close()


# -- line 44 --


@every_layout
@pytest.mark.checklist(44, 48)
@pytest.mark.parametrize("mergeable", [False, True])
def test_every_written_page_is_marked(connect: Connect, log: LogFile, mergeable: bool) -> None:
    """Line 44: header, payload, and what lies in two pages or regions; readable memory is not marked."""
    guest = connect(MRG_LOGGED if mergeable else LOGGED)
    guest.frontend.set_log_base(log.fd, log.size, 0)
    receive_into(guest, BUFFERS + PAGE - 50, 200)
    assert log.pages() == {BUFFERS // PAGE, BUFFERS // PAGE + 1}
    log.clear()
    receive_into(guest, A + A_BYTES - 60, 200)  # up to the next region
    assert log.pages() == {(A + A_BYTES) // PAGE - 1, (A + A_BYTES) // PAGE}
    log.clear()
    receive_into(guest, BUFFERS, 3 * PAGE, packet=PAGE)
    assert log.pages() == {BUFFERS // PAGE, BUFFERS // PAGE + 1}


@every_layout
@pytest.mark.checklist(44)
def test_the_number_of_buffers_is_marked_after_it_was_written(connect: Connect, log: LogFile) -> None:
    """Line 44: merged buffers in as many pages, the two bytes of num_buffers in different ones."""
    guest = connect(MRG_LOGGED)
    guest.frontend.set_log_base(log.fd, log.size, 0)
    for number in range(4):
        place = BUFFERS + (number + 1) * PAGE - 11 if number == 0 else BUFFERS + 2 * (number + 1) * PAGE
        guest.receive.put(number, place, 60, WRITE)
    guest.receive.offer(0, 1, 2, 3)
    guest.transmitq.add([bytes(12 + 150)])
    guest.transmitq.kick()
    wait_until("it is received", lambda: guest.receive.used_idx == 3)
    first = BUFFERS // PAGE
    assert log.pages() == {first, first + 1, first + 4, first + 6}


@every_layout
@pytest.mark.checklist(44, 12)
@pytest.mark.parametrize("index", [0, 1])
def test_used_ring_is_marked_where_it_is_said_to_lie(
    connect: Connect, log: LogFile, index: int, layout: str
) -> None:
    """Lines 12, 44: by log_guest_addr, which need not be in the memory table.

    In a packed ring this is the place of the device's event structure; its descriptors lie where they lie.
    """
    guest = connect(LOGGED, num=256)
    guest.frontend.set_log_base(log.fd, log.size, 0)
    restart_logged(guest, index, 0x1000 + PAGE - 4)
    guest.exchange(b"marked" * 10)
    low = {page for page in log.pages() if page < A // PAGE}
    if layout == "split":
        assert low == {1, 2}  # idx and flags before the border, elements behind it
    else:
        assert low == {1}
        assert guest.queues[index].guest_addresses[0] // PAGE in log.pages()


@every_layout
@pytest.mark.checklist(44, 12)
@pytest.mark.parametrize("log_guest_addr", [LOG_BYTES << 15, 1 << 60, (1 << 64) - 4096, (1 << 64) - 134])
def test_used_ring_logged_beyond_the_log(connect: Connect, log: LogFile, log_guest_addr: int) -> None:
    """Lines 12, 44: outside of the log nothing is marked, and nothing else happens."""
    guest = connect(LOGGED)
    guest.frontend.set_log_base(log.fd, log.size, 0)
    restart_logged(guest, 1, log_guest_addr)
    guest.exchange(b"not marked" * 10)
    assert not {page for page in log.pages() if page < A // PAGE}
    guest.well()


@pytest.mark.checklist(44, 12)
@pytest.mark.parametrize("log_guest_addr", [(1 << 64) - 1, (1 << 64) - 4, (1 << 64) - 133])
def test_used_ring_logged_across_the_end_of_addresses(connect: Connect, log: LogFile, log_guest_addr: int) -> None:
    """Lines 12, 44: where the sum would wrap to page 0: refused, running and at the start."""
    guest = connect(LOGGED)
    guest.frontend.set_log_base(log.fd, log.size, 0)
    desc, avail, used = guest.transmitq.addresses
    addr = VringAddr(1, F_LOG, desc, used, avail, log_guest_addr)
    assert guest.say(R.SET_VRING_ADDR, addr) == "refused"
    guest.exchange(b"as before" * 10)
    assert 0 not in log.pages()
    guest.stop(1)
    assert guest.say(R.SET_VRING_ADDR, addr) == "done"
    assert guest.ring_word(R.SET_VRING_KICK, 1, guest.transmitq.kick_fd) == "refused"
    assert guest.errors(1) == 1
    guest.works()


@every_layout
@pytest.mark.checklist(44)
def test_nothing_is_marked_after_the_stop(connect: Connect, log: LogFile) -> None:
    """Line 44: suspended means that the log is not written either."""
    guest = connect(LOGGED)
    guest.frontend.set_log_base(log.fd, log.size, 0)
    for index in (0, 1):
        restart_logged(guest, index, 0x1000 * (index + 1))
    guest.exchange(b"marked" * 10)
    for index in (0, 1):
        guest.stop(index)
    log.clear()
    guest.kick(1)
    guest.frontend.barrier()
    assert log.pages() == set()


@every_layout
@pytest.mark.checklist(44, 29)
def test_broken_ring_marks_nothing_wrong(connect: Connect, log: LogFile) -> None:
    """Lines 29, 44: a logged buffer that leads outside breaks the ring; only what was written is marked."""
    guest = connect(LOGGED)
    guest.frontend.set_log_base(log.fd, log.size, 0)
    guest.receive.chain((BUFFERS, 20, WRITE), (0, 500, WRITE))
    guest.receive.offer(0)
    guest.transmitq.add([bytes(12 + 100)])
    guest.transmitq.kick()
    guest.broken(0, "address outside the guest's memory")
    assert log.pages() <= {BUFFERS // PAGE}


# -- line 11, of the log --


@every_layout
@pytest.mark.checklist(11)
@pytest.mark.parametrize("huge", [False, True])
def test_log_is_taken_away(connect: Connect, neighbour: Neighbour, huge: bool) -> None:
    """Line 11: a log that is truncated costs its connection, not the process."""
    if huge and huge_pages_free() == 0:
        pytest.skip("no huge pages; sudo sysctl vm.nr_hugepages=64")
    guest = connect(LOGGED)
    file = LogFile(HUGE_PAGE if huge else 1 << 20, huge=huge)
    try:
        guest.frontend.set_log_base(file.fd, LOG_BYTES, 0)
        receive_into(guest, BUFFERS, 200)
        os.ftruncate(file.fd, 0)
        for _ in range(2):
            guest.receiveq.add(writable=[200])
            guest.transmitq.add([bytes(12 + 60)])
        guest.receiveq.publish()
        guest.transmitq.publish()
        guest.kick(1)
        assert guest.frontend.wait_closed(5)
        neighbour.check()
        guest.close()
        connect().exchange(b"a new connection" * 5)
    finally:
        file.close()


@pytest.mark.checklist(12, 17)
def test_old_message_for_a_log(connect: Connect) -> None:
    """Lines 12, 17: the form without an fd means an address of the front-end, which nobody can map."""
    guest = connect(LOGGED)
    assert guest.say(R.SET_LOG_BASE, A_USER) == "closed"
