"""A whole back-end under messages in any order, right and wrong: real socket, engine, worker and devices.

Every row of the table is driven. A plain model follows what the core messages do. For all of them holds: exactly one
reply where one is due and none elsewhere, no error of our own in the log, an end to every step, descriptors and
mappings as the state demands after each, and everything as before after the end.
"""

from __future__ import annotations

import gc
import itertools
import os
import time
from collections.abc import Callable
from typing import Any, ClassVar

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

import message_strategies as m
from backend_rig import DEADLINE_S, Errors, Hosted, Talk, Things, machine_settings, mappings, settled
from blk_rig import FLUSH, header
from vhost_rig import open_fds
from vq import virtio as v
from vq.errors import ResourceError
from vq.handle_iotlb import IOTLB_UPDATE
from vq.message import FRONTEND_REQUESTS, Fds, Message, Request, fds_allowed
from vq.payload import VRING_INDEX_MASK, Iotlb, Log, Region, VringAddr, VringState
from vq.postcopy import check_userfault
from vq.session import TRANSITIONS, Silent
from vq_core.driver import DriverQueue
from vq_core.guest_memory import GuestMemory
from waiting import wait_for

pytestmark = pytest.mark.timeout(3600)  # of the long profile
R = Request
LOG_ALL = v.mask(v.VHOST_F_LOG_ALL)
PACKED = v.mask(v.VIRTIO_F_RING_PACKED)
PROTOCOL_ACK = v.mask(v.VHOST_USER_PROTOCOL_F_REPLY_ACK)
ASKING = {R.GET_FEATURES, R.GET_PROTOCOL_FEATURES, R.GET_QUEUE_NUM, R.GET_MAX_MEM_SLOTS, R.GET_STATUS, R.GET_CONFIG}
HARMLESS = ASKING | {
    R.NET_SET_MTU, R.SET_OWNER, R.SEND_RARP, R.SET_STATUS, R.SET_LOG_FD, R.SET_BACKEND_REQ_FD, R.SET_CONFIG,
}  # fmt: skip
# Where the model finds nothing wrong, nothing is.
EXACT = ASKING | {
    R.SET_OWNER, R.RESET_OWNER, R.SET_FEATURES, R.SET_STATUS, R.SET_VRING_NUM, R.SET_VRING_BASE, R.SET_VRING_ENABLE,
    R.GET_VRING_BASE, R.SET_MEM_TABLE, R.ADD_MEM_REG, R.REM_MEM_REG, R.SET_LOG_BASE, R.SET_LOG_FD, R.SET_VRING_CALL,
    R.SET_VRING_ERR, R.RESET_DEVICE,
}  # fmt: skip
# Which of our descriptors belongs to which request.
NATURAL = {
    R.SET_MEM_TABLE: "memory", R.ADD_MEM_REG: "memory", R.REM_MEM_REG: "memory", R.SET_LOG_BASE: "log",
    R.SET_INFLIGHT_FD: "area", R.SET_BACKEND_REQ_FD: "socket", R.SET_DEVICE_STATE_FD: "pipe in",
    R.GPU_SET_SOCKET: "socket",
}  # fmt: skip
request_number = st.sampled_from(sorted(FRONTEND_REQUESTS))
mostly = st.sampled_from([True] * 9 + [False])
# Those that need luck to get anywhere are drawn more often.
RING_MESSAGES = [
    R.SET_VRING_NUM, R.SET_VRING_ADDR, R.SET_VRING_BASE, R.GET_VRING_BASE, R.SET_VRING_KICK, R.SET_VRING_CALL,
    R.SET_VRING_ERR, R.SET_VRING_ENABLE,
]  # fmt: skip
MEMORY_MESSAGES = [R.SET_MEM_TABLE, R.ADD_MEM_REG, R.ADD_MEM_REG, R.REM_MEM_REG, R.SET_LOG_BASE, R.GET_MAX_MEM_SLOTS]
OTHER_MESSAGES = sorted(set(FRONTEND_REQUESTS) - set(RING_MESSAGES) - set(MEMORY_MESSAGES))
unknown_number = st.sampled_from([0, max(FRONTEND_REQUESTS) + 1, 255, 1 << 31, 0xFFFFFFFF])


def test_every_row_has_a_strategy() -> None:
    assert m.missing() == [], "add a line for the codec to tests/message_strategies.py"


class Ring:
    """What the model knows of a ring."""

    def __init__(self) -> None:
        self.num = self.base = 0
        self.started = self.enabled = False
        self.addr: tuple[int, int, int] | None = None
        self.driver: DriverQueue | None = None  # runs it, at the driver's own place in good memory


class Back(RuleBasedStateMachine):
    """The front-end that a back-end must survive, and the model that knows what it has done."""

    kind: ClassVar[str]

    def __init__(self) -> None:
        super().__init__()
        gc.collect()  # of an example that failed everything goes now, and not in the middle of this one
        self.before_fds, self.before_maps = open_fds(), mappings()
        self.errors = Errors()
        self.errors.__enter__()
        self.hosted = Hosted(self.kind)
        self.things = Things()
        self.memory = GuestMemory(m.SIZE, guest_addr=m.GUEST, user_addr=m.USER)
        self.good = Region(*self.memory.regions[0][:4])
        self.idle_fds, self.idle_maps = open_fds(), mappings()
        self.step_began = time.monotonic()
        self.connect()

    def connect(self) -> None:
        self.talk = Talk(self.hosted)
        self.features = self.protocol = 0
        self.features_known = False
        self.regions: list[tuple[Region, int]] = []  # with the inode of their file
        self.log: int | None = None
        self.rings = [Ring() for _ in range(m.RINGS)]
        self.tainted = False  # a message without a model has done something: what rings do is not foreseen any more

    def teardown(self) -> None:
        """Whatever happened: in the end nothing is left."""
        try:
            if self.talk.open:
                self.talk.close()
            self.is_idle()
        finally:
            self.release()
        settled(lambda: None, lambda: self.before_fds)
        assert mappings() == self.before_maps
        assert self.errors.records == []

    def release(self) -> None:
        """Give back what is ours."""
        self.errors.__exit__()
        self.talk.frontend.close()
        self.hosted.close()
        self.things.close()
        self.forget_drivers()
        self.memory.close()
        del self.memory

    def forget_drivers(self) -> None:
        for ring in self.rings:
            if ring.driver is not None:
                ring.driver.close()
                ring.driver = None

    def is_idle(self) -> None:
        """After a connection the process holds what it held before it."""
        self.forget_drivers()
        assert self.hosted.session is None
        assert not any(queue.started for queue in self.hosted.device.queues)
        assert self.hosted.backend.state == "listening"
        settled(self.hosted.serve, lambda: self.idle_fds)
        assert mappings() == self.idle_maps

    # --- One message ----------------------------------------------------------------------------------------------

    def say(
        self, request: int, payload: Any = None, fds: tuple[str, ...] = (), *, ack: bool = True, pieces: int = 1
    ) -> str:
        """Send a message by the table, let the model follow, and give what became of it."""
        assert self.talk.open
        self.step_began = time.monotonic()
        body = FRONTEND_REQUESTS[request].payload.encode(payload)
        known = self.things.fds | {"good": self.memory.regions[0][4]}
        given = [known[name] for name in fds]
        before = self.snapshot()
        wrong = self.wrong(request, payload, given)
        outcome, reply = self.talk.say(request, body, given, ack=ack, pieces=pieces)
        if outcome == "refused":
            assert self.snapshot() == before, "a refused message has changed something"
        if request in EXACT and not wrong and not self.tainted:
            assert outcome in ("done", "answered", "silent"), f"{R(request).name}{payload} is right, and was {outcome}"
        if outcome == "closed":
            self.is_idle()
        else:
            self.follow(request, payload, given, wrong, outcome, reply)
        if reply is not None:
            reply.close()
        return outcome

    def snapshot(self) -> Any:
        """What a refused message must leave alone."""
        session = self.hosted.session
        assert session is not None
        rings = tuple(
            (r.num, r.base, r.addr, r.kick_fd, r.call_fd, r.err_fd, r.started, r.enabled) for r in session.rings
        )
        queues = tuple((queue.started, queue.enabled) for queue in self.hosted.device.queues)
        return session.features, session.protocol_features, session.status, session.regions, rings, queues

    def follow(
        self, request: int, payload: Any, fds: list[int], wrong: str, outcome: str, reply: Message | None
    ) -> None:
        """Change the model as the message has changed the back-end, where it says so or must have done it."""
        if wrong:
            # Not "done", and not without a word unless nobody can be misled by that.
            ignored = outcome == "silent" and TRANSITIONS[request].silent is Silent.IGNORE
            assert outcome == "refused" or ignored, f"{Request(request).name}{payload} was {outcome}, although {wrong}"
            return
        if outcome == "refused":
            return
        act: Callable[..., None] | None = getattr(self, f"do_{Request(request).name.lower()}", None)
        if act is not None:
            act(payload, fds, reply)
        elif request not in HARMLESS:
            self.adopt()

    def adopt(self) -> None:
        """A message without a model has succeeded: take over what the back-end says of itself."""
        session = self.hosted.session
        assert session is not None
        self.tainted = True
        self.regions = [(live.region, live.inode) for live in session.regions]
        for ring, theirs in zip(self.rings, session.rings, strict=True):
            ring.num, ring.base = theirs.num, theirs.base
            ring.started, ring.enabled, ring.driver = theirs.started, theirs.enabled, None

    # --- What is wrong --------------------------------------------------------------------------------------------

    def wrong(self, request: int, payload: Any, fds: list[int]) -> str:
        """Why a message must be refused, as far as the model can tell; empty: it may be right."""
        gate = FRONTEND_REQUESTS[request].gate
        offer = self.hosted.device.offer
        if gate.protocol is not None and not self.protocol >> gate.protocol & 1:
            return "its protocol feature was not negotiated"
        if gate.offered is not None and not offer.features >> gate.offered & 1:
            return "its feature was not offered"
        if request not in TRANSITIONS:
            return "nobody serves it"
        index = self.index_of(request, payload)
        if index is not None and index >= m.RINGS:
            return "there is no such ring"
        check: Callable[..., str] | None = getattr(self, f"wrong_{Request(request).name.lower()}", None)
        return check(payload, fds) if check is not None else ""

    @staticmethod
    def index_of(request: int, payload: Any) -> int | None:
        if request in (R.SET_VRING_KICK, R.SET_VRING_CALL, R.SET_VRING_ERR):
            return int(payload) & VRING_INDEX_MASK
        return int(payload.ring) if isinstance(payload, (VringState, VringAddr)) else None

    def wrong_set_features(self, features: int, _: list[int]) -> str:
        if features & ~self.hosted.device.offer.features:
            return "a bit was not offered"
        running = any(ring.started for ring in self.rings)
        return "a ring runs" if running and (features ^ self.features) & ~LOG_ALL else ""

    def wrong_set_protocol_features(self, features: int, _: list[int]) -> str:
        return "a bit was not offered" if features & ~self.hosted.device.offer.protocol_features else ""

    def wrong_set_status(self, status: int, _: list[int]) -> str:
        return "it has 8 bits" if status > 255 else ""

    def wrong_net_set_mtu(self, mtu: int, _: list[int]) -> str:
        return "" if 68 <= mtu <= 65535 else "the MTU is out of range"

    def wrong_set_vring_num(self, state: VringState, _: list[int]) -> str:
        if self.rings[state.ring].started:
            return "the ring runs"
        if not 1 <= state.num <= 32768:
            return "of the number of entries"
        split = self.features_known and not self.features & PACKED
        return "it is no power of two" if split and state.num & (state.num - 1) else ""

    def wrong_set_vring_base(self, state: VringState, _: list[int]) -> str:
        return "the ring runs" if self.rings[state.ring].started else ""

    def wrong_set_vring_enable(self, state: VringState, _: list[int]) -> str:
        return "" if state.num in (0, 1) else "the number is not 0 or 1"

    def wrong_set_vring_addr(self, addr: VringAddr, _: list[int]) -> str:
        ring = self.rings[addr.ring]
        if addr.desc % 16 or addr.used % 4 or addr.avail % 2:
            return "a part is not aligned"
        if ring.started and ring.addr is not None and (addr.desc, addr.avail, addr.used) != ring.addr:
            return "the ring runs"
        return ""

    def wrong_set_vring_kick(self, word: int, fds: list[int]) -> str:
        ring = self.rings[word & VRING_INDEX_MASK]
        if fds and fds[0] not in (
            self.things.event,
            self.things.pipe[0],
            self.things.fds["socket"],
            *self.driver_fds(),
        ):
            return "the descriptor is no kick"
        if ring.started:
            return ""
        return "the ring is not set up" if not (ring.num and ring.addr and self.regions) else ""

    def wrong_set_vring_call(self, _: int, fds: list[int]) -> str:
        usable = (self.things.event, self.things.pipe[1], *self.driver_fds())
        return "the descriptor is no call" if fds and fds[0] not in usable else ""

    wrong_set_vring_err = wrong_set_vring_call
    wrong_set_log_fd = wrong_set_vring_call

    def driver_fds(self) -> list[int]:
        return [
            fd for ring in self.rings if ring.driver is not None for fd in (ring.driver.kick_fd, ring.driver.call_fd)
        ]

    def wrong_set_backend_req_fd(self, _: None, fds: list[int]) -> str:
        return "" if fds[0] == self.things.fds["socket"] else "it is no socket"

    def wrong_set_mem_table(self, regions: tuple[Region, ...] | int, fds: list[int]) -> str:
        if isinstance(regions, int):
            return "" if self.tainted else "it releases a table of postcopy, and none was sent"
        return self.wrong_regions(list(regions), list(zip(regions, fds, strict=True)))

    def wrong_add_mem_reg(self, region: Region, fds: list[int]) -> str:
        if len(fds) != 1:
            return "it takes one descriptor"
        return self.wrong_regions([*(known for known, _ in self.regions), region], [(region, fds[0])])

    def wrong_regions(self, together: list[Region], new: list[tuple[Region, int]]) -> str:
        for region, fd in new:
            if region.size == 0 or max(region[0], region[2], region[3]) + region.size >= 1 << 64:
                return "a region is empty or passes the end"
            if fd not in (self.things.memory, self.things.log, self.things.area, self.memory.regions[0][4]):
                return "a descriptor is no memory"
            if region.mmap_offset + region.size > os.fstat(fd).st_size:
                return "a region is larger than its file"
        for key in (0, 2):
            spans = sorted((region[key], region[key] + region.size) for region in together)
            if any(end > start for (_, end), (start, _) in itertools.pairwise(spans)):
                return "regions overlap"
        return ""

    def wrong_set_log_base(self, log: Log, fds: list[int]) -> str:
        if fds[0] not in (self.things.memory, self.things.log, self.things.area):
            return "the descriptor is no memory"
        return "" if 0 < log.mmap_size <= m.FILE_BYTES - log.mmap_offset else "it is empty or larger than its file"

    def wrong_rem_mem_reg(self, region: Region, _: list[int]) -> str:
        return "" if any(known[:3] == region[:3] for known, _ in self.regions) else "there is no such region"

    # --- What is done ---------------------------------------------------------------------------------------------

    def do_set_features(self, features: int, *_: object) -> None:
        self.features, self.features_known = features, True
        if not features >> v.VHOST_USER_F_PROTOCOL_FEATURES & 1:
            for ring in self.rings:
                ring.enabled = True

    def do_set_protocol_features(self, features: int, *_: object) -> None:
        self.protocol = features

    def do_iotlb_msg(self, *_: object) -> None:
        """Whatever was said of translations, `use` says anew."""

    def do_set_vring_num(self, state: VringState, *_: object) -> None:
        self.rings[state.ring].num = state.num

    def do_set_vring_base(self, state: VringState, *_: object) -> None:
        self.rings[state.ring].base = state.num

    def do_set_vring_addr(self, addr: VringAddr, *_: object) -> None:
        ring = self.rings[addr.ring]
        ring.addr = addr.desc, addr.avail, addr.used

    def do_set_vring_enable(self, state: VringState, *_: object) -> None:
        self.rings[state.ring].enabled = state.num == 1

    def do_set_vring_kick(self, word: int, fds: list[int], *_: object) -> None:
        ring = self.rings[word & VRING_INDEX_MASK]
        if ring.driver is not None and fds != [ring.driver.kick_fd]:
            ring.driver = None
        ring.started = True

    def do_vring_kick(self, state: VringState, *_: object) -> None:
        self.rings[state.ring].started = True

    def do_get_vring_base(self, state: VringState, fds: list[int], reply: Message) -> None:
        ring = self.rings[state.ring]
        assert reply.payload.ring == state.ring
        assert ring.started or reply.payload.num == ring.base
        ring.base, ring.started, ring.driver = reply.payload.num, False, None

    def do_set_mem_table(self, regions: tuple[Region, ...], fds: list[int], *_: object) -> None:
        self.regions = [(region, os.fstat(fd).st_ino) for region, fd in zip(regions, fds, strict=True)]

    def do_add_mem_reg(self, region: Region, fds: list[int], *_: object) -> None:
        self.regions.append((region, os.fstat(fds[0]).st_ino))

    def do_rem_mem_reg(self, region: Region, *_: object) -> None:
        self.regions = [one for one in self.regions if one[0][:3] != region[:3]]

    def do_set_log_base(self, log: Log, fds: list[int], reply: Message) -> None:
        assert reply.payload == log
        self.log = os.fstat(fds[0]).st_ino

    def do_reset_owner(self, *_: object) -> None:
        for ring in self.rings:
            ring.enabled = False

    def do_reset_device(self, *_: object) -> None:
        self.rings = [Ring() for _ in self.rings]

    def do_set_vring_call(self, *_: object) -> None:
        pass

    do_set_vring_err = do_set_vring_call

    # --- Rules ----------------------------------------------------------------------------------------------------

    def connected(self) -> bool:
        return self.talk.open

    @initialize(acks=st.sampled_from([True, True, True, False]))
    def begin(self, acks: bool) -> None:
        """With acks every refusal can be told; without, many of them end the connection."""
        if acks:
            self.negotiate()

    @rule(request=request_number, data=st.data(), ack=mostly)
    @precondition(connected)
    def any_message(self, request: int, data: st.DataObject, ack: bool) -> None:
        """A row of the table: usually with what belongs to it, sometimes with other descriptors or in pieces."""
        payload = data.draw(m.payload_of(request))
        if request == R.REM_MEM_REG and self.regions and data.draw(mostly):
            payload = data.draw(st.sampled_from([region for region, _ in self.regions]))
        allowed = fds_allowed(FRONTEND_REQUESTS[request].fds, payload)
        usual = 1 if FRONTEND_REQUESTS[request].fds is Fds.HANDLER and request in NATURAL else allowed[0]
        natural = NATURAL.get(R(request), "event")
        fds: tuple[str, ...] = (natural,) * usual
        if data.draw(st.integers(0, 9)) == 0:
            fds = tuple(data.draw(st.lists(st.sampled_from(sorted(self.things.fds)), max_size=3)))
        if len(fds) not in allowed:
            self.misframed(request, payload, fds, ack)
        else:
            self.say(request, payload, fds, ack=ack, pieces=data.draw(st.sampled_from([1, 1, 1, 2, 5])))

    @rule(request=st.sampled_from(RING_MESSAGES), data=st.data(), ack=mostly)
    @precondition(connected)
    def ring_message(self, request: int, data: st.DataObject, ack: bool) -> None:
        self.any_message(request, data, ack)

    @rule(request=st.sampled_from(MEMORY_MESSAGES), data=st.data(), ack=mostly)
    @precondition(connected)
    def memory_message(self, request: int, data: st.DataObject, ack: bool) -> None:
        self.any_message(request, data, ack)

    @rule(request=st.sampled_from(OTHER_MESSAGES), data=st.data(), ack=mostly)
    @precondition(connected)
    def other_message(self, request: int, data: st.DataObject, ack: bool) -> None:
        self.any_message(request, data, ack)

    def misframed(self, request: int, payload: Any, fds: tuple[str, ...], ack: bool) -> None:
        """A message with a wrong number of descriptors ends the connection, whatever it says."""
        body = FRONTEND_REQUESTS[request].payload.encode(payload)
        outcome, _ = self.talk.say(request, body, [self.things.fds[name] for name in fds], ack=ack)
        assert outcome == "closed"
        self.is_idle()

    @rule(
        request=st.sampled_from([0, 46, 47, 255, 1 << 31, 0xFFFFFFFF]), ack=st.booleans(), body=st.binary(max_size=64)
    )
    @precondition(connected)
    def unknown_message(self, request: int, ack: bool, body: bytes) -> None:
        before = self.snapshot()
        outcome, _ = self.talk.say(request, body, [self.things.event], ack=ack)
        acked = ack and bool(self.protocol & PROTOCOL_ACK) and request != 0
        assert outcome == ("refused" if acked else "closed")
        if outcome == "closed":
            self.is_idle()
        else:
            assert self.snapshot() == before

    def noise(self, data: bytes, fds: int) -> None:
        """Bytes that mean nothing, and then the end: of a message that is right by chance nothing is expected."""
        self.talk.send(data, [self.things.event] * fds)
        self.leave()

    @rule()
    @precondition(lambda self: self.connected() and not self.protocol & PROTOCOL_ACK)
    def negotiate(self) -> None:
        self.say(R.SET_PROTOCOL_FEATURES, self.hosted.device.offer.protocol_features & ~LEFT_OUT)
        assert self.protocol & PROTOCOL_ACK

    @rule()
    @precondition(lambda self: self.connected() and not self.has_good_memory())
    def share(self) -> None:
        """The memory that works, alone."""
        self.say(R.SET_MEM_TABLE, (self.good,), ("good",))

    @rule()
    @precondition(lambda self: self.connected() and self.log is None and self.talk.logs_by_fd())
    def give_log(self) -> None:
        self.say(R.SET_LOG_BASE, Log(m.FILE_BYTES, 0), ("log",))

    @rule(
        packed=st.booleans(), iommu=st.booleans(), more=st.sets(st.integers(0, 63), max_size=3), first=st.integers(0, 1)
    )
    @precondition(lambda self: self.connected() and not self.tainted)
    def start_properly(self, packed: bool, iommu: bool, more: set[int], first: int) -> None:
        """Start all rings of a request or of a pair, as a driver does; a pair of the network in either order."""
        if not self.protocol & PROTOCOL_ACK:
            self.negotiate()
        if any(ring.started for ring in self.rings):
            return
        offered = self.hosted.device.offer.features
        wanted = (m.SPLIT | v.mask(*more)) & offered & ~IOMMU & ~PACKED
        wanted |= (PACKED if packed else 0) | (IOMMU & offered if iommu else 0)
        assert self.say(R.SET_FEATURES, wanted) == "done"
        if not self.has_good_memory():
            self.share()
        for index in self.used_rings()[:: -1 if first else 1]:
            ring = self.rings[index]
            ring.driver = None
            driver = DriverQueue(self.memory, 16, features=self.features)
            desc, avail, used = driver.guest_addresses if self.features & IOMMU else driver.addresses
            assert self.say(R.SET_VRING_NUM, VringState(index, 16)) == "done"
            assert self.say(R.SET_VRING_BASE, VringState(index, 0x8000 if packed else 0)) == "done"
            assert self.say(R.SET_VRING_ADDR, VringAddr(index, 0, desc, used, avail, 0)) == "done"
            ring.driver = driver
            self.kick_of(index)
            assert self.say(R.SET_VRING_ENABLE, VringState(index, 1)) == "done"

    def kick_of(self, index: int) -> None:
        driver = self.rings[index].driver
        assert driver is not None
        outcome, _ = self.talk.say(
            R.SET_VRING_KICK, FRONTEND_REQUESTS[R.SET_VRING_KICK].payload.encode(index), [driver.kick_fd], ack=True
        )
        assert outcome == "done"
        self.rings[index].started = True

    def has_good_memory(self) -> bool:
        return any(region == self.good for region, _ in self.regions)

    def used_rings(self) -> list[int]:
        return [0] if self.kind == "blk" else [0, 1]

    def runs(self) -> bool:
        """Whether rings started by `start_properly` must work now."""
        ready = all(
            ring.driver is not None and ring.started and ring.enabled
            for ring in (self.rings[index] for index in self.used_rings())
        )
        return self.connected() and self.has_good_memory() and ready and not self.tainted

    @rule()
    @precondition(runs)
    def use(self) -> None:
        """Something moves over the rings and is right."""
        self.step_began = time.monotonic()
        if self.features & IOMMU:  # what the driver knows as guest addresses are I/O virtual
            everything = Iotlb(self.good.guest_addr, self.good.size, self.good.user_addr, 3, IOTLB_UPDATE)
            assert self.say(R.IOTLB_MSG, everything) == "done"
        drivers = [ring.driver for ring in self.rings if ring.driver is not None]
        if self.kind != "blk":
            receiveq, transmitq = drivers
            data = os.urandom(48)
            receiveq.add(writable=[12 + 48])
            receiveq.kick()
            transmitq.add([bytes(12) + data])
            transmitq.kick()
            ((buffer, length),) = wait_for(receiveq.poll, DEADLINE_S)
            assert buffer.written(length)[12:] == data
            wait_for(transmitq.poll, DEADLINE_S)
        else:
            (queue,) = drivers
            buffer = queue.add([header(FLUSH)], [1])
            queue.publish()
            queue.kick()
            wait_for(queue.poll, DEADLINE_S)
            assert bytes(buffer.writable[0]) == b"\0"

    def stop_all(self) -> None:
        for index, ring in enumerate(self.rings):
            if ring.started and self.connected():
                self.say(R.GET_VRING_BASE, VringState(index, 0))

    def second_connection(self) -> None:
        """It is closed at once, and the first one notices nothing."""
        before = self.snapshot()
        second = Talk(self.hosted)
        assert second.frontend.wait_closed(DEADLINE_S)
        second.frontend.close()
        assert self.snapshot() == before

    def leave(self) -> None:
        if self.talk.open:
            self.talk.close()
        self.is_idle()

    @rule(acks=mostly)
    @precondition(lambda self: not self.talk.open)
    def come_again(self, acks: bool) -> None:
        self.connect()
        self.begin(acks)

    # --- What always holds ----------------------------------------------------------------------------------------

    @invariant()
    def nothing_of_ours_went_wrong(self) -> None:
        assert self.errors.records == []
        assert time.monotonic() - self.step_began < DEADLINE_S, "the step took too long"
        self.step_began = time.monotonic()

    @invariant()
    def the_session_is_as_the_model_says(self) -> None:
        session = self.hosted.session
        assert (session is not None) == self.talk.open
        if session is None:
            return
        assert (session.features, session.protocol_features) == (self.features, self.protocol)
        assert [ring.started for ring in session.rings] == [ring.started for ring in self.rings]
        assert [ring.enabled for ring in session.rings] == [ring.enabled for ring in self.rings]
        assert [ring.num for ring in session.rings] == [ring.num for ring in self.rings]
        known = [(live.region, live.inode) for live in session.regions]
        assert sorted(known) == sorted(self.regions)

    @invariant()
    def the_engine_is_as_the_session_says(self) -> None:
        session, applier = self.hosted.session, self.hosted.backend._applier
        if session is None or applier is None:
            return
        for ring, queue in zip(session.rings, self.hosted.device.queues, strict=True):
            # Its memory was taken away: it stands until that is there again, and the session need not know.
            waits = ring.index in applier.waiting
            assert queue.started == (ring.started and not waits) or self.lost_its_place(ring.index)
            assert not queue.started or queue.enabled == ring.enabled
        mapped = [] if applier.memory is None else list(applier.memory.regions)
        assert sorted(mapped) == sorted(live.region[:3] for live in session.regions)
        assert (applier.log is not None) == session.has_log == (self.log is not None)

    def lost_its_place(self, index: int) -> bool:
        """A ring that was broken when its memory went away waits for the front-end to stop it."""
        applier = self.hosted.backend._applier
        return applier is not None and index in applier.rings and self.rings[index].started

    @invariant()
    def descriptors_are_accounted_for(self) -> None:
        if not self.talk.open:
            return
        settled(self.hosted.serve, self.held)

    def held(self) -> dict[int, str]:
        """What the process may hold now, beside what it does without a connection."""
        now = open_fds()
        more = {self.talk.frontend.fileno(), *self.driver_fds(), *(self.hosted.owned() - set(self.idle_fds))}
        return self.idle_fds | {fd: now[fd] for fd in more if fd in now}

    @invariant()
    def descriptors_of_rings_are_open(self) -> None:
        session, now = self.hosted.session, open_fds()
        for ring in session.rings if session is not None else ():
            owned = {fd for fd in (ring.kick_fd, ring.call_fd, ring.err_fd) if fd is not None}
            assert owned <= set(now) - set(self.idle_fds)

    @invariant()
    def mappings_are_accounted_for(self) -> None:
        if not self.talk.open or self.tainted:
            return
        expected = dict(self.idle_maps)
        for inode in [*(inode for _, inode in self.regions), *([self.log] if self.log is not None else [])]:
            expected[inode] = expected.get(inode, 0) + 1
        assert mappings() == expected


# The first is drawn now and then, since it needs a back-end channel; the second is another meaning of ring addresses.
LEFT_OUT = v.mask(v.VHOST_USER_PROTOCOL_F_INBAND_NOTIFICATIONS, v.VHOST_USER_PROTOCOL_F_GPA_ADDRESSES)
IOMMU = v.mask(v.VIRTIO_F_ACCESS_PLATFORM)


class NetBack(Back):
    kind = "net"


class BlkBack(Back):
    kind = "blk"


def userfaultfd_is_permitted() -> bool:
    try:
        check_userfault()
    except ResourceError:
        return False
    return True


class PostcopyBack(Back):
    kind = "postcopy"


SETTINGS = machine_settings(25)
TestNet = NetBack.TestCase
TestNet.settings = SETTINGS
TestBlk = BlkBack.TestCase
TestBlk.settings = SETTINGS
TestPostcopy = PostcopyBack.TestCase
TestPostcopy.settings = SETTINGS
TestPostcopy.pytestmark = [
    pytest.mark.skipif(not userfaultfd_is_permitted(), reason="userfaultfd is not permitted here")
]
