"""What a session knows of its connection, and what its handlers do all of them: obey, warn, ask what was negotiated.

Spec: vhost-user, "Ring states", "Feature negotiation".
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import Enum
from typing import Any, ClassVar, Final

from vq import effects as e
from vq import virtio as v
from vq.errors import ResourceError, VqError
from vq.message import Message
from vq.offer import Offer
from vq.region_table import LiveRegion
from vq.ring_state import RingState

__all__ = ["LISTENING", "Postcopy", "SessionState"]

log = logging.getLogger("vq.session")


class Postcopy(Enum):
    """How far a postcopy migration has come."""

    OFF = 0
    ADVISED = 1  # the front-end has our userfaultfd
    LISTENING = 2  # each memory table is to be released by it
    TABLE_SENT = 3  # one is being released


LISTENING: Final = (Postcopy.LISTENING, Postcopy.TABLE_SENT)


class SessionState:
    """One connection's worth of protocol state; `vq.session.Session` makes it.

    Notes
    -----
    The session owns the fds of rings, the log event and the back-end channel. Only the control thread may call it. The
    attributes belong to the handlers; everybody else reads them at most.
    """

    # What a handler returns whose answer must wait: it runs again in `resume`, and until then nothing else is received.
    LATER: ClassVar = object()

    def __init__(
        self, offer: Offer, apply: Callable[[e.Effect], Any], warn: Callable[[str], None] = log.warning
    ) -> None:
        self.offer = offer
        self._apply = apply
        self._warn = warn
        self.closed = False
        self.refused_count = 0
        self.features = 0
        self.features_known = False  # a SET_FEATURES has succeeded
        self.features_refused = False  # the last one has failed
        self.protocol_features = 0
        self.status = 0
        self.regions: tuple[LiveRegion, ...] = ()
        self.postcopy = Postcopy.OFF
        self.table_sent: tuple[LiveRegion, ...] = ()  # of postcopy: it waits for its release
        self.rings = [RingState(index) for index in range(offer.queue_count)]
        self.has_log = False
        self.log_fd: int | None = None
        self.has_inflight = False
        self.backend_channel_fd: int | None = None
        self.reply_fds: list[int] = []  # they go with the reply that `receive` has just given, and are closed then
        self._owed: Message | None = None

    @property
    def suspended(self) -> bool:
        """Whether all rings are stopped, so that guest memory must not be written."""
        return not any(ring.started for ring in self.rings)

    @property
    def packed(self) -> bool | None:
        """The layout of the rings; None as long as no features have been acknowledged."""
        return v.has(self.features, v.VIRTIO_F_RING_PACKED) if self.features_known else None

    def apply(self, effect: e.Effect) -> Any:
        """Have the data plane obey; whatever it fails with arrives as a `VqError`."""
        try:
            return self._apply(effect)
        except OSError as problem:
            raise ResourceError(f"{type(effect).__name__} failed", errno=problem.errno or 0) from problem

    @contextmanager
    def all_or_close(self) -> Iterator[None]:
        """Make a failure inside fatal: the effects belong together, and from the middle there is no way back."""
        try:
            yield
        except VqError as failure:
            failure.fatal = True
            raise

    def negotiated(self, bit: int) -> bool:
        """Tell whether a protocol feature has been negotiated."""
        return v.has(self.protocol_features, bit)

    def warn(self, text: str) -> None:
        """Log a refusal; a front-end that floods us gets a line for each power of two."""
        self.refused_count += 1
        if self.refused_count <= 16 or self.refused_count & (self.refused_count - 1) == 0:
            self._warn(f"{text} (refusal {self.refused_count} of this connection)")
