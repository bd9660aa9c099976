"""The wire format: layouts, sizes, header checks, fd counts."""

from __future__ import annotations

import os
import struct

import pytest

from vhost_rig import PAGE, make_message, memfd, raw
from vq.errors import BackendError, FrontendError
from vq.message import (
    BACKEND_REQUESTS,
    FDS_MAX,
    FRONTEND_REQUESTS,
    HEADER,
    BackendRequest,
    Message,
    Request,
    decode,
    decode_header,
    encode,
    encode_ack,
    encode_reply,
    encode_request,
)
from vq.payload import (
    CONFIG,
    INFLIGHT,
    IOTLB,
    LOG,
    MEM_SINGLE,
    MEM_TABLE,
    MMAP,
    PAYLOAD_MAX,
    SHMEM_CONFIG,
    TRANSFER,
    U64,
    UUID,
    VRING_ADDR,
    VRING_AREA,
    VRING_STATE,
    Config,
    Inflight,
    Iotlb,
    Log,
    Mmap,
    Region,
    Transfer,
    VringAddr,
    VringArea,
    VringState,
)

# Payload bytes, fds and reply bytes of each request as the specification's tables give them, written down apart from
# the code. None = any number; -1 = no reply of its own.
SPECIFIED = {
    1: (0, 0, 8), 2: (8, 0, -1), 3: (0, 0, -1), 4: (0, 0, -1), 7: (0, 1, -1), 8: (8, 0, -1), 9: (40, 0, -1),
    10: (8, 0, -1), 11: (8, 0, 8), 12: (8, 1, -1), 13: (8, 1, -1), 14: (8, 1, -1), 15: (0, 0, 8), 16: (8, 0, -1),
    17: (0, 0, 8), 18: (8, 0, -1), 19: (8, 0, -1), 20: (8, 0, -1), 21: (0, 1, -1), 22: (32, 0, -1), 23: (8, 0, -1),
    27: (8, 0, -1), 28: (0, 0, 0), 29: (0, 0, 8), 30: (0, 0, 8), 31: (24, 0, 24), 32: (24, 1, -1), 33: (0, 1, -1),
    34: (0, 0, -1), 35: (8, 0, -1), 36: (0, 0, 8), 38: (40, 0, -1), 39: (8, 0, -1), 40: (0, 0, 8),
    41: (16, 0, 0), 42: (8, 1, 8), 43: (0, 0, 8), 44: (0, 0, 2056), 45: (8, 0, 8),
}  # fmt: skip
OF_VARIABLE_SIZE = {5, 6, 24, 25, 26, 37}


def test_table_holds_every_request() -> None:
    assert set(FRONTEND_REQUESTS) == set(range(1, 46)) == {int(request) for request in Request}
    assert set(BACKEND_REQUESTS) == set(range(1, 11)) == {int(request) for request in BackendRequest}
    assert set(SPECIFIED) | OF_VARIABLE_SIZE == set(range(1, 46))


@pytest.mark.parametrize("request_id", sorted(SPECIFIED))
def test_sizes_fds_and_replies_are_the_specified_ones(request_id: int) -> None:
    size, fds, reply = SPECIFIED[request_id]
    rule = FRONTEND_REQUESTS[request_id]
    assert [n for n in range(PAYLOAD_MAX + 1) if rule.payload.fits(n)] == [size]
    if reply >= 0:
        assert rule.reply is not None and rule.reply.sizes == (reply,)
    else:
        assert rule.reply is None
    given = [os.dup(0) for _ in range(fds)]
    message = decode(decode_header(raw(request_id, bytes(size))[:12]), bytes(size), given)
    assert given == []
    assert len(message.fds) == fds
    message.close()


@pytest.mark.parametrize(
    ("codec", "value", "layout"),
    [
        (U64, 0x0102030405060708, struct.pack("=Q", 0x0102030405060708)),
        (VRING_STATE, VringState(7, 256), struct.pack("=2I", 7, 256)),
        # desc, used, avail: the order on the wire is not the order in anybody's head
        (VRING_ADDR, VringAddr(1, 1, 0xD, 0x5ED, 0xA, 0x106), struct.pack("=2I4Q", 1, 1, 0xD, 0x5ED, 0xA, 0x106)),
        (MEM_SINGLE, Region(1, 2, 3, 4), struct.pack("=5Q", 0, 1, 2, 3, 4)),
        (MEM_TABLE, (Region(1, 2, 3, 4), Region(5, 6, 7, 8)), struct.pack("=2I8Q", 2, 0, 1, 2, 3, 4, 5, 6, 7, 8)),
        (LOG, Log(0x2000, 0), struct.pack("=2Q", 0x2000, 0)),
        (IOTLB, Iotlb(1, 2, 3, 1, 2), struct.pack("=3QBB6x", 1, 2, 3, 1, 2)),
        (CONFIG, Config(4, 1, b"abc"), struct.pack("=3I", 4, 3, 1) + b"abc"),
        (VRING_AREA, VringArea(0x101, 4096, 8), struct.pack("=3Q", 0x101, 4096, 8)),
        (INFLIGHT, Inflight(4096, 0, 2, 256), struct.pack("=2Q2H4x", 4096, 0, 2, 256)),
        (UUID, bytes(range(16)), bytes(range(16))),
        (TRANSFER, Transfer(1, 0), struct.pack("=2I", 1, 0)),
        (MMAP, Mmap(3, 1, 2, 4096, 1), struct.pack("=B7x4Q", 3, 1, 2, 4096, 1)),
        (SHMEM_CONFIG, (1, *range(256)), struct.pack("=I4x256Q", 1, *range(256))),
    ],
)
def test_layout(codec: object, value: object, layout: bytes) -> None:
    assert codec.encode(value) == layout  # type: ignore[attr-defined]
    assert codec.decode(layout) == value  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("header", "field"),
    [
        (HEADER.pack(1, 0, 0), "version"),
        (HEADER.pack(1, 2, 0), "version"),
        (HEADER.pack(1, 3, 0), "version"),
        (HEADER.pack(1, 1 | 1 << 4, 0), "flags"),
        (HEADER.pack(1, 1 | 1 << 31, 0), "flags"),
        (HEADER.pack(1, 5, 0), "flags"),
        (HEADER.pack(2, 1, 7), "size"),
        (HEADER.pack(2, 1, 9), "size"),
        (HEADER.pack(2, 1, 0), "size"),
        (HEADER.pack(1, 1, 8), "size"),
        (HEADER.pack(3, 1, 8), "size"),
        (HEADER.pack(5, 1, 12), "size"),
        (HEADER.pack(5, 1, 41), "size"),
        (HEADER.pack(5, 1, 8 + 32 * 33), "size"),
        (HEADER.pack(24, 1, 11), "size"),
        (HEADER.pack(31, 1, 20), "size"),  # the in-flight record without its padding
        (HEADER.pack(2, 1, PAYLOAD_MAX + 1), "size"),
        (HEADER.pack(2, 1, 0xFFFFFFFF), "size"),
        (HEADER.pack(0xFFFFFFFF, 1, PAYLOAD_MAX + 1), "size"),
    ],
)
def test_wrong_header_is_fatal_and_says_what(header: bytes, field: str) -> None:
    with pytest.raises(FrontendError) as caught:
        decode_header(header)
    assert caught.value.fatal
    assert caught.value.field == field
    assert str(caught.value.value) in str(caught.value)
    assert caught.value.limit in str(caught.value)


def test_header_of_need_reply_passes() -> None:
    assert decode_header(HEADER.pack(2, 9, 8)) == (2, 9, 8)


@pytest.mark.parametrize("flags", [1, 4, 9, 0xD, 0x15])
def test_reply_carries_exactly_five(flags: int) -> None:
    with pytest.raises(BackendError):
        decode_header(HEADER.pack(1, flags, 8), reply=True, error=BackendError)
    assert decode_header(HEADER.pack(1, 5, 8), reply=True) == (1, 5, 8)


@pytest.mark.parametrize("count", [0, 3, 32, 33, 255, 2**32 - 1])
def test_region_count_must_agree_with_size(count: int) -> None:
    body = struct.pack("=2I", count, 0) + bytes(64)
    with pytest.raises(FrontendError, match="nregions"):
        decode(decode_header(raw(5, body)[:12]), body, [])


def test_thirty_two_regions_pass() -> None:
    regions = tuple(Region(n * PAGE, PAGE, n * PAGE, 0) for n in range(32))
    fds = [memfd() for _ in regions]
    message = make_message(Request.SET_MEM_TABLE, regions, fds)
    assert message.payload == regions
    for fd in fds:
        os.close(fd)
    message.close()


@pytest.mark.parametrize("size", [0, 2, 4, 257, 0xFFFFFFFF])
def test_config_size_must_agree(size: int) -> None:
    body = struct.pack("=3I", 0, size, 0) + bytes(3)
    with pytest.raises(FrontendError, match="size is"):
        decode(decode_header(raw(24, body)[:12]), body, [])


WRONG_FDS = [
    (Request.GET_FEATURES, b"", 1),
    (Request.SET_FEATURES, bytes(8), 1),
    (Request.SET_OWNER, b"", 2),
    (Request.SET_MEM_TABLE, struct.pack("=2I4Q", 1, 0, 0, 1, 0, 0), 0),
    (Request.SET_MEM_TABLE, struct.pack("=2I4Q", 1, 0, 0, 1, 0, 0), 2),
    (Request.SET_LOG_BASE, struct.pack("=2Q", 1, 0), 0),
    (Request.SET_LOG_BASE, struct.pack("=2Q", 1, 0), 2),
    (Request.SET_LOG_BASE, struct.pack("=Q", 1), 1),
    (Request.SET_LOG_FD, b"", 0),
    (Request.SET_VRING_NUM, bytes(8), 1),
    (Request.SET_VRING_KICK, struct.pack("=Q", 0), 0),
    (Request.SET_VRING_KICK, struct.pack("=Q", 0x100), 1),
    (Request.SET_VRING_CALL, struct.pack("=Q", 0), 2),
    (Request.SET_VRING_ERR, struct.pack("=Q", 0x100), 1),
    (Request.SET_BACKEND_REQ_FD, b"", 0),
    (Request.SET_BACKEND_REQ_FD, b"", 2),
    (Request.SET_INFLIGHT_FD, bytes(24), 0),
    (Request.SET_INFLIGHT_FD, bytes(24), 2),
    (Request.GET_INFLIGHT_FD, bytes(24), 1),
    (Request.REM_MEM_REG, bytes(40), 2),
    (Request.SET_DEVICE_STATE_FD, bytes(8), 0),
]


@pytest.mark.parametrize(("request_id", "body", "count"), WRONG_FDS)
def test_wrong_number_of_fds_is_fatal_and_closes_them(request_id: Request, body: bytes, count: int) -> None:
    fds = [memfd() for _ in range(count)]  # the fixture of this folder sees whether they are closed
    with pytest.raises(FrontendError, match="number of fds") as caught:
        decode(decode_header(raw(request_id, body)[:12]), body, fds)
    assert caught.value.fatal
    assert caught.value.value == count


@pytest.mark.parametrize(("word", "count"), [(0, 1), (0xFF, 1), (0x100, 0), (0x1FF, 0), (0xABCD_0000_0000_0200, 1)])
def test_nofd_bit_decides_about_the_fd(word: int, count: int) -> None:
    make_message(Request.SET_VRING_KICK, word, [0] * count).close()


def test_old_form_of_log_base_is_a_word() -> None:
    message = make_message(Request.SET_LOG_BASE, 0x1234)
    assert message.payload == 0x1234


def test_message_hands_fds_over_one_by_one_and_closes_the_rest() -> None:
    fds = [memfd() for _ in range(3)]
    message = Message(Request.SET_MEM_TABLE, 1, (), fds)
    assert message.take_fd() == fds[0]
    assert message.fds == tuple(fds[1:])
    message.close()
    message.close()
    assert message.take_fd() is None
    os.fstat(fds[0])
    os.close(fds[0])
    for fd in fds[1:]:
        with pytest.raises(OSError, match="Bad file"):
            os.fstat(fd)


def test_unknown_request_keeps_payload_and_fds() -> None:
    message = decode(decode_header(raw(77, b"hello")[:12]), b"hello", [memfd()])
    assert (message.request, message.payload, len(message.fds)) == (77, b"hello", 1)
    assert "77" in message.name
    message.close()


def test_replies_clear_need_reply() -> None:
    assert encode_ack(Request.SET_FEATURES, failed=True) == struct.pack("=3IQ", 2, 5, 8, 1)
    assert encode_ack(Request.SET_FEATURES, failed=False) == struct.pack("=3IQ", 2, 5, 8, 0)
    assert encode_reply(Request.GET_VRING_BASE, VringState(1, 9)) == struct.pack("=5I", 11, 5, 8, 1, 9)
    assert encode_reply(Request.SET_LOG_BASE, Log(0x2000, 0)) == struct.pack("=3I2Q", 6, 5, 16, 0x2000, 0)
    assert encode_reply(Request.GET_CONFIG, None) == struct.pack("=3I", 24, 5, 0)
    with pytest.raises(ValueError, match="SET_OWNER"):
        encode_reply(Request.SET_OWNER, None)


def test_requests_carry_the_version() -> None:
    assert encode_request(Request.GET_FEATURES) == struct.pack("=3I", 1, 1, 0)
    assert encode_request(Request.SET_FEATURES, 3, need_reply=True) == struct.pack("=3IQ", 2, 9, 8, 3)
    assert encode(99, b"x", 0xF) == struct.pack("=3I", 99, 0xF, 1) + b"x"


def test_limits() -> None:
    assert (PAYLOAD_MAX, FDS_MAX) == (4096, 32)
