"""The driver-side virtqueue against a reference device, and against devices that break the rules."""

from __future__ import annotations

import fcntl
import gc
import itertools
import os
import random
import select
import threading
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reference_device import NEXT, WRITE, Chain, ReferenceDevice
from vq_core.driver import BrokenRingError, Buffer, DriverQueue, GuestMemory

VERSION_1 = 1 << 32
EVENT_IDX = 1 << 29
IN_ORDER = 1 << 35
MEBIBYTE = 1 << 20


def make(size: int = 8, features: int = VERSION_1, base: int = 0) -> DriverQueue:
    return DriverQueue(GuestMemory(MEBIBYTE), size, features=features, base=base)


def full(chain: Chain) -> int:
    return chain.room


# ---- guest memory ----


def test_memory_is_sealed_and_mapped() -> None:
    memory = GuestMemory(8192, mmap_offset=4096)
    ((guest_addr, size, user_addr, offset, fd),) = memory.regions
    assert (size, offset) == (8192, 4096)
    assert guest_addr != user_addr
    with pytest.raises(PermissionError):
        os.ftruncate(fd, 4096)
    assert fcntl.fcntl(fd, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK
    memory.view(guest_addr + 10, 5)[:] = b"hello"
    assert os.pread(fd, 5, 4096 + 10) == b"hello"


def test_memory_closes_its_descriptors() -> None:
    before = set(os.listdir("/proc/self/fd"))
    memory = GuestMemory(4096)
    queue = DriverQueue(memory, 4)
    view = memory.view(memory.regions[0][0], 4)
    memory.close()
    queue.close()
    assert set(os.listdir("/proc/self/fd")) == before
    view[:] = b"live"
    assert bytes(view) == b"live"


def test_memory_regions_do_not_overlap() -> None:
    memory = GuestMemory(8192, guest_addr=0x10000, user_addr=0x90000)
    memory.add_region(4096, guest_addr=0x12000, user_addr=0x80000)
    for guest_addr, user_addr in ((0x11000, 0x200000), (0x200000, 0x91000), (0xF000, 0x300000)):
        with pytest.raises(ValueError, match="overlaps"):
            memory.add_region(8192, guest_addr=guest_addr, user_addr=user_addr)
    assert len(memory.regions) == 2


def test_memory_refuses_what_spans_regions() -> None:
    memory = GuestMemory(4096, guest_addr=0x10000)
    memory.add_region(4096, guest_addr=0x11000)
    assert (len(memory.view(0x10FFF, 1)), len(memory.view(0x11000, 4096))) == (1, 4096)
    with pytest.raises(ValueError, match="one region"):
        memory.view(0x10FFF, 2)
    with pytest.raises(ValueError, match="one region"):
        memory.view(0x11FFF, 2)


def test_blocks_are_aligned_disjoint_zeroed_and_reused() -> None:
    memory = GuestMemory(64 * 4096)
    random.seed(1)
    blocks = []
    for _ in range(100):
        align = random.choice((1, 16, 64, 256, 4096))
        block = memory.alloc(random.randint(1, 300), align)
        assert block.guest_addr % max(64, align) == 0
        assert bytes(block) == bytes(block.size)
        memoryview(block)[:] = b"x" * block.size
        blocks.append(block)
        if len(blocks) > 20:
            blocks.pop(random.randrange(20))
        spans = sorted((one.guest_addr, one.size) for one in blocks)
        assert all(a + n <= b for (a, n), (b, _) in itertools.pairwise(spans))


def test_a_view_keeps_its_block() -> None:
    memory = GuestMemory(4096)
    view = memoryview(memory.alloc(2048))
    first = memory.alloc(2048).guest_addr
    gc.collect()
    assert memory.alloc(2048).guest_addr == first  # the dropped one, not the one that `view` holds
    del view


def test_memory_says_when_it_is_full() -> None:
    memory = GuestMemory(4096)
    block = memory.alloc(4096)
    with pytest.raises(MemoryError, match="larger"):
        memory.alloc(1)
    memory.add_region(4096)
    assert memory.alloc(4096).guest_addr > block.guest_addr


# ---- buffers out and back ----


@pytest.mark.parametrize("indirect", [False, True])
def test_a_buffer_goes_out_and_comes_back(indirect: bool) -> None:
    queue = make()
    device = ReferenceDevice(queue)
    token = queue.add([b"request", b"more"], [3, 10], indirect=indirect)
    assert device.pop() is None  # not published
    assert queue.free == (7 if indirect else 4)
    queue.publish()
    chain = device.pop()
    assert chain is not None
    assert [bytes(part) for part in chain.readable] == [b"request", b"more"]
    assert [len(part) for part in chain.writable] == [3, 10]
    device.put(chain.head, chain.write(b"response"))
    assert queue.poll() == []  # not published
    device.publish()
    assert queue.poll() == [(token, 8)]
    assert token.written(8) == b"response"
    assert (queue.free, queue.outstanding) == (8, 0)


def test_a_full_ring_refuses_and_recovers() -> None:
    queue = make(4)
    device = ReferenceDevice(queue)
    tokens = [queue.add([b"a"]) for _ in range(4)]
    with pytest.raises(BufferError, match="poll"):
        queue.add([b"b"])
    with pytest.raises(BufferError):
        queue.add([b"b"], indirect=True)
    queue.kick()
    assert device.serve(lambda chain: 0) == 4
    assert [token for token, _ in queue.poll()] == tokens
    queue.add([b"a"] * 4)
    with pytest.raises(BufferError):
        queue.add([b"b"])


def test_unchanged_descriptors_are_not_stored_again() -> None:
    """In-order single descriptors keep their place in the ring, so that its lines stay shared."""
    queue = make(4)
    device = ReferenceDevice(queue)
    block = queue.memory.alloc(64)
    for turn in range(10):
        tokens = [queue.add([block]) for _ in range(4)]
        assert [token.id for token in tokens] == [0, 1, 2, 3], turn
        queue.publish()
        device.serve(lambda chain: 0)
        assert len(queue.poll()) == 4


def test_positions_wrap() -> None:
    """More than 2^16 buffers through a small ring, started just before the wrap."""
    queue = make(8, base=65533)
    device = ReferenceDevice(queue)
    sent = 0
    while sent < 66000:
        tokens = [queue.add([(queue.guest_addresses[0], 1)]) for _ in range(8)]
        queue.publish()
        assert device.serve(lambda chain: 0) == len(tokens)
        assert [token for token, _ in queue.poll()] == tokens
        sent += len(tokens)
    assert queue.avail_idx == queue.used_idx == (65533 + sent) % 65536


def test_largest_ring() -> None:
    queue = DriverQueue(GuestMemory(4 * MEBIBYTE), 32768, base=40000)
    device = ReferenceDevice(queue)
    block = queue.memory.alloc(64)
    for _ in range(2):
        for _ in range(32768):
            queue.add((), [block])
        queue.publish()
        assert device.serve(full) == 32768
        assert len(queue.poll(max=100)) == 100
        assert len(queue.poll()) == 32668


Shape = tuple[list[bytes], list[int], bool]  # readable parts, writable lengths, indirect
parts = st.lists(st.binary(min_size=1, max_size=40), max_size=4)
rooms = st.lists(st.integers(1, 40), max_size=4)
buffers = st.tuples(parts, rooms, st.booleans()).filter(lambda shape: bool(shape[0] or shape[1]))


@settings(max_examples=150, deadline=None)
@given(
    size=st.sampled_from([1, 2, 4, 16, 64]),
    base=st.sampled_from([0, 1, 32767, 65500, 65535]),
    rounds=st.lists(st.tuples(st.lists(buffers, max_size=8), st.randoms(use_true_random=False)), max_size=8),
)
def test_any_chains_in_any_order(size: int, base: int, rounds: list[tuple[list[Shape], random.Random]]) -> None:
    """What the driver adds is what the device sees; what the device writes is what the driver gets, in its order."""
    queue = make(size, base=base)
    device = ReferenceDevice(queue)
    waiting: dict[int, Buffer] = {}
    taken: list[Chain] = []
    for batch, chance in rounds:
        for readable, writable, indirect in batch:
            try:
                token = queue.add(readable, writable, indirect=indirect)
            except BufferError:
                assert queue.free < (1 if indirect else len(readable) + len(writable))
                continue
            queue.publish()
            chain = device.pop()
            assert chain is not None
            assert [bytes(part) for part in chain.readable] == readable
            assert [len(part) for part in chain.writable] == writable
            waiting[chain.head] = token
            taken.append(chain)
        chance.shuffle(taken)
        done = [taken.pop() for _ in range(chance.randint(0, len(taken)))]
        expected = []
        for chain in done:
            data = chance.randbytes(chance.randint(0, chain.room))
            device.put(chain.head, chain.write(data))
            expected.append((waiting.pop(chain.head), data))
        device.publish()
        back = queue.poll()
        assert [(token, token.written(length)) for token, length in back] == expected
        assert queue.outstanding == len(waiting)


def test_a_buffer_may_stay_out_for_long() -> None:
    """Completion order is free: one buffer stays while the indices go around, in sight of one that is not published."""
    queue = make(2)
    device = ReferenceDevice(queue)
    oldest = queue.add([b"oldest"])
    queue.publish()
    device.pop()
    for _ in range(65535):
        queue.add([(queue.guest_addresses[0], 1)])
        queue.publish()
        device.serve(lambda chain: 0)
        queue.poll()
    newest = queue.add([b"newest"])
    device.put(oldest.id, 0)
    device.publish()
    assert queue.poll() == [(oldest, 0)]
    queue.publish()
    device.serve(lambda chain: 0)
    assert queue.poll() == [(newest, 0)]


# ---- notifications ----


def kicked(queue: DriverQueue) -> int:
    try:
        return os.eventfd_read(queue.kick_fd)
    except BlockingIOError:
        return 0


def test_kick_obeys_flags() -> None:
    queue = make()
    for suppressed in (0, 1, 0, 1):
        if queue.avail_idx:  # the first decision always kicks
            queue.used_head[0] = suppressed
        queue.add([b"x"])
        assert queue.kick() == (not queue.used_head[0])
        assert kicked(queue) == (0 if queue.used_head[0] else 1)
    assert not queue.kick()  # nothing new
    assert queue.kicks == (2, 2)


@settings(max_examples=300, deadline=None)
@given(
    base=st.integers(0, 65535),
    steps=st.lists(st.tuples(st.integers(1, 8), st.integers(-12, 12)), min_size=1, max_size=12),
)
def test_kick_obeys_event_idx(base: int, steps: list[tuple[int, int]]) -> None:
    """A kick exactly when the positions published since the last decision hold avail_event (2.7.7.2)."""
    queue = make(8, VERSION_1 | EVENT_IDX, base)
    device = ReferenceDevice(queue)
    first = True
    for count, distance in steps:
        old = queue.avail_idx
        device.avail_event[0] = event = (old + distance) % 65536
        for _ in range(count):
            queue.add([b"x"])
        passed = {(old + i) % 65536 for i in range(count)}
        assert queue.kick() == (first or event in passed)
        first = False
        device.serve(lambda chain: 0)
        queue.poll()


@pytest.mark.parametrize("features", [VERSION_1, VERSION_1 | EVENT_IDX])
def test_arm_asks_for_a_call(features: int) -> None:
    queue = make(8, features, base=65534)
    device = ReferenceDevice(queue, event_idx=bool(features & EVENT_IDX))
    for _ in range(6):
        queue.disarm()
        queue.add([b"x"])
        queue.add([b"x"])
        queue.publish()
        assert not queue.arm()
        chains = [device.pop(), device.pop()]
        for chain in chains:
            assert chain is not None
            device.put(chain.head, 0)
        device.publish()
        assert device.wants_call()
        assert queue.arm()  # there is work: no call may come
        assert len(queue.poll()) == 2


def test_disarm_asks_for_silence() -> None:
    queue = make()
    device = ReferenceDevice(queue)
    queue.disarm()
    queue.add([b"x"])
    queue.publish()
    device.serve(lambda chain: 0)
    assert not device.wants_call()


def test_wait_sleeps_until_the_call() -> None:
    queue = make()
    device = ReferenceDevice(queue)
    queue.add([b"x"])
    queue.publish()
    assert not queue.wait(0.01)

    def answer() -> None:
        device.serve(lambda chain: 0)
        os.eventfd_write(queue.call_fd, 1)

    thread = threading.Timer(0.05, answer)
    thread.start()
    assert queue.wait(5)
    thread.join()
    assert len(queue.poll()) == 1
    assert select.select([queue.call_fd], [], [], 0)[0] == []


# ---- IN_ORDER ----


@settings(max_examples=150, deadline=None)
@given(
    base=st.sampled_from([0, 65530]),
    rounds=st.lists(
        st.tuples(st.integers(1, 8), st.lists(st.integers(1, 8), min_size=1, max_size=8), st.integers(1, 8)),
        max_size=10,
    ),
)
def test_in_order_accepts_batches(base: int, rounds: list[tuple[int, list[int], int]]) -> None:
    """One element for a batch: all its buffers come back in order, skipped ones as used completely (2.7.9)."""
    queue = make(8, VERSION_1 | IN_ORDER, base)
    device = ReferenceDevice(queue)
    for count, batches, most in rounds:
        tokens = [queue.add((), [10 + i]) for i in range(count)]
        queue.publish()
        expected = []
        left = list(tokens)
        for batch in batches:
            group, left = left[:batch], left[batch:]
            if not group:
                break
            device.put(group[-1].id, 7)
            device.skip(len(group) - 1)
            expected += [(token, len(token.writable[0])) for token in group[:-1]] + [(group[-1], 7)]
        for token in left:
            device.put(token.id, 3)
            expected.append((token, 3))
        device.publish()
        back = []
        while len(back) < count:
            back += queue.poll(max=most)  # a batch may be cut anywhere
        assert back == expected


def test_in_order_refuses_what_is_not_counted() -> None:
    queue = make(8, VERSION_1 | IN_ORDER)
    device = ReferenceDevice(queue)
    tokens = [queue.add([b"x"]) for _ in range(3)]
    queue.publish()
    device.put(tokens[2].id, 0)  # stands for three buffers, the index says one
    device.publish()
    with pytest.raises(BrokenRingError, match="not next in order"):
        queue.poll()


# ---- a device that breaks the rules (protocol 11.1, line 49) ----


def bad_id(queue: DriverQueue, device: ReferenceDevice, token: Buffer) -> None:
    device.put(queue.size, 0)


def huge_id(queue: DriverQueue, device: ReferenceDevice, token: Buffer) -> None:
    device.put(0xFFFFFFFF, 0)


def wide_id(queue: DriverQueue, device: ReferenceDevice, token: Buffer) -> None:
    device.put(0x10000 + token.id, 0)  # right in its lower 16 bits


def not_outstanding(queue: DriverQueue, device: ReferenceDevice, token: Buffer) -> None:
    device.put(7, 0)


def inner_descriptor(queue: DriverQueue, device: ReferenceDevice, token: Buffer) -> None:
    device.put(1, 0)  # the second descriptor of the chain is no head


def not_published(queue: DriverQueue, device: ReferenceDevice, token: Buffer) -> None:
    device.put(queue.add([b"later"]).id, 0)


def too_long(queue: DriverQueue, device: ReferenceDevice, token: Buffer) -> None:
    device.put(token.id, 101)


def index_ahead(queue: DriverQueue, device: ReferenceDevice, token: Buffer) -> None:
    device.put(token.id, 0)
    device.skip(1)


def index_far_ahead(queue: DriverQueue, device: ReferenceDevice, token: Buffer) -> None:
    device.skip(30000)


def index_behind(queue: DriverQueue, device: ReferenceDevice, token: Buffer) -> None:
    device.skip(-1)


HOSTILE = [
    (bad_id, "outside the ring of 8", 8),
    (huge_id, "outside the ring", 0xFFFFFFFF),
    (wide_id, "outside the ring", 0x10000),
    (not_outstanding, "not outstanding", 7),
    (inner_descriptor, "not outstanding", 1),
    (not_published, "not outstanding", 2),
    (too_long, "above the writable bytes", 101),
    (index_ahead, "ahead of what was made available", 2),
    (index_far_ahead, "ahead of what was made available", 30000),
    (index_behind, "ahead of what was made available", 65535),
]


@pytest.mark.parametrize(("attack", "text", "value"), HOSTILE, ids=lambda item: getattr(item, "__name__", ""))
@pytest.mark.parametrize("features", [VERSION_1, VERSION_1 | IN_ORDER])
def test_hostile_device(attack: Callable[..., None], text: str, value: int, features: int) -> None:
    queue = make(8, features)
    device = ReferenceDevice(queue)
    token = queue.add([b"request"], [100])
    queue.publish()
    attack(queue, device, token)
    device.publish()
    for _ in range(2):  # sticky
        with pytest.raises(BrokenRingError, match=text) as caught:
            queue.poll()
    assert caught.value.value == value
    assert text in str(queue.error)
    with pytest.raises(BrokenRingError):
        queue.arm()
    queue.reset()
    assert queue.error is None
    device = ReferenceDevice(queue)
    token = queue.add([b"again"])
    queue.publish()
    device.serve(lambda chain: 0)
    assert queue.poll() == [(token, 0)]


def test_used_twice() -> None:
    queue = make()
    device = ReferenceDevice(queue)
    first, second = queue.add([b"a"]), queue.add([b"b"])
    queue.publish()
    device.put(first.id, 0)
    device.put(first.id, 0)
    device.publish()
    assert queue.poll() == [(first, 0)]  # what stands before the bad element counts
    with pytest.raises(BrokenRingError, match="not outstanding"):
        queue.poll()
    assert second.id == 1


def test_any_used_ring_is_survived() -> None:
    """Random bytes in everything the device may write: an error or a result, never more than was posted."""
    chance = random.Random(7)
    for _ in range(300):
        queue = make(8, VERSION_1 | chance.choice((0, EVENT_IDX, IN_ORDER)))
        tokens = {queue.add([b"a"], [chance.randint(1, 50)]) for _ in range(4)}
        queue.publish()
        for slot in range(8):
            queue.used[slot] = (chance.choice((chance.getrandbits(32), chance.randint(0, 9))), chance.randint(0, 60))
        for index in range(8):
            queue.desc[index] = tuple(chance.getrandbits(bits) for bits in (64, 32, 16, 16))
        queue.used_head[:] = (chance.getrandbits(16), chance.choice((chance.getrandbits(16), chance.randint(0, 5))))
        try:
            for _ in range(4):
                for token, length in queue.poll():
                    tokens.remove(token)
                    assert length <= len(token.writable[0])
        except BrokenRingError:
            pass


# ---- raw access and misuse ----


def test_raw_views_are_the_rings_themselves() -> None:
    queue = make(4, VERSION_1 | EVENT_IDX)
    memory = queue.memory
    desc, avail, used = queue.guest_addresses
    queue.desc[3] = (0x1122334455667788, 99, NEXT | WRITE, 1)
    assert bytes(memory.view(desc + 48, 16)) == bytes.fromhex("8877665544332211 63000000 0300 0100")
    queue.avail[1] = 0x0102
    queue.avail[2 + 4] = 0x0304
    assert bytes(memory.view(avail + 2, 2)) == b"\x02\x01"
    assert bytes(memory.view(avail + 4 + 8, 2)) == b"\x04\x03"
    queue.avail_event[0] = 0x0506
    assert bytes(memory.view(used + 4 + 32, 2)) == b"\x06\x05"
    guest_addr, _, user_addr, *_ = memory.regions[0]
    distance = user_addr - guest_addr
    assert [address - distance for address in queue.addresses] == [desc, avail, used]


@pytest.mark.parametrize("size", [0, 3, 65536, -1])
def test_wrong_sizes(size: int) -> None:
    with pytest.raises(ValueError, match="power of two"):
        make(size)


def test_wrong_uses() -> None:
    with pytest.raises(ValueError, match="packed"):
        make(8, VERSION_1 | 1 << 34)
    queue = make()
    with pytest.raises(ValueError, match="at least one part"):
        queue.add()
    with pytest.raises(ValueError, match="65535"):
        queue.reset(65536)
