"""The wire format: every message of both directions in one table, encoding and decoding; no I/O.

A message is a 12-byte header `request, flags, size` and `size` bytes of payload (`vq.payload`), all in host byte order.
Fds travel with the first byte of the header. `FRONTEND_REQUESTS` and `BACKEND_REQUESTS` say for each request what its
payload is, how many fds come with it, what answers it, and which feature must have been negotiated.

Everything here checks form only: header bits, sizes, counts. What a value may be is the business of the session.

Spec: vhost-user, "Message Specification", "Front-end message types", "Back-end message types".
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from enum import IntEnum
from typing import Any, Final, NamedTuple

from vq import virtio as v
from vq.errors import FrontendError, PeerError
from vq.payload import (
    CONFIG,
    CONFIG_REPLY,
    EMPTY,
    INFLIGHT,
    IOTLB,
    LOG_OR_WORD,
    LOG_REPLY,
    MEM_SINGLE,
    MMAP,
    PAYLOAD_MAX,
    RAW,
    SHMEM_CONFIG,
    TABLE_OR_WORD,
    TRANSFER,
    U64,
    UUID,
    VRING_ADDR,
    VRING_AREA,
    VRING_NOFD_MASK,
    VRING_STATE,
    Codec,
    Log,
)
from vq.reaper import close_fd

HEADER: Final = struct.Struct("=III")
FDS_MAX: Final = 32

VERSION: Final = 1
VERSION_MASK: Final = 0x3
REPLY: Final = 1 << 2
NEED_REPLY: Final = 1 << 3
_KNOWN_FLAGS: Final = VERSION_MASK | REPLY | NEED_REPLY
REPLY_FLAGS: Final = VERSION | REPLY  # front-ends compare for equality, so a reply never carries NEED_REPLY


class Request(IntEnum):
    """Requests of the front-end; the specification writes VHOST_USER_ before each name."""

    GET_FEATURES = 1
    SET_FEATURES = 2
    SET_OWNER = 3
    RESET_OWNER = 4
    SET_MEM_TABLE = 5
    SET_LOG_BASE = 6
    SET_LOG_FD = 7
    SET_VRING_NUM = 8
    SET_VRING_ADDR = 9
    SET_VRING_BASE = 10
    GET_VRING_BASE = 11
    SET_VRING_KICK = 12
    SET_VRING_CALL = 13
    SET_VRING_ERR = 14
    GET_PROTOCOL_FEATURES = 15
    SET_PROTOCOL_FEATURES = 16
    GET_QUEUE_NUM = 17
    SET_VRING_ENABLE = 18
    SEND_RARP = 19
    NET_SET_MTU = 20
    SET_BACKEND_REQ_FD = 21
    IOTLB_MSG = 22
    SET_VRING_ENDIAN = 23
    GET_CONFIG = 24
    SET_CONFIG = 25
    CREATE_CRYPTO_SESSION = 26
    CLOSE_CRYPTO_SESSION = 27
    POSTCOPY_ADVISE = 28
    POSTCOPY_LISTEN = 29
    POSTCOPY_END = 30
    GET_INFLIGHT_FD = 31
    SET_INFLIGHT_FD = 32
    GPU_SET_SOCKET = 33
    RESET_DEVICE = 34
    VRING_KICK = 35
    GET_MAX_MEM_SLOTS = 36
    ADD_MEM_REG = 37
    REM_MEM_REG = 38
    SET_STATUS = 39
    GET_STATUS = 40
    GET_SHARED_OBJECT = 41
    SET_DEVICE_STATE_FD = 42
    CHECK_DEVICE_STATE = 43
    GET_SHMEM_CONFIG = 44
    GET_VRING_BASE_SKIP_DRAIN = 45


class BackendRequest(IntEnum):
    """Requests of the back-end on its own channel; the specification writes VHOST_USER_BACKEND_ before each name."""

    IOTLB_MSG = 1
    CONFIG_CHANGE_MSG = 2
    VRING_HOST_NOTIFIER_MSG = 3
    VRING_CALL = 4
    VRING_ERR = 5
    SHARED_OBJECT_ADD = 6
    SHARED_OBJECT_REMOVE = 7
    SHARED_OBJECT_LOOKUP = 8
    SHMEM_MAP = 9
    SHMEM_UNMAP = 10


# --- How many fds -----------------------------------------------------------------------------------------------------


class Fds(IntEnum):
    """How many fds belong to a message."""

    NONE = 0
    ONE = 1
    EACH_REGION = 2
    UNLESS_NOFD = 3  # one, or none if the payload says VRING_NOFD_MASK
    WITH_LOG = 4  # one, or none with the short payload of old front-ends
    OPTIONAL = 5
    HANDLER = 6  # the handler decides: a wrong count is a nack there, not a broken stream


def fds_allowed(rule: Fds, payload: Any) -> range:
    """Give the counts of fds that may come with a payload."""
    match rule:
        case Fds.NONE:
            few = many = 0
        case Fds.ONE:
            few = many = 1
        case Fds.EACH_REGION:
            few = many = 0 if isinstance(payload, int) else len(payload)
        case Fds.UNLESS_NOFD:
            word = payload if isinstance(payload, int) else payload.word
            few = many = 0 if word & VRING_NOFD_MASK else 1
        case Fds.WITH_LOG:
            few = many = 1 if isinstance(payload, Log) else 0
        case Fds.OPTIONAL:
            few, many = 0, 1
        case Fds.HANDLER:
            few, many = 0, FDS_MAX
    return range(few, many + 1)


# --- The table --------------------------------------------------------------------------------------------------------


class Gate(NamedTuple):
    """What must hold before a request is legal: bit numbers, None = nothing.

    `offered` is a virtio feature that the back-end offered; offered and not acknowledged, because QEMU sends
    NET_SET_MTU, and everybody the protocol feature messages, before SET_FEATURES.
    """

    protocol: int | None = None
    offered: int | None = None


class Rule(NamedTuple):
    """One row of the table.

    Parameters
    ----------
    payload
        Codec of the request's payload.
    fds
        How many fds come with it.
    reply
        Codec of the reply's payload if the request is always answered; None = only an ack (u64) when asked.
    gate
        What must have been negotiated.
    ack_always
        Front-ends wait for this ack whether or not REPLY_ACK was negotiated.
    postcopy_reply
        Codec of a reply that is only due in a postcopy migration, and of an ack at other times.
    """

    payload: Codec
    fds: Fds = Fds.NONE
    reply: Codec | None = None
    gate: Gate = Gate()
    ack_always: bool = False
    postcopy_reply: Codec | None = None


R = Request
_PF30 = Gate(offered=v.VHOST_USER_F_PROTOCOL_FEATURES)
_MQ = Gate(v.VHOST_USER_PROTOCOL_F_MQ)
_CONFIG_GATE = Gate(v.VHOST_USER_PROTOCOL_F_CONFIG)
_CRYPTO = Gate(v.VHOST_USER_PROTOCOL_F_CRYPTO_SESSION)
_PAGEFAULT = Gate(v.VHOST_USER_PROTOCOL_F_PAGEFAULT)
_INFLIGHT_GATE = Gate(v.VHOST_USER_PROTOCOL_F_INFLIGHT_SHMFD)
_SLOTS = Gate(v.VHOST_USER_PROTOCOL_F_CONFIGURE_MEM_SLOTS)
_STATUS = Gate(v.VHOST_USER_PROTOCOL_F_STATUS)
_INBAND = Gate(v.VHOST_USER_PROTOCOL_F_INBAND_NOTIFICATIONS)
_SHARED = Gate(v.VHOST_USER_PROTOCOL_F_SHARED_OBJECT)
_STATE = Gate(v.VHOST_USER_PROTOCOL_F_DEVICE_STATE)
_SHMEM = Gate(v.VHOST_USER_PROTOCOL_F_SHMEM)
_IOMMU = Gate(offered=v.VIRTIO_F_ACCESS_PLATFORM)

FRONTEND_REQUESTS: Final[dict[int, Rule]] = {
    R.GET_FEATURES: Rule(EMPTY, reply=U64),
    R.SET_FEATURES: Rule(U64),
    R.SET_OWNER: Rule(EMPTY),
    R.RESET_OWNER: Rule(EMPTY),
    R.SET_MEM_TABLE: Rule(TABLE_OR_WORD, Fds.EACH_REGION, postcopy_reply=TABLE_OR_WORD),
    R.SET_LOG_BASE: Rule(LOG_OR_WORD, Fds.WITH_LOG, LOG_REPLY, Gate(v.VHOST_USER_PROTOCOL_F_LOG_SHMFD)),
    R.SET_LOG_FD: Rule(EMPTY, Fds.ONE),
    R.SET_VRING_NUM: Rule(VRING_STATE),
    R.SET_VRING_ADDR: Rule(VRING_ADDR),
    R.SET_VRING_BASE: Rule(VRING_STATE),
    R.GET_VRING_BASE: Rule(VRING_STATE, reply=VRING_STATE),
    R.SET_VRING_KICK: Rule(U64, Fds.UNLESS_NOFD),
    R.SET_VRING_CALL: Rule(U64, Fds.UNLESS_NOFD),
    R.SET_VRING_ERR: Rule(U64, Fds.UNLESS_NOFD),
    R.GET_PROTOCOL_FEATURES: Rule(EMPTY, reply=U64, gate=_PF30),
    R.SET_PROTOCOL_FEATURES: Rule(U64, gate=_PF30),
    R.GET_QUEUE_NUM: Rule(EMPTY, reply=U64, gate=_MQ),
    R.SET_VRING_ENABLE: Rule(VRING_STATE, gate=_PF30),
    R.SEND_RARP: Rule(U64, gate=Gate(v.VHOST_USER_PROTOCOL_F_RARP)),
    R.NET_SET_MTU: Rule(U64, gate=Gate(v.VHOST_USER_PROTOCOL_F_MTU, v.VIRTIO_NET_F_MTU)),
    R.SET_BACKEND_REQ_FD: Rule(EMPTY, Fds.ONE, gate=Gate(v.VHOST_USER_PROTOCOL_F_BACKEND_REQ)),
    R.IOTLB_MSG: Rule(IOTLB, gate=_IOMMU, ack_always=True),
    R.SET_VRING_ENDIAN: Rule(VRING_STATE, gate=Gate(v.VHOST_USER_PROTOCOL_F_CROSS_ENDIAN)),
    R.GET_CONFIG: Rule(CONFIG, reply=CONFIG_REPLY, gate=_CONFIG_GATE),
    R.SET_CONFIG: Rule(CONFIG, gate=_CONFIG_GATE),
    R.CREATE_CRYPTO_SESSION: Rule(RAW, reply=RAW, gate=_CRYPTO),
    R.CLOSE_CRYPTO_SESSION: Rule(U64, gate=_CRYPTO),
    R.POSTCOPY_ADVISE: Rule(EMPTY, reply=EMPTY, gate=_PAGEFAULT),
    R.POSTCOPY_LISTEN: Rule(EMPTY, reply=U64, gate=_PAGEFAULT),
    R.POSTCOPY_END: Rule(EMPTY, reply=U64, gate=_PAGEFAULT),
    R.GET_INFLIGHT_FD: Rule(INFLIGHT, reply=INFLIGHT, gate=_INFLIGHT_GATE),
    R.SET_INFLIGHT_FD: Rule(INFLIGHT, Fds.ONE, gate=_INFLIGHT_GATE),
    R.GPU_SET_SOCKET: Rule(EMPTY, Fds.ONE),
    R.RESET_DEVICE: Rule(EMPTY, gate=Gate(v.VHOST_USER_PROTOCOL_F_RESET_DEVICE)),
    R.VRING_KICK: Rule(VRING_STATE, gate=_INBAND),
    R.GET_MAX_MEM_SLOTS: Rule(EMPTY, reply=U64, gate=_SLOTS),
    R.ADD_MEM_REG: Rule(MEM_SINGLE, Fds.HANDLER, gate=_SLOTS),
    R.REM_MEM_REG: Rule(MEM_SINGLE, Fds.OPTIONAL, gate=_SLOTS),
    R.SET_STATUS: Rule(U64, gate=_STATUS),
    R.GET_STATUS: Rule(EMPTY, reply=U64, gate=_STATUS),
    R.GET_SHARED_OBJECT: Rule(UUID, reply=EMPTY, gate=_SHARED),
    R.SET_DEVICE_STATE_FD: Rule(TRANSFER, Fds.ONE, U64, _STATE),
    R.CHECK_DEVICE_STATE: Rule(EMPTY, reply=U64, gate=_STATE),
    R.GET_SHMEM_CONFIG: Rule(EMPTY, reply=SHMEM_CONFIG, gate=_SHMEM),
    R.GET_VRING_BASE_SKIP_DRAIN: Rule(
        VRING_STATE, reply=VRING_STATE, gate=Gate(v.VHOST_USER_PROTOCOL_F_GET_VRING_BASE_SKIP_DRAIN)
    ),
}

B = BackendRequest
# All of these need BACKEND_REQ besides their gate, since they travel on the channel that it brings.
BACKEND_REQUESTS: Final[dict[int, Rule]] = {
    B.IOTLB_MSG: Rule(IOTLB, gate=_IOMMU),
    B.CONFIG_CHANGE_MSG: Rule(EMPTY, gate=_CONFIG_GATE),
    B.VRING_HOST_NOTIFIER_MSG: Rule(VRING_AREA, Fds.UNLESS_NOFD, gate=Gate(v.VHOST_USER_PROTOCOL_F_HOST_NOTIFIER)),
    B.VRING_CALL: Rule(VRING_STATE, gate=_INBAND),
    B.VRING_ERR: Rule(VRING_STATE, gate=_INBAND),
    B.SHARED_OBJECT_ADD: Rule(UUID, gate=_SHARED),
    B.SHARED_OBJECT_REMOVE: Rule(UUID, gate=_SHARED),
    B.SHARED_OBJECT_LOOKUP: Rule(UUID, reply=U64, gate=_SHARED),
    B.SHMEM_MAP: Rule(MMAP, Fds.ONE, gate=_SHMEM),
    B.SHMEM_UNMAP: Rule(MMAP, gate=_SHMEM),
}


class Table(NamedTuple):
    """The requests that one side can make, and what they are called."""

    rules: dict[int, Rule]
    requests: type[IntEnum]
    prefix: str = ""

    def name(self, request: int) -> str:
        """Name a request for people, also an unknown one."""
        known = request in self.rules
        return self.prefix + self.requests(request).name if known else request_name(request, self.requests)


FRONTEND: Final = Table(FRONTEND_REQUESTS, Request)
BACKEND: Final = Table(BACKEND_REQUESTS, BackendRequest, "BACKEND_")


# --- Messages ---------------------------------------------------------------------------------------------------------


class Header(NamedTuple):
    """The first 12 bytes."""

    request: int
    flags: int
    size: int


class Message:
    """A decoded message and the fds that came with it.

    The message owns its fds until `take_fd` hands one over; `close` closes all that are left. Whoever holds a message
    calls `close` in the end, on every path.
    """

    __slots__ = ("_fds", "_table", "flags", "payload", "request")

    def __init__(
        self, request: int, flags: int, payload: Any, fds: Iterable[int] = (), table: Table = FRONTEND
    ) -> None:
        self.request = request
        self.flags = flags
        self.payload = payload
        self._fds = list(fds)
        self._table = table

    @property
    def name(self) -> str:
        """The name of the request, for people."""
        return self._table.name(self.request)

    @property
    def need_reply(self) -> bool:
        """Whether the sender asked for an ack."""
        return bool(self.flags & NEED_REPLY)

    @property
    def fds(self) -> tuple[int, ...]:
        """The fds that the message still owns."""
        return tuple(self._fds)

    def take_fd(self) -> int | None:
        """Hand over the first fd that is left; the caller owns it from now on. None if there is none."""
        return self._fds.pop(0) if self._fds else None

    def close(self) -> None:
        """Close every fd that nobody took."""
        close_fds(self._fds)

    def __repr__(self) -> str:
        return f"Message({self.name}, flags={self.flags:#x}, {self.payload!r}, fds={self._fds})"


def close_fds(fds: list[int]) -> None:
    """Close and forget the fds of a list; one that cannot be closed does not keep the others open."""
    while fds:
        close_fd(fds.pop())


def request_name(request: int, names: type[IntEnum] = Request) -> str:
    """Name a request of the front-end (or of the back-end), also an unknown one."""
    try:
        return names(request).name
    except ValueError:
        return f"request {request}"


def encode(request: int, payload: bytes = b"", flags: int = VERSION) -> bytes:
    """Put a header before a payload that has been laid out already; checks nothing, so that tests can send nonsense."""
    return HEADER.pack(request, flags, len(payload)) + payload


def encode_request(request: int, payload: Any = None, *, need_reply: bool = False) -> bytes:
    """Lay out a request of the front-end by the table."""
    flags = VERSION | NEED_REPLY if need_reply else VERSION
    return encode(request, FRONTEND_REQUESTS[request].payload.encode(payload), flags)


def encode_backend_request(request: int, payload: Any = None, *, need_reply: bool = False) -> bytes:
    """Lay out a request of the back-end by the table."""
    flags = VERSION | NEED_REPLY if need_reply else VERSION
    return encode(request, BACKEND_REQUESTS[request].payload.encode(payload), flags)


def encode_reply(request: int, payload: Any) -> bytes:
    """Lay out the reply that the table prescribes for a request."""
    rule = FRONTEND_REQUESTS[request]
    codec = rule.reply or rule.postcopy_reply
    if codec is None:
        raise ValueError(f"{request_name(request)} has no reply of its own; use encode_ack")
    return encode(request, codec.encode(payload), REPLY_FLAGS)


def encode_ack(request: int, failed: bool) -> bytes:
    """Lay out an ack (0) or a nack (1)."""
    return encode(request, U64.encode(int(failed)), REPLY_FLAGS)


def decode_header(
    data: bytes, *, reply: bool = False, error: type[PeerError] = FrontendError, table: Table = FRONTEND
) -> Header:
    """Check the form of a header, including whether the announced size suits the request.

    Parameters
    ----------
    data
        Exactly 12 bytes.
    reply
        False: a request. True: the reply to one.
    error
        What to raise; `fatal` is always set, since after a wrong header nobody knows where the next one starts.
    table
        Whose requests the stream carries.
    """
    header = Header._make(HEADER.unpack(data))
    name = table.name(header.request)

    def wrong(field: str, value: object, limit: str) -> PeerError:
        return error(name, field, value, limit, fatal=True)

    if header.flags & VERSION_MASK != VERSION:
        raise wrong("version", header.flags & VERSION_MASK, f"only version {VERSION} exists")
    if header.flags & ~_KNOWN_FLAGS:
        raise wrong("flags", f"{header.flags:#x}", "reserved bits must be 0")
    if reply and header.flags != REPLY_FLAGS:
        raise wrong("flags", f"{header.flags:#x}", f"a reply carries {REPLY_FLAGS:#x}")
    if not reply and header.flags & REPLY:
        raise wrong("flags", f"{header.flags:#x}", "a request must not have the reply bit")
    if header.size > PAYLOAD_MAX:
        raise wrong("size", header.size, f"the limit is {PAYLOAD_MAX} bytes")
    codec = _codec(header.request, reply, table)
    if not codec.fits(header.size):
        raise wrong("size", header.size, codec.limit())
    return header


def decode(
    header: Header,
    body: bytes,
    fds: list[int],
    *,
    reply: bool = False,
    error: type[PeerError] = FrontendError,
    table: Table = FRONTEND,
) -> Message:
    """Decode a message whose header has been checked; the message takes over the fds, and the list is empty afterwards.

    An unknown request keeps its payload as bytes and its fds: the session decides what becomes of it.

    Raises
    ------
    FrontendError, BackendError
        The inner sizes or the number of fds are wrong; the fds are closed then.
    """
    rule = table.rules.get(header.request)
    message = Message(header.request, header.flags, None, fds, table)
    fds.clear()
    try:
        message.payload = _codec(header.request, reply, table).decode(body)
    except ValueError as problem:
        message.close()
        raise error(message.name, "payload", "inconsistent", str(problem), fatal=True) from None
    if rule is not None and not reply:
        allowed = fds_allowed(rule.fds, message.payload)
        count = len(message.fds)
        if count not in allowed:
            message.close()
            limit = f"{allowed.start}" if len(allowed) == 1 else f"at most {allowed[-1]}"
            raise error(message.name, "number of fds", count, f"it takes {limit}", fatal=True)
    return message


def _codec(request: int, reply: bool, table: Table) -> Codec:
    rule = table.rules.get(request)
    if rule is None:
        return RAW
    return (rule.reply or rule.postcopy_reply or U64) if reply else rule.payload
