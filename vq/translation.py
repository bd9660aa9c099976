"""What an IOMMU makes of a connection: translations come one by one, and rings wait for theirs.

Started rings are *mapped* (all of their memory is), *unmapped* (it was until an INVALIDATE; indices are kept) or
*waiting* (it never was; `vq.apply` starts them when it is). What somebody misses, a ring here or a descriptor in a
worker, goes into tables of `Iotlb`, whose descriptor says so; `take` hands it over to whoever asks the front-end.

Spec: vhost-user, "IOMMU support".
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Final

from vq import effects as e
from vq import virtio as v
from vq_core.iotlb import Iotlb
from vq_core.memory import MemoryMap
from vq_core.queue import Queue, ring_parts, settle, wake
from vq_core.timer import Timer

__all__ = ["Translation"]

OPEN_MAX: Final = 64  # questions that wait for an answer: so many always fit into the channel's socket
PATIENCE_S: Final = 2.0  # until an unanswered question may be asked again
# The same after an INVALIDATE of its page: if the front-end had found nothing there, as it tells nobody, that may have
# changed since. If the question is still on its way, it is left the time to be answered.
DOUBT_S: Final = 0.1
SOONEST_S: Final = 0.01
PAGES_MAX: Final = 16  # of one ring that are asked for at once; each message looks at all rings that lack some
READ: Final = 1


class Translation:
    """The translations of one connection, and its rings behind them.

    Parameters
    ----------
    queues
        Of the device.
    rings
        What the front-end has started, by index; the caller keeps it up to date.
    relog
        Sets the dirty log of a queue anew, before its ring is mapped again.
    warn
        Called with a text for people.

    Notes
    -----
    Threading: one control thread. Each method returns when no worker uses what it has taken away.
    """

    def __init__(
        self,
        queues: Sequence[Queue],
        rings: Mapping[int, e.RingConfig],
        relog: Callable[[e.RingConfig], None],
        warn: Callable[[str], None],
    ) -> None:
        self.iotlb = Iotlb()
        self.timer = Timer()
        self._queues = queues
        self._rings = rings
        self._relog = relog
        self._warn = warn
        self._features = 0
        self._due = math.inf  # when the timer expires

    def fileno(self) -> int:
        """The descriptor that is readable when something is missing; `timer` is another to wait for."""
        return int(self.iotlb.fileno())

    def close(self) -> None:
        """Release the descriptors; all rings have been stopped before."""
        self.timer.close()
        self.iotlb.close()

    def set_features(self, features: int) -> None:
        """Take over the acknowledged features, which decide what a ring consists of."""
        self._features = features

    # -- what the front-end says --

    def set_memory(self, memory: MemoryMap | None) -> None:
        """Take over another memory map; translations into memory that is gone are forgotten."""
        self.iotlb.set_memory(memory)
        # Whether or not entries are gone: those of a ring may have been driven out before.
        for index in self._mapped():
            if self._lacking(self._rings[index]):
                self._queues[index].unmap()
        settle(self.iotlb, self._queues)
        self.remap()

    def update(self, effect: e.UpdateTranslation) -> None:
        """Take over a translation, and let go on who has waited for it.

        Raises
        ------
        ValueError
            It does not lie in the memory table.
        """
        changed = self.iotlb.update(
            effect.iova, effect.size, effect.address, effect.perm, guest_addresses=effect.guest_addresses
        )
        if changed or self.iotlb.partial:
            self._displace(effect.iova, effect.iova + effect.size - 1)
        if changed or self.iotlb.crowded:
            settle(self.iotlb, self._queues)
        wake(self._queues)
        self.remap()

    def invalidate(self, iova: int, last: int) -> None:
        """Forget [iova, last]."""
        used = self.iotlb.invalidate(iova, last)
        self._displace(iova, last)
        if used:
            settle(self.iotlb, self._queues)
        if self.iotlb.doubt(iova, last, PATIENCE_S - DOUBT_S):
            self._set_timer()
        self.remap()

    # -- rings --

    def lacks(self, ring: e.RingConfig) -> bool:
        """Tell whether something of a ring is not mapped; what lacks will be asked for."""
        lacking = self._lacking(ring)
        for iova, perm in lacking:
            self.iotlb.miss(iova, perm)
        return bool(lacking)

    def log_guest_addr(self, ring: e.RingConfig) -> int | None:
        """Where the used ring is logged: the guest address behind the one that the front-end said; None if unmapped."""
        return self.iotlb.guest_address(ring.log_guest_addr, self._log_bytes(ring), READ)

    def remap(self) -> None:
        """Give the queues their rings back that are mapped again, and ask for what the others lack."""
        for index, ring in self._rings.items():
            queue = self._queues[index]
            if queue.started and not queue.mapped and not self.lacks(ring):
                try:
                    self._relog(ring)
                    queue.remap()
                except ValueError as error:
                    self._warn(f"{error}; ring {index} stands until it does")

    def _displace(self, iova: int, last: int) -> None:
        """Take the rings away that have a part in [iova, last]."""
        for index in self._mapped():
            parts = self._parts(self._rings[index])
            if any(start <= last and iova <= start + size - 1 for start, size, _ in parts):
                self._queues[index].unmap()

    def _mapped(self) -> Iterator[int]:
        return (index for index in self._rings if self._queues[index].mapped)

    def _parts(self, ring: e.RingConfig) -> Iterator[tuple[int, int, int]]:
        """All that must be mapped: address, bytes, permission."""
        for _, address, _, size, perm in ring_parts(ring.num, (ring.desc, ring.avail, ring.used), self._features):
            yield address, size, perm
        if ring.flags & v.VHOST_VRING_F_LOG and v.has(self._features, v.VHOST_F_LOG_ALL):
            yield ring.log_guest_addr, self._log_bytes(ring), READ

    def _lacking(self, ring: e.RingConfig) -> list[tuple[int, int]]:
        """Address and permission of pages that are not mapped, as many as are worth asking for now."""
        found: list[tuple[int, int]] = []
        for start, size, perm in self._parts(ring):
            found += [(iova, perm) for iova in self.iotlb.lacking(start, size, perm, PAGES_MAX - len(found))]
            if len(found) == PAGES_MAX:
                break
        return found

    @staticmethod
    def _log_bytes(ring: e.RingConfig) -> int:
        return 4 if ring.packed else 6 + 8 * ring.num

    # -- what is missing --

    def take(self) -> list[tuple[int, int]]:
        """Questions to put to the front-end: (iova, perm); each is open until an UPDATE answers it or it is too old."""
        questions = self.iotlb.ask(OPEN_MAX)
        if questions and self._due == math.inf:
            self._set_timer()
        return questions

    def set_aside(self) -> None:
        """Leave what is missing where it is: there is no way to ask."""
        self.iotlb.ask(0)

    def expire(self) -> None:
        """Forget questions that were not answered in time; who still misses something asks anew."""
        self.timer.clear()
        self._due = math.inf
        if self.iotlb.expire(PATIENCE_S):
            self.iotlb.again()
            if self.iotlb.crowded:
                settle(self.iotlb, self._queues)
            wake(self._queues)
            self.remap()
        self._set_timer()

    def _set_timer(self) -> None:
        """Come back when the oldest question is too old; that is never put off, however often it is asked for."""
        if self.iotlb.open == 0:
            return
        now = time.monotonic()
        due = now + max(SOONEST_S, PATIENCE_S - self.iotlb.age)
        if due < self._due:
            self._due = due
            self.timer.set(due - now)
