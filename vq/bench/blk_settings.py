"""What can be varied in a measurement of a block device."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from vq.bench.settings import SWITCH, Axis, words_of
from vq.errors import UsageError

__all__ = ["BLK_AXES", "BlkSettings", "check_blk_settings"]

DISKS: Final = ("null", "tmpfs")
RING_MAX: Final = 32768


@dataclass(frozen=True, slots=True)
class BlkSettings:
    """One point of a sweep.

    Parameters
    ----------
    disk
        What the back-end is given, if we start it: "null" reads as zeroes and keeps nothing, "tmpfs" is a file in
        memory. "socket": whatever it has.
    block
        Bytes of a request.
    depth
        Requests under way in each queue.
    writes
        Per cent of the requests that write.
    queues
        Request queues, all driven by one thread.
    layout
        "split" or "packed".
    descriptors
        "indirect": one that points to a table of three; "3": three in the ring.
    ring
        Entries of each ring.
    event_idx
        "on" or "off": VIRTIO_F_EVENT_IDX.
    verify
        "on" or "off": compare what is read with what was read or written there before.
    poll
        How our back-end waits: "adaptive" or "busy".
    driver
        How our driver waits: "busy", or "sleep" until it is called.
    """

    disk: str = "null"
    block: int = 4096
    depth: int = 32
    writes: int = 0
    queues: int = 1
    layout: str = "split"
    descriptors: str = "indirect"
    ring: int = 128
    event_idx: str = "on"
    verify: str = "off"
    poll: str = "adaptive"
    driver: str = "busy"

    def words(self, *, but: Sequence[str] = ()) -> str:
        """What differs from the defaults, for people; without the axes named in `but`."""
        return words_of(self, BlkSettings(), but)


BLK_AXES: Final[Mapping[str, Axis]] = {
    axis.name: axis
    for axis in (
        Axis("disk", "what the back-end is given: nothing, or a file in memory", choices=DISKS),
        Axis("block", "bytes of a request, a power of two", "bytes", low=512, high=1 << 20, power=True),
        Axis("depth", "requests under way in a queue", "requests", low=1, high=1024),
        Axis("writes", "per cent of the requests that write", "%", high=100),
        Axis("queues", "request queues, all driven by one driver thread", "queues", low=1, high=64),
        Axis("layout", "layout of the rings", choices=("split", "packed")),
        Axis("descriptors", "of a request: three in a table, or three in the ring", choices=("indirect", "3")),
        Axis("ring", "entries of a ring (queue size)", "entries", low=4, high=RING_MAX, power=True),
        Axis("event_idx", "suppress notifications by position (EVENT_IDX)", choices=SWITCH),
        Axis("verify", "compare each block with what it held before", choices=SWITCH),
        Axis("poll", "how our back-end waits", choices=("adaptive", "busy")),
        Axis("driver", "how our driver waits", choices=("busy", "sleep")),
    )
}

_RULES: Final[Sequence[tuple[Callable[[BlkSettings], bool], str]]] = (
    (
        lambda s: s.depth * (3 if s.descriptors == "3" else 1) <= s.ring,
        "the ring has no room for so many requests; use a larger ring or a smaller depth",
    ),
    (
        lambda s: s.disk != "null" or s.verify == "off" or not s.writes,
        "the null disk keeps nothing that could be verified; take disk=tmpfs, or writes=0",
    ),
    (lambda s: s.block * s.depth * s.queues <= 1 << 30, "more than 1 GiB under way; use fewer or smaller requests"),
)


def check_blk_settings(settings: BlkSettings) -> BlkSettings:
    """Refuse a point whose settings do not fit together.

    Raises
    ------
    UsageError
        It does not.
    """
    for rule, remedy in _RULES:
        if not rule(settings):
            raise UsageError(f"{settings.words() or 'defaults'}: {remedy}")
    return settings
