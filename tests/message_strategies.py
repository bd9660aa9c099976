"""Values for every message of the tables, right ones more often than wrong ones: a strategy for each codec.

A codec or request that is new in `vq.message` needs a line here (a test says so) and is then driven by the state
machines like all others.
"""

from __future__ import annotations

from typing import Any, Final

from hypothesis import strategies as st

from vq import payload as p
from vq import virtio as v
from vq.message import BACKEND_REQUESTS, FRONTEND_REQUESTS, Request

R = Request
PAGE: Final = 4096
RINGS: Final = 4
# Where the memory that works lies; other regions are drawn around it.
GUEST, USER, SIZE = 0x10_0000, 0x7F66_5FFF_F000, 1 << 20
FILE_BYTES: Final = 64 * PAGE  # of the files that the other regions, logs and in-flight areas are mapped from
U64_MAX: Final = (1 << 64) - 1

words = st.integers(0, U64_MAX)
ring_index = st.sampled_from([0, 0, 0, 0, 1, 1, 1, 2, 3, RINGS, 255, 256, 0x10000, 0xFFFFFFFF])
ring_number = st.sampled_from([0, 0, 0, 1, 1, 1, 2, 3, 7, 256, 0x8000, 0x80008000, 32768, 32769, 65536, 0xFFFFFFFF])
address = st.one_of(
    st.builds(
        lambda page, extra: USER + page * PAGE + extra, st.integers(0, 300), st.sampled_from([0, 0, 0, 16, 2, 1])
    ),
    st.sampled_from([0, GUEST, USER + SIZE - 16, USER - 16, U64_MAX - 15, U64_MAX]),
)
page_offset = st.sampled_from([0, 0, 0, 0, PAGE, 3 * PAGE, 333, FILE_BYTES, U64_MAX - PAGE + 1])
size = st.sampled_from([PAGE, PAGE, PAGE, 16 * PAGE, FILE_BYTES, 333, 0, 1 << 62, U64_MAX])
region = st.builds(
    p.Region,
    st.sampled_from([0, PAGE, 8 * PAGE, GUEST, 1 << 32, (1 << 32) + PAGE, 1 << 52, U64_MAX - PAGE + 1]),
    size,
    st.sampled_from([0x1000_0000, 0x1000_0000 + PAGE, 1 << 44, 1 << 45, USER, U64_MAX - PAGE + 1]),
    page_offset,
)
tables = st.lists(region, min_size=1, max_size=3).map(tuple)
small = st.integers(0, 4)
data = st.binary(max_size=64) | st.sampled_from([bytes(1), bytes(6), bytes(28), bytes(60), bytes(256), bytes(300)])
uuid = st.sampled_from([bytes(16), bytes(range(16))])

STRATEGIES: Final[dict[p.Codec, st.SearchStrategy[Any]]] = {
    p.EMPTY: st.none(),
    p.U64: st.one_of(small, st.sampled_from([255, 256, 1 << 32, U64_MAX]), words),
    p.VRING_STATE: st.builds(p.VringState, ring_index, ring_number),
    p.VRING_ADDR: st.builds(
        p.VringAddr, ring_index, st.integers(0, 3), address, address, address, st.sampled_from([0, GUEST, U64_MAX])
    ),
    p.MEM_TABLE: tables,
    p.TABLE_OR_WORD: st.one_of(tables, tables, tables, st.sampled_from([0, 0, 1])),
    p.MEM_SINGLE: region,
    p.LOG: st.builds(p.Log, size, page_offset),
    p.LOG_OR_WORD: st.builds(p.Log, size, page_offset) | words,
    p.LOG_REPLY: st.builds(p.Log, size, page_offset) | words | st.none(),
    p.IOTLB: st.builds(p.Iotlb, address, size, address, st.integers(0, 4), st.integers(0, 5)),
    p.CONFIG: st.builds(p.Config, st.sampled_from([0, 0, 0, 32, 6, 28, 95, 96, 0xFFFFFFFF]), st.integers(0, 3), data),
    p.CONFIG_REPLY: st.builds(p.Config, st.sampled_from([0, 0, 1]), small, data) | st.none(),
    p.VRING_AREA: st.builds(p.VringArea, ring_index, st.sampled_from([PAGE, 0, U64_MAX]), page_offset),
    p.INFLIGHT: st.builds(
        p.Inflight, size, page_offset, st.sampled_from([1, 2, 4, 5, 0, 65535]), st.sampled_from([256, 64, 1, 0, 65535])
    ),
    p.UUID: uuid | st.binary(min_size=16, max_size=16),
    p.TRANSFER: st.builds(p.Transfer, st.integers(0, 2), st.integers(0, 1)),
    p.MMAP: st.builds(p.Mmap, small, page_offset, page_offset, size, st.integers(0, 3)),
    p.SHMEM_CONFIG: st.just((0,) * 257),
    p.RAW: st.binary(max_size=64),
}

ring_word = st.builds(
    lambda index, nofd: index | (p.VRING_NOFD_MASK if nofd else 0),
    st.sampled_from([0, 0, 0, 0, 1, 1, 1, 2, 3, RINGS, 255]),
    st.sampled_from([False, False, False, True]),
)
SPLIT: Final = v.mask(v.VHOST_USER_F_PROTOCOL_FEATURES, v.VIRTIO_F_VERSION_1)
feature_bits = st.one_of(
    st.sampled_from([SPLIT, SPLIT | v.mask(v.VIRTIO_F_RING_PACKED), v.mask(v.VIRTIO_F_VERSION_1), 0]),
    st.sets(st.integers(0, 63), max_size=4).map(lambda bits: SPLIT | v.mask(*bits)),
    words,
)
protocol_bits = st.sets(st.integers(0, 23), max_size=6).map(lambda bits: v.mask(*bits)) | words
# Where the codec alone would hardly ever give a value that means something.
OF_REQUEST: Final[dict[int, st.SearchStrategy[Any]]] = {
    R.SET_FEATURES: feature_bits,
    R.SET_PROTOCOL_FEATURES: protocol_bits,
    R.SET_VRING_KICK: ring_word,
    R.SET_VRING_CALL: ring_word,
    R.SET_VRING_ERR: ring_word,
    R.SET_VRING_ENABLE: st.builds(p.VringState, ring_index, st.sampled_from([0, 1, 1, 1, 2])),
    R.SET_STATUS: st.sampled_from([0, 1, 3, 8, 0xF, 0x80, 256, U64_MAX]),
    R.NET_SET_MTU: st.sampled_from([68, 1500, 9000, 65535, 67, 0, 65536, U64_MAX]),
    R.SET_LOG_BASE: STRATEGIES[p.LOG],
}


def payload_of(request: int) -> st.SearchStrategy[Any]:
    """Payloads for a request of the front-end, whatever the table says its codec is."""
    return OF_REQUEST[request] if request in OF_REQUEST else STRATEGIES[FRONTEND_REQUESTS[request].payload]


def missing() -> list[str]:
    """Name each row of the tables that has no strategy for a payload of its."""
    lacking = []
    for table in (FRONTEND_REQUESTS, BACKEND_REQUESTS):
        for request, rule in table.items():
            for codec in rule:
                if isinstance(codec, p.Codec) and codec not in STRATEGIES:
                    lacking.append(f"{request!r}: {codec!r}")
    return lacking
