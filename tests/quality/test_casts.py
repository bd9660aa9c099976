"""Which files may touch guest memory, and which may cast to a pointer: the list is exact, with the reason for each.

A file that needs an entry is a place that hostile input reaches: think of another way first.
"""

from __future__ import annotations

import re

from quality.tree import below, name, without_comments

# Once-only reads and writes of memory that a guest can change at any moment.
SHARED = re.compile(r"\bvq_(?:snapshot\w*|put_\w+)\s*\(")
SHARED_FILES = {
    "vq_core/chain.pxd": "the copies of two indirect descriptors, the only ones that are used",
    "vq_core/chain.pyx": "the copy of an indirect descriptor, the only one that is used",
    "vq_core/split.pxd": "the copy of a descriptor of the table, the only one that is used",
    "vq_core/ports/vhost_pull.pyx": "the copy of a virtio-net header, the only one that is used",
    "vq_core/ports/vhost_push.pyx": "the virtio-net header in a guest's buffers",
    "vq_core/receive_filter.pxd": "reads addresses and VLAN of a borrowed packet's Ethernet header",
    "vq_core/switch.pyx": "reads the addresses of a borrowed packet's Ethernet header",
    "vq_core/offload.pyx": "its own copy of a packet, at any alignment",
    "vq_core/ports/pcap_replay.pyx": "fields of a mapped capture file, which its owner may change",
}

# Casts to a pointer to plain bytes or words, and of a number to any pointer; a cast of malloc's result is neither.
BYTES = re.compile(r"<\s*(?:const\s+)?(?:u?int(?:8|16|32|64)_t|char|unsigned char)\s*\*+\s*>(?!\s*(?:c|m|re)alloc)")
NUMBER = re.compile(
    r"<\s*(?:const\s+)?\w+\s*\*+\s*>\s*(?:<\s*(?:uintptr_t|size_t|uint64_t|gpa_t|iova_t|uva_t)\s*>|[\w.]*addr\w*\b)"
)
CAST_FILES = {
    "vq_core/memory.pyx": "a mapping's address becomes a pointer here",
    "vq_core/chain.pyx": "the private copy of a chain's bytes",
    "vq_core/dirty.pyx": "the mapping of the dirty log",
    "vq_core/inflight.pyx": "the mapping of the in-flight region",
    "vq_core/guest_memory.pyx": "the mapping of memory that is ours",
    "vq_core/queue.pyx": "ring pointers that memory.pyx resolved, on their way to the worker",
    "vq_core/switch.pyx": "the table's words",
    "vq_core/blk_request.pyx": "private copies of a request's header and ranges",
    "vq_core/chain_queue.pyx": "Python bytes objects, and the private copy of a request",
    "vq_core/device_chain.pyx": "Python buffers that a chain is read into and written from",
    "vq_core/disk.pyx": "the rest of a part that the kernel has moved in part",
    "vq_core/program.pyx": "the state of a compiled program, as trusted as its code",
    "vq_core/packets.pxd": "payload of the driver's own buffers",
    "vq_core/traffic_engine.pyx": "payload of the driver's own buffers",
    "vq_core/ports/vhost.pyx": "a Python bytes object",
    "vq_core/ports/vhost_pull.pyx": "the private copy of a virtio-net header",
    "vq_core/ports/vhost_push.pyx": "the private copy of a virtio-net header",
    "vq_core/ports/gen.pyx": "a Python bytes object",
    "vq_core/ports/pcap.pyx": "the mapping of a capture file",
}


def files_with(*patterns: re.Pattern[str]) -> set[str]:
    found = set()
    for path in below("vq_core", ".pyx", ".pxd"):
        text = without_comments(path.read_text())
        if name(path) != "vq_core/arch.pxd" and any(pattern.search(text) for pattern in patterns):
            found.add(name(path))
    return found


def test_guest_memory_is_touched_in_few_files() -> None:
    assert files_with(SHARED) == set(SHARED_FILES)


def test_casts_stand_in_few_files() -> None:
    assert files_with(BYTES, NUMBER) == set(CAST_FILES)


def test_the_patterns_see_a_cast() -> None:
    assert NUMBER.search("to = <virtq_desc_t*><uintptr_t>address")
    assert NUMBER.search("to = <foo_t *> descriptor.addr")
    assert BYTES.search("p = <const uint8_t*> memory")
    assert not BYTES.search("p = <uint8_t*>calloc(1, 2)")
    assert not NUMBER.search("q = <queue_t*>endpoint.port")
