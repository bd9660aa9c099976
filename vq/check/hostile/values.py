"""Messages of the right form with values that are wrong."""

from __future__ import annotations

import struct

from vq import virtio as v
from vq.check.cases import each
from vq.check.guest import BASIC_PROTOCOL
from vq.check.outcome import Failed
from vq.check.registry import check
from vq.check.target import Target
from vq.check.verdict import Verdict, harmless, refusal, say
from vq.message import FRONTEND_REQUESTS, Request
from vq.payload import Inflight, Log, VringAddr, VringState

ACK = (v.VHOST_USER_PROTOCOL_F_REPLY_ACK,)
R = Request
TYPES = "vhost-user, Front-end message types: "
INDICES = (255, 256, 65535, 65536, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF)


@check("vhost-user, Feature bits", protocol=ACK)
def features_not_offered(target: Target) -> str:
    """SET_FEATURES with a bit that was not offered is refused."""
    absent = [bit for bit in (33, 34, 35, 36, 63) if not v.has(target.features, bit)]

    def act(bit: int) -> str:
        with target.negotiate() as frontend:
            return refusal(frontend, R.SET_FEATURES, frontend.features | v.mask(bit))

    return each(target, {f"bit {bit}": bit for bit in absent}, act)


@check("vhost-user, Protocol features", protocol=ACK)
def protocol_features_not_offered(target: Target) -> str:
    """SET_PROTOCOL_FEATURES with a bit that was not offered is refused."""
    with target.negotiate() as frontend:
        return refusal(frontend, R.SET_PROTOCOL_FEATURES, frontend.protocol_features | 1 << 63)


@check("vhost-user, A vring state description", protocol=ACK)
def ring_indices(target: Target) -> str:
    """A ring that does not exist, in every message with an index, also one that becomes small when it is cut."""

    def act(case: tuple[Request, int]) -> str:
        request, index = case
        with target.guest() as guest:
            payload = VringAddr(index, 0, 0, 0, 0, 0) if request == R.SET_VRING_ADDR else VringState(index, 1)
            return refusal(guest.frontend, request, payload)

    requests = (R.SET_VRING_NUM, R.SET_VRING_BASE, R.SET_VRING_ADDR, R.SET_VRING_ENABLE, R.GET_VRING_BASE)
    return each(target, {f"{r.name} of ring {index:#x}": (r, index) for r in requests for index in INDICES}, act)


@check(TYPES + "SET_VRING_NUM", protocol=ACK)
def ring_sizes(target: Target) -> str:
    """A size of 0, above 32768, no power of two, or one that becomes right when it is cut, starts no ring."""

    def act(num: int) -> str:
        with target.guest(running=False) as guest:
            guest.share()
            verdict = say(guest.frontend, R.SET_VRING_NUM, VringState(guest.victim, num))
            if verdict is not Verdict.DONE:
                return verdict
            # Some look at it only when the ring starts.
            setup = guest.setup(guest.victim)
            addr = VringAddr(setup.index, 0, setup.desc, setup.used, setup.avail, 0)
            said = [say(guest.frontend, R.SET_VRING_ADDR, addr)]
            if said[-1] is not Verdict.CLOSED:
                said.append(say(guest.frontend, R.SET_VRING_KICK, guest.victim, [guest.queues[guest.victim].kick_fd]))
            if all(verdict is Verdict.DONE for verdict in said):
                raise Failed("the ring starts")
            return f"{said[-1]} later"

    numbers = (0, 3, 65535, 65536, 65537, 0x10040, 1 << 31, 0xFFFFFFFF)
    return each(target, {f"{num:#x} entries": num for num in numbers}, act)


@check(TYPES + "SET_VRING_ENABLE", protocol=ACK)
def enable_values(target: Target) -> str:
    """SET_VRING_ENABLE with something else than 0 and 1 does no harm."""
    with target.guest() as guest:
        return harmless(guest.frontend, R.SET_VRING_ENABLE, VringState(guest.victim, 0xFFFFFFFF))


@check(TYPES + "SET_VRING_BASE", protocol=ACK)
def packed_base(target: Target) -> str:
    """A base outside a packed ring does not start it, or is not used."""
    if not v.has(target.features, v.VIRTIO_F_RING_PACKED):
        return "no packed rings"

    def act(base: int) -> str:
        with target.guest(layout="packed", running=False) as guest:
            guest.share()
            setup = guest.setup(guest.victim)
            addr = VringAddr(setup.index, 0, setup.desc, setup.used, setup.avail, 0)
            said = Verdict.DONE
            for request, payload, fds in (
                (R.SET_VRING_NUM, VringState(setup.index, setup.num), []),
                (R.SET_VRING_BASE, VringState(setup.index, base), []),
                (R.SET_VRING_ADDR, addr, []),
                (R.SET_VRING_KICK, setup.index, [guest.queues[setup.index].kick_fd]),
                (R.SET_VRING_ENABLE, VringState(setup.index, 1), []),
            ):
                if said is Verdict.DONE:
                    said = say(guest.frontend, request, payload, fds)
            return guest.aftermath(guest.raw()) if said is Verdict.DONE else said

    return each(target, {f"{base:#x}": base for base in (64, 0x7FFF, 0xFFFF, 0x7FFF7FFF)}, act)


@check("vhost-user, Ring states", protocol=ACK)
def running_ring_moves(target: Target) -> str:
    """Another size or base for a ring that runs does no harm."""

    def act(case: tuple[Request, int]) -> str:
        request, value = case
        with target.guest() as guest:
            return harmless(guest.frontend, request, VringState(guest.victim, value))

    return each(target, {"size": (R.SET_VRING_NUM, 1024), "base": (R.SET_VRING_BASE, 60000)}, act)


@check(TYPES + "SET_STATUS", protocol=(*ACK, v.VHOST_USER_PROTOCOL_F_STATUS))
def status(target: Target) -> str:
    """A status of more than 8 bits does no harm."""
    with target.negotiate() as frontend:
        return harmless(frontend, R.SET_STATUS, 0xFFFF_FFFF_FFFF_FF00)


@check(TYPES + "SET_LOG_BASE", protocol=(v.VHOST_USER_PROTOCOL_F_LOG_SHMFD,))
def log(target: Target) -> str:
    """A log without bytes, larger than its file, or whose end overflows."""
    wanted = BASIC_PROTOCOL | v.mask(v.VHOST_USER_PROTOCOL_F_LOG_SHMFD)
    cases = {
        "no bytes": Log(0, 0), "past the file": Log(1 << 30, 0), "offset past the file": Log(4096, 1 << 30),
        "overflow": Log(0xFFFFFFFFFFFFF000, 0x2000), "all": Log((1 << 64) - 1, 0),
    }  # fmt: skip

    def act(case: Log) -> str:
        with target.guest(protocol=wanted) as guest:
            fd = guest.memory.regions[1][4]
            return harmless(guest.frontend, R.SET_LOG_BASE, case, [fd])

    return each(target, cases, act)


@check("vhost-user, Inflight I/O tracking", protocol=(*ACK, v.VHOST_USER_PROTOCOL_F_INFLIGHT_SHMFD))
def inflight(target: Target) -> str:
    """In-flight regions that are too small for what they say, or say nothing."""
    wanted = BASIC_PROTOCOL | v.mask(v.VHOST_USER_PROTOCOL_F_INFLIGHT_SHMFD)
    cases = {
        "no bytes": Inflight(0, 0, 1, 64), "no queues": Inflight(4096, 0, 0, 64),
        "many": Inflight(4096, 0, 65535, 65535), "past the file": Inflight(1 << 40, 0, 1, 64),
        "overflow": Inflight(1 << 63, 1 << 63, 1, 64),
    }  # fmt: skip

    def act(case: Inflight) -> str:
        with target.guest(protocol=wanted, running=False) as guest:
            fd = guest.memory.regions[1][4]
            return refusal(guest.frontend, R.SET_INFLIGHT_FD, case, [fd])

    return each(target, cases, act)


@check("vhost-user, Inflight I/O tracking", protocol=(v.VHOST_USER_PROTOCOL_F_INFLIGHT_SHMFD,))
def inflight_counts(target: Target) -> str:
    """GET_INFLIGHT_FD of the largest counts, several times, is bounded."""
    wanted = BASIC_PROTOCOL | v.mask(v.VHOST_USER_PROTOCOL_F_INFLIGHT_SHMFD)

    def act(case: Inflight) -> str:
        with target.guest(protocol=wanted, running=False) as guest:
            verdict = ""
            for _ in range(5):
                verdict = harmless(guest.frontend, R.GET_INFLIGHT_FD, case)
                if verdict != Verdict.ANSWERED:
                    break
            return verdict

    return each(target, {"largest": Inflight(0, 0, 65535, 65535), "none": Inflight(0, 0, 0, 0)}, act)


@check(TYPES + "GET_CONFIG, SET_CONFIG", protocol=(v.VHOST_USER_PROTOCOL_F_CONFIG,))
def config(target: Target) -> str:
    """Offsets and sizes that leave the configuration space, also by overflow, or contradict the payload."""
    wanted = BASIC_PROTOCOL | v.mask(v.VHOST_USER_PROTOCOL_F_CONFIG)
    cases = {
        f"{request.name}: {size} bytes at {offset:#x}, {have} in the payload": (request, offset, size, have)
        for request in (R.GET_CONFIG, R.SET_CONFIG)
        for offset, size, have in (
            (0xFFFFFFFF, 1, 1), (0xFFFFFFF0, 32, 32), (250, 100, 100), (0, 257, 257), (0, 0xFFFFFFFF, 4), (0, 100, 4),
        )
    }  # fmt: skip

    def act(case: tuple[Request, int, int, int]) -> str:
        request, offset, size, have = case
        with target.negotiate(protocol=wanted) as frontend:
            return harmless(frontend, request, struct.pack("=III", offset, size, 0) + bytes(have))

    return each(target, cases, act)


@check("vhost-user, Protocol features")
def not_negotiated(target: Target) -> str:
    """Requests whose feature was not negotiated do no harm."""
    requests = (
        R.SET_LOG_FD, R.GET_QUEUE_NUM, R.SEND_RARP, R.NET_SET_MTU, R.SET_BACKEND_REQ_FD, R.IOTLB_MSG,
        R.SET_VRING_ENDIAN, R.GET_CONFIG, R.SET_CONFIG, R.CREATE_CRYPTO_SESSION, R.CLOSE_CRYPTO_SESSION,
        R.POSTCOPY_ADVISE, R.POSTCOPY_LISTEN, R.POSTCOPY_END, R.GET_INFLIGHT_FD, R.SET_INFLIGHT_FD, R.GPU_SET_SOCKET,
        R.VRING_KICK, R.GET_MAX_MEM_SLOTS, R.ADD_MEM_REG, R.REM_MEM_REG, R.GET_SHARED_OBJECT, R.SET_DEVICE_STATE_FD,
        R.CHECK_DEVICE_STATE, R.GET_SHMEM_CONFIG, R.GET_VRING_BASE_SKIP_DRAIN,
    )  # fmt: skip

    def act(request: Request) -> str:
        with target.negotiate(protocol=v.mask(*ACK)) as frontend:
            return harmless(frontend, request, bytes(_size(request)))

    return each(target, {request.name: request for request in requests}, act)


def _size(request: Request) -> int:
    """A payload size that is right for a request."""
    codec = FRONTEND_REQUESTS[request].payload
    return next(size for size in range(4096) if codec.fits(size))
