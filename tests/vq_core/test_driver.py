"""The driver-side virtqueue against a reference device, and against devices that break the rules: both layouts."""

from __future__ import annotations

import os
import random
import select
import threading
import time
from types import ModuleType

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from driver_rig import EVENT_IDX, IN_ORDER, LAYOUTS, MEBIBYTE, RINGS, every_layout, make, position
from reference_device import DISABLE, NEXT, WRITE, Chain, reference_device
from vq_core.driver import Buffer, DriverQueue
from vq_core.guest_memory import GuestMemory


def full(chain: Chain) -> int:
    return chain.room


# ---- buffers out and back ----


@every_layout
@pytest.mark.parametrize("indirect", [False, True])
def test_a_buffer_goes_out_and_comes_back(layout: str, indirect: bool) -> None:
    queue = make(layout)
    device = reference_device(queue)
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


@every_layout
def test_a_full_ring_refuses_and_recovers(layout: str) -> None:
    queue = make(layout, 4)
    device = reference_device(queue)
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


@pytest.mark.parametrize(("layout", "size"), RINGS)
def test_ids_keep_their_places(layout: str, size: int) -> None:
    """In-order single descriptors stand at the same place in each turn, so that what did not change is not written."""
    queue = make(layout, size)
    device = reference_device(queue)
    block = queue.memory.alloc(64)
    for turn in range(10):
        tokens = [queue.add([block]) for _ in range(size)]
        assert [token.id for token in tokens] == list(range(size)), turn
        queue.publish()
        assert device.serve(lambda chain: 0) == size
        assert len(queue.poll()) == size


@pytest.mark.parametrize(
    ("layout", "size", "start"),
    [("split", 8, 65533), ("packed", 8, 0), ("packed", 7, 5), ("packed", 3, 5), ("packed", 1, 1)],
)
def test_positions_wrap(layout: str, size: int, start: int) -> None:
    """More than 2^16 buffers through a small ring, started close to a wrap."""
    queue = make(layout, size, base=position(layout, size, start))
    device = reference_device(queue)
    sent = 0
    while sent < 66000:
        tokens = [queue.add([(queue.guest_addresses[0], 1)]) for _ in range(size)]
        queue.publish()
        assert device.serve(lambda chain: 0) == len(tokens)
        assert [token for token, _ in queue.poll()] == tokens
        sent += len(tokens)
    assert queue.avail_idx == queue.used_idx == position(layout, size, start + sent)


def test_bases_of_a_packed_ring() -> None:
    """Slot in bits 0 to 14, wrap counter in bit 15; available and used places may differ."""
    queue = make("packed", 5)
    device = reference_device(queue)
    assert (queue.avail_idx, queue.used_idx) == (0x8000, 0x8000)
    queue.add([b"a", b"b"])
    queue.add([b"c"])
    assert queue.avail_idx == 0x8000
    queue.publish()
    assert (queue.avail_idx, queue.used_idx) == (0x8003, 0x8000)
    device.serve(lambda chain: 0)
    queue.poll(1)
    assert queue.used_idx == 0x8002
    queue.poll()
    queue.add([b"d", b"e", b"f"])
    queue.publish()
    assert (queue.avail_idx, queue.used_idx) == (0x0001, 0x8003)
    for base in (0x0003, 0x8004, 0x0000):
        queue.reset(base)
        device = reference_device(queue)
        assert queue.avail_idx == queue.used_idx == base
        assert device.pop() is None
        assert queue.poll() == []
        token = queue.add([b"x"] * 5)
        queue.publish()
        assert device.serve(lambda chain: len(chain.readable) and 0) == 1
        assert queue.poll() == [(token, 0)]
        assert queue.avail_idx == base ^ 0x8000  # once around


@pytest.mark.parametrize(
    ("layout", "size", "base"), [("split", 32768, 40000), ("packed", 32768, 30000), ("packed", 32767, 0x8001)]
)
def test_largest_ring(layout: str, size: int, base: int) -> None:
    queue = DriverQueue(GuestMemory(4 * MEBIBYTE), size, features=LAYOUTS[layout], base=base)
    device = reference_device(queue)
    block = queue.memory.alloc(64)
    for _ in range(2):
        for _ in range(size):
            queue.add((), [block])
        queue.publish()
        assert device.serve(full) == size
        assert len(queue.poll(max=100)) == 100
        assert len(queue.poll()) == size - 100


Shape = tuple[list[bytes], list[int], bool]  # readable parts, writable lengths, indirect
parts = st.lists(st.binary(min_size=1, max_size=40), max_size=4)
rooms = st.lists(st.integers(1, 40), max_size=4)
buffers = st.tuples(parts, rooms, st.booleans()).filter(lambda shape: bool(shape[0] or shape[1]))


Round = tuple[list[list[Shape]], random.Random]  # batches to add, and the order of completion


@settings(max_examples=300, deadline=None)
@given(
    ring=st.sampled_from(RINGS),
    start=st.sampled_from([0, 1, 2, 32767, 65500, 65535]),
    rounds=st.lists(
        st.tuples(st.lists(st.lists(buffers, max_size=4), max_size=4), st.randoms(use_true_random=False)), max_size=8
    ),
)
def test_any_chains_in_any_order(ring: tuple[str, int], start: int, rounds: list[Round]) -> None:
    """What the driver adds is what the device sees, a batch at once; what the device writes is what the driver gets."""
    layout, size = ring
    queue = make(layout, size, base=position(layout, size, start))
    device = reference_device(queue)
    waiting: dict[int, Buffer] = {}
    taken: list[Chain] = []
    for batches, chance in rounds:
        for batch in batches:
            added: list[tuple[Buffer, list[bytes], list[int]]] = []
            for readable, writable, indirect in batch:
                needs = 1 if indirect else len(readable) + len(writable)
                if queue.free < needs:
                    with pytest.raises(BufferError):
                        queue.add(readable, writable, indirect=indirect)
                    continue
                before = queue.free
                added.append((queue.add(readable, writable, indirect=indirect), readable, writable))
                assert queue.free == before - needs
                assert device.pop() is None  # not published, not a part of it
            queue.publish()
            for token, readable, writable in added:
                chain = device.pop()
                assert chain is not None
                assert chain.head == token.id
                assert [bytes(part) for part in chain.readable] == readable
                assert [len(part) for part in chain.writable] == writable
                waiting[chain.head] = token
                taken.append(chain)
            assert device.pop() is None
        chance.shuffle(taken)
        done = [taken.pop() for _ in range(chance.randint(0, len(taken)))]
        expected = []
        for chain in done:
            data = chance.randbytes(chance.randint(0, chain.room))
            device.put(chain.head, chain.write(data))
            expected.append((waiting.pop(chain.head), data))
        assert queue.poll() == []
        device.publish()
        back = []
        while pieces := queue.poll(max=chance.randint(1, 4)):
            back += pieces
        assert [(token, token.written(length)) for token, length in back] == expected
        assert queue.outstanding == len(waiting)


@every_layout
def test_a_buffer_may_stay_out_for_long(layout: str) -> None:
    """Completion order is free: one buffer stays while the indices go around, in sight of one that is not published."""
    queue = make(layout, 2)
    device = reference_device(queue)
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


@every_layout
@pytest.mark.parametrize("features", [0, EVENT_IDX])
def test_kick_obeys_flags(layout: str, features: int) -> None:
    if layout == "split" and features:
        features = 0  # EVENT_IDX replaces the flags of a split ring, not those of a packed one
    queue = make(layout, 8, features)
    device = reference_device(queue)
    queue.add([b"x"])
    assert queue.kick()  # the first decision always kicks
    assert kicked(queue) == 1
    for wanted in (False, True, False):
        device.want_kicks(wanted)
        queue.add([b"x"])
        assert queue.kick() == wanted
        assert kicked(queue) == wanted
    assert not queue.kick()  # nothing new
    assert queue.kicks == (2, 2)


@pytest.mark.parametrize(("features", "flags"), [(0, 2), (0, 3), (EVENT_IDX, 3), (EVENT_IDX, 0), (0, 0xFFFC)])
def test_kick_with_odd_flags_of_a_packed_device(features: int, flags: int) -> None:
    """DESC without EVENT_IDX and the reserved value ask for everything: a kick too many harms nobody."""
    queue = make("packed", 8, features)
    for _ in range(4):
        queue.device_event[:] = (0x8007, flags)
        queue.add([b"x"])
        assert queue.kick()


@settings(max_examples=400, deadline=None)
@given(
    ring=st.sampled_from([("split", 8), ("packed", 8), ("packed", 5)]),
    start=st.integers(0, 65535),
    steps=st.lists(st.tuples(st.integers(1, 5), st.integers(-5, 5)), min_size=1, max_size=12),
)
def test_kick_obeys_event_idx(ring: tuple[str, int], start: int, steps: list[tuple[int, int]]) -> None:
    """A kick exactly when the places published since the last decision hold the one that the device waits for."""
    layout, size = ring
    queue = make(layout, size, EVENT_IDX, position(layout, size, start))
    device = reference_device(queue)
    first = True
    for count, distance in steps:
        if layout == "packed" and distance + count > size:
            distance = size - count  # a slot is named within a lap of the ring, not further ahead
        device.want_kick(distance)
        for _ in range(count):
            queue.add([b"x"])
        assert queue.kick() == (first or 0 <= distance < count)
        first = False
        device.serve(lambda chain: 0)
        queue.poll()


@every_layout
@pytest.mark.parametrize("size", [4, 8])
@pytest.mark.parametrize("features", [0, EVENT_IDX])
def test_arm_asks_for_a_call(layout: str, features: int, size: int) -> None:
    queue = make(layout, size, features, base=position(layout, size, 65534))
    device = reference_device(queue)
    for count in (2, 1, 3, 2, 4, 4):
        queue.disarm()
        for _ in range(count):
            queue.add([b"x"])
        queue.publish()
        assert not queue.arm()
        device.serve(lambda chain: 0)
        assert device.wants_call()
        assert queue.arm()  # there is work: no call may come
        assert len(queue.poll()) == count


def test_arm_waits_for_one_place_of_a_packed_ring() -> None:
    queue = make("packed", 5, EVENT_IDX)
    device = reference_device(queue)
    for place in (0x8000, 0x8002, 0x8004, 0x0001):
        queue.add([b"x", b"y"])
        queue.publish()
        queue.arm()
        assert queue.driver_event.tolist() == [place, 2]
        device.serve(lambda chain: 0)
        queue.poll()
    queue.disarm()
    assert queue.driver_event[1] == DISABLE


@pytest.mark.parametrize(("layout", "features"), [("split", 0), ("packed", 0), ("packed", EVENT_IDX)])
def test_disarm_asks_for_silence(layout: str, features: int) -> None:
    queue = make(layout, 8, features)
    device = reference_device(queue)
    for _ in range(20):
        queue.arm()
        queue.disarm()
        queue.add([b"x"])
        queue.publish()
        device.serve(lambda chain: 0)
        assert not device.wants_call()
        queue.poll()


@every_layout
def test_wait_sleeps_until_the_call(layout: str) -> None:
    queue = make(layout)
    device = reference_device(queue)
    queue.add([b"x"])
    queue.publish()
    assert not queue.wait(0.01)

    def answer() -> None:
        device.serve(lambda chain: 0)
        os.eventfd_write(queue.call_fd, 1)

    thread = threading.Timer(0.05, answer)
    thread.start()
    assert queue.wait(60)
    thread.join()
    assert len(queue.poll()) == 1
    assert select.select([queue.call_fd], [], [], 0)[0] == []


def test_a_descriptor_made_to_block_holds_nobody_up(harness: ModuleType) -> None:
    """O_NONBLOCK is the peer's to clear, and the signal that was seen the peer's to take away."""
    fd = os.eventfd(3, os.EFD_CLOEXEC)  # blocks
    try:
        harness.drain(fd)
        assert select.select([fd], [], [], 0)[0] == []
        drained = threading.Thread(target=harness.drain, args=(fd,), daemon=True)
        drained.start()
        drained.join(60)
        hangs = drained.is_alive()
        os.eventfd_write(fd, 1)
        assert not hangs
    finally:
        os.close(fd)


def test_wait_ends_in_time_whatever_the_peer_does_to_the_descriptor() -> None:
    queue = make("split")
    queue.add([b"x"])
    queue.publish()
    os.set_blocking(queue.call_fd, True)
    stop = threading.Event()

    def tease() -> None:
        """Signal, and take it back, until somebody has believed it."""
        while not stop.is_set():
            os.eventfd_write(queue.call_fd, 1)
            os.eventfd_read(queue.call_fd) if select.select([queue.call_fd], [], [], 0)[0] else None

    peer = threading.Thread(target=tease, daemon=True)
    peer.start()
    try:
        for _ in range(20):
            begin = time.monotonic()
            assert not queue.wait(0.05)
            assert time.monotonic() - begin < 60
    finally:
        stop.set()
        peer.join(1)


@every_layout
def test_wait_outlasts_calls_for_nothing(layout: str) -> None:
    queue = make(layout)
    device = reference_device(queue)
    queue.add([b"x"])
    queue.publish()
    stop = threading.Event()

    def disturb() -> None:
        while not stop.wait(0.002):
            os.eventfd_write(queue.call_fd, 1)

    thread = threading.Thread(target=disturb)
    thread.start()
    try:
        begin = time.monotonic()
        assert not queue.wait(0.2)
        assert time.monotonic() - begin >= 0.2
        answer = threading.Timer(0.1, lambda: device.serve(lambda chain: 0))
        answer.start()
        assert queue.wait(60)  # woken by the next spare call
        answer.join()
    finally:
        stop.set()
        thread.join()
    assert len(queue.poll()) == 1


# ---- IN_ORDER ----


@settings(max_examples=300, deadline=None)
@given(
    ring=st.sampled_from([("split", 8), ("packed", 8), ("packed", 7)]),
    start=st.sampled_from([0, 4, 65530]),
    rounds=st.lists(
        st.tuples(
            st.lists(st.integers(1, 3), min_size=1, max_size=8),
            st.lists(st.integers(1, 8), min_size=1, max_size=8),
            st.integers(1, 8),
        ),
        max_size=10,
    ),
)
def test_in_order_accepts_batches(
    ring: tuple[str, int], start: int, rounds: list[tuple[list[int], list[int], int]]
) -> None:
    """One element for a batch: all its buffers come back in order, skipped ones as used completely (2.7.9, 2.8.7)."""
    layout, size = ring
    queue = make(layout, size, IN_ORDER, position(layout, size, start))
    device = reference_device(queue)
    for shapes, batches, most in rounds:
        tokens = [queue.add((), [10 + i] * parts) for i, parts in enumerate(shapes) if parts <= queue.free]
        queue.publish()
        chains = [device.pop() for _ in tokens]
        assert device.pop() is None
        left = [(token, chain) for token, chain in zip(tokens, chains, strict=True) if chain is not None]
        expected = []
        for batch in batches:
            group, left = left[:batch], left[batch:]
            if not group:
                break
            *skipped, (last, chain) = group
            device.put(chain.head, 7, [chain for _, chain in skipped])
            expected += [(token, chain.room) for token, chain in skipped] + [(last, 7)]
        for token, chain in left:
            device.put(chain.head, 3)
            expected.append((token, 3))
        device.publish()
        back = []
        while len(back) < len(tokens):
            assert queue.arm()
            back += queue.poll(max=most)  # a batch may be cut anywhere
        assert back == expected
        assert queue.free == size
        assert not queue.arm()


# ---- raw access and misuse ----


def test_raw_views_of_a_split_ring() -> None:
    queue = make("split", 4, EVENT_IDX)
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
    for name in ("driver_event", "device_event"):
        with pytest.raises(AttributeError, match="packed layout"):
            getattr(queue, name)


def test_raw_views_of_a_packed_ring() -> None:
    queue = make("packed", 3)
    memory = queue.memory
    ring, driver, device = queue.guest_addresses
    queue.desc[2] = (0x1122334455667788, 99, 1, 0x8082)
    assert bytes(memory.view(ring + 32, 16)) == bytes.fromhex("8877665544332211 63000000 0100 8280")
    queue.driver_event[:] = (0x0102, 0x0304)
    assert bytes(memory.view(driver, 4)) == b"\x02\x01\x04\x03"
    queue.device_event[:] = (0x0506, 0x0708)
    assert bytes(memory.view(device, 4)) == b"\x06\x05\x08\x07"
    for name in ("avail", "used", "used_head", "avail_event"):
        with pytest.raises(AttributeError, match="split layout"):
            getattr(queue, name)


@every_layout
def test_user_addresses(layout: str) -> None:
    queue = make(layout)
    guest_addr, _, user_addr, *_ = queue.memory.regions[0]
    assert [address - (user_addr - guest_addr) for address in queue.addresses] == list(queue.guest_addresses)
    assert all(address % 16 == 0 for address in queue.addresses)


@pytest.mark.parametrize(
    ("layout", "size"), [(layout, size) for layout in LAYOUTS for size in (0, 32769, 65536, -1)] + [("split", 3)]
)
def test_wrong_sizes(layout: str, size: int) -> None:
    with pytest.raises(ValueError, match="power of two" if size == 3 else "1 to 32768"):
        make(layout, size)


def test_wrong_uses() -> None:
    queue = make("split")
    with pytest.raises(ValueError, match="at least one part"):
        queue.add()
    with pytest.raises(ValueError, match="65535"):
        queue.reset(65536)
    packed = make("packed", 5)
    for base in (5, 0x8005, 0xFFFF):
        with pytest.raises(ValueError, match="slot"):
            packed.reset(base)
    with pytest.raises(ValueError, match="65535"):
        packed.reset(-1)


def test_a_packed_batch_is_one_store() -> None:
    """Of what was added everything stands in the ring but the first descriptor's flags; addresses are kept."""
    queue = make("packed", 4)
    device = reference_device(queue)
    block = queue.memory.alloc(64)
    for lap in range(3):
        before = queue.desc.copy()
        flags = 0x80 if lap % 2 == 0 else 0x8000
        for _ in range(3):
            queue.add([block])
        assert queue.desc["flags"][0] == before["flags"][0]
        assert queue.desc["flags"][1:3].tolist() == [flags, flags]
        assert queue.desc["addr"][:3].tolist() == [block.guest_addr] * 3
        queue.publish()
        assert queue.desc["flags"][0] == flags
        queue.add([block])
        queue.publish()
        assert device.serve(lambda chain: 0) == 4
        assert len(queue.poll()) == 4
