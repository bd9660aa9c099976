"""The back-end's side of a connection as a state machine without I/O: messages in, effects and replies out.

`Session.receive` takes one message and gives the reply. Everything that must happen to the data plane goes through
`apply(effect)`, which has obeyed when it returns; so a reply means that the data plane has obeyed. `TRANSITIONS` at the
end says for each request which handler serves it (`vq.handle_*`), what state its ring must be in, and what becomes of a
failure that cannot be reported. The rules of replying stand in `_answer` and `_refuse` and nowhere else.

Spec: vhost-user, "Communication", "Ring states", "Front-end message types".
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from enum import Enum
from typing import Any, Final, NamedTuple

from vq import effects as e
from vq import (
    handle_device,
    handle_features,
    handle_inflight,
    handle_iotlb,
    handle_memory,
    handle_postcopy,
    handle_rings,
    handle_sharing,
)
from vq import virtio as v
from vq.errors import FrontendError, ResourceError, UsageError, VqError
from vq.message import FRONTEND_REQUESTS, Message, Request, Rule, close_fds, encode_ack, encode_reply
from vq.offer import SERVED_PROTOCOL_FEATURES, UNSERVED_FEATURES, Offer
from vq.payload import VRING_INDEX_MASK
from vq.ring_state import RingState, replace_fd
from vq.session_state import LISTENING, Postcopy, SessionState

__all__ = ["SERVED_PROTOCOL_FEATURES", "TRANSITIONS", "UNSERVED_FEATURES", "Offer", "Session"]

log = logging.getLogger(__name__)


class RingNeed(Enum):
    """What a message demands of the ring it names."""

    NONE = 0  # it names none
    ANY = 1
    STOPPED = 2


class Silent(Enum):
    """What becomes of a failure that the front-end cannot be told."""

    CLOSE = 0  # it would go on with a wrong idea of memory, rings or log
    IGNORE = 1


class Transition(NamedTuple):
    """One row: who serves a request, its ring, and what a silent failure leads to."""

    run: Callable[..., Any]
    ring: RingNeed = RingNeed.NONE
    silent: Silent = Silent.CLOSE


class Session(SessionState):
    """The back-end's side of one connection.

    Parameters
    ----------
    offer
        What we offer.
    apply
        Carries out an effect before it returns, or raises `VqError` or `OSError` and has changed nothing. Returns the
        base for `StopRing`, bytes for `ConfigRead`, anything otherwise.
    warn
        Called with a text for people: a request was refused.

    Notes
    -----
    Only the control thread may call it. Its state (`vq.session_state`) belongs to the handlers; everybody else reads it
    at most.
    """

    def receive(self, message: Message) -> bytes | None:
        """Serve one message; afterwards its fds are taken over or closed.

        Parameters
        ----------
        message
            A request of the front-end, as `vq.transport` delivers it.

        Returns
        -------
        bytes or None
            The reply to send, or None if none is due.

        Raises
        ------
        FrontendError, ResourceError
            The connection cannot go on; the session is closed already and everything is released.
        UsageError
            The session was closed before.

        Notes
        -----
        `reply_fds` go with the reply; they stay the session's, and live until `receive` or `close` is called again.
        """
        close_fds(self.reply_fds)
        try:
            if self.closed:
                raise UsageError("session: closed; a new connection needs a new session")
            if self._owed is not None:
                raise UsageError("session: an answer is owed; resume() comes first")
            return self._answer(message)
        except BaseException:
            self.close()
            raise
        finally:
            message.close()

    @property
    def owing(self) -> bool:
        """Whether the last message has not been answered yet; replies keep the order, so nothing can come before."""
        return self._owed is not None

    def resume(self) -> bytes | None:
        """Try again to answer what is owed; None if that must go on waiting. Raises what `receive` raises."""
        owed, self._owed = self._owed, None
        return self.receive(owed) if owed is not None else None

    def close(self) -> None:
        """Stop all rings, drop memory and log, close all fds. Does nothing the second time."""
        if self.closed:
            return
        self.closed = True
        last: list[e.Effect] = [e.StopRing(ring.index) for ring in self.rings if ring.started]
        if self.postcopy is not Postcopy.OFF:
            last.insert(0, e.AbandonPostcopy())  # a worker that waits for a page could not stop its ring
        if self.regions:
            last.append(e.SetMemory(()))
        if self.has_log:
            last.append(e.ClearLog())
        if self.has_inflight:
            last.append(e.ClearInflight())
        for effect in last:
            try:
                self._apply(effect)
            except Exception as error:
                log.debug("session: %s failed while closing", effect, exc_info=True)
                self._warn(f"{type(effect).__name__} failed while closing: {error!r}")
        for ring in self.rings:
            ring.started = ring.enabled = False
            ring.close_fds()
        self.regions = ()
        self.has_log = self.has_inflight = False
        close_fds(self.reply_fds)
        self.log_fd = replace_fd(self.log_fd, None)
        self.backend_channel_fd = replace_fd(self.backend_channel_fd, None)

    # --- The rules of replying -------------------------------------------------------------------------------------

    def _answer(self, message: Message) -> bytes | None:
        """Serve a message and make the one reply that is due, if one is due."""
        rule = FRONTEND_REQUESTS.get(message.request)
        transition = TRANSITIONS.get(message.request)
        problem = self._illegal(message, rule)
        if problem is not None or rule is None or transition is None:
            limit = "this back-end does not serve it"
            return self._refuse(message, problem or FrontendError(message.name, "request", "not negotiated", limit))
        try:
            result = transition.run(self, message, *self._ring_for(transition, message))
        except (VqError, OSError) as failure:
            return self._refuse(message, failure, ignore=transition.silent is Silent.IGNORE)
        if result is self.LATER:
            self._owed = message
            return None
        if self._has_own_reply(message):
            return encode_reply(message.request, result)
        # Asked after the message took effect, so that the SET_PROTOCOL_FEATURES that turns REPLY_ACK on is acked.
        return encode_ack(message.request, failed=False) if self._can_ack(message) else None

    def _refuse(self, message: Message, failure: VqError | OSError, *, ignore: bool = False) -> bytes | None:
        """Nack if there is room for one; otherwise close (raise), or go on where nobody can be misled."""
        if isinstance(failure, OSError):
            failure = ResourceError(f"{message.name} failed", errno=failure.errno or 0)
        if failure.fatal or self._has_own_reply(message) or not (ignore or self._can_ack(message)):
            raise failure
        self.warn(str(failure))
        return encode_ack(message.request, failed=True) if self._can_ack(message) else None

    def _can_ack(self, message: Message) -> bool:
        rule = FRONTEND_REQUESTS.get(message.request)
        always = rule is not None and rule.ack_always
        return message.need_reply and (always or self.negotiated(v.VHOST_USER_PROTOCOL_F_REPLY_ACK))

    def _has_own_reply(self, message: Message) -> bool:
        rule = FRONTEND_REQUESTS.get(message.request)
        if message.request == Request.SET_MEM_TABLE:
            return self.postcopy in LISTENING and not isinstance(message.payload, int)
        if message.request == Request.SET_LOG_BASE:  # without LOG_SHMFD it is an older message that has none
            return self.negotiated(v.VHOST_USER_PROTOCOL_F_LOG_SHMFD)
        return rule is not None and rule.reply is not None

    def _illegal(self, message: Message, rule: Rule | None) -> FrontendError | None:
        """Tell why a request is out of place before anything is done about it."""
        if rule is None:
            # 0 is no request but a sign that sender and receiver have lost each other.
            fatal = message.request == 0
            return FrontendError(message.name, "request", message.request, "no such request", fatal=fatal)
        for bit, bits, name in (
            (rule.gate.protocol, self.protocol_features, v.protocol_feature_names),
            (rule.gate.offered, self.offer.features, v.feature_names),
        ):
            if bit is not None and not v.has(bits, bit):
                feature = name(v.mask(bit))[0]
                return FrontendError(message.name, feature, "not negotiated", "the request needs this feature")
        return None

    def _ring_for(self, transition: Transition, message: Message) -> tuple[RingState, ...]:
        """Find the ring that a message is about, with its index checked; nothing for a message about none."""
        if transition.ring is RingNeed.NONE:
            return ()
        payload = message.payload
        index: int = payload & VRING_INDEX_MASK if isinstance(payload, int) else payload.ring
        if index >= len(self.rings):
            raise FrontendError(message.name, "ring index", index, f"there are {len(self.rings)} rings")
        ring = self.rings[index]
        if transition.ring is RingNeed.STOPPED and ring.started:
            raise FrontendError(message.name, f"ring {index}", "started", "stop it with GET_VRING_BASE first")
        return (ring,)


R = Request
_ANY = RingNeed.ANY
_STOPPED = RingNeed.STOPPED
_IGNORE = Silent.IGNORE

# A request of the wire table without a row here is treated like one whose feature was not negotiated.
TRANSITIONS: Final[dict[int, Transition]] = {
    R.GET_FEATURES: Transition(handle_features.get_features),
    R.SET_FEATURES: Transition(handle_features.set_features),
    R.SET_OWNER: Transition(handle_features.set_owner),
    R.RESET_OWNER: Transition(handle_features.reset_owner),
    R.GET_PROTOCOL_FEATURES: Transition(handle_features.get_protocol_features),
    R.SET_PROTOCOL_FEATURES: Transition(handle_features.set_protocol_features),
    R.GET_QUEUE_NUM: Transition(handle_features.get_queue_num),
    R.SET_STATUS: Transition(handle_features.set_status, silent=_IGNORE),
    R.GET_STATUS: Transition(handle_features.get_status),
    R.SET_BACKEND_REQ_FD: Transition(handle_features.set_backend_req_fd, silent=_IGNORE),
    R.SET_MEM_TABLE: Transition(handle_memory.set_mem_table),
    R.GET_MAX_MEM_SLOTS: Transition(handle_memory.get_max_mem_slots),
    R.ADD_MEM_REG: Transition(handle_memory.add_mem_reg),
    R.REM_MEM_REG: Transition(handle_memory.rem_mem_reg),
    R.POSTCOPY_ADVISE: Transition(handle_postcopy.advise),
    R.POSTCOPY_LISTEN: Transition(handle_postcopy.listen),
    R.POSTCOPY_END: Transition(handle_postcopy.end),
    R.SET_LOG_BASE: Transition(handle_memory.set_log_base),
    R.SET_LOG_FD: Transition(handle_memory.set_log_fd, silent=_IGNORE),
    R.SET_VRING_NUM: Transition(handle_rings.set_vring_num, _STOPPED),
    R.SET_VRING_ADDR: Transition(handle_rings.set_vring_addr, _ANY),
    R.SET_VRING_BASE: Transition(handle_rings.set_vring_base, _STOPPED),
    R.GET_VRING_BASE: Transition(handle_rings.get_vring_base, _ANY),
    R.SET_VRING_KICK: Transition(handle_rings.set_vring_kick, _ANY),
    R.SET_VRING_CALL: Transition(handle_rings.set_vring_call, _ANY),
    R.SET_VRING_ERR: Transition(handle_rings.set_vring_err, _ANY, _IGNORE),
    R.SET_VRING_ENABLE: Transition(handle_rings.set_vring_enable, _ANY),
    R.VRING_KICK: Transition(handle_rings.vring_kick, _ANY),
    R.SEND_RARP: Transition(handle_device.send_rarp, silent=_IGNORE),
    R.NET_SET_MTU: Transition(handle_device.net_set_mtu, silent=_IGNORE),
    R.GET_CONFIG: Transition(handle_device.get_config),
    R.SET_CONFIG: Transition(handle_device.set_config, silent=_IGNORE),
    R.RESET_DEVICE: Transition(handle_device.reset_device),
    R.GET_INFLIGHT_FD: Transition(handle_inflight.get_inflight_fd),
    R.SET_INFLIGHT_FD: Transition(handle_inflight.set_inflight_fd),
    R.GET_VRING_BASE_SKIP_DRAIN: Transition(handle_rings.get_vring_base_skip_drain, _ANY),
    R.SET_VRING_ENDIAN: Transition(handle_rings.set_vring_endian, _STOPPED),
    R.GET_SHARED_OBJECT: Transition(handle_sharing.get_shared_object),
    R.SET_DEVICE_STATE_FD: Transition(handle_sharing.set_device_state_fd),
    R.CHECK_DEVICE_STATE: Transition(handle_sharing.check_device_state),
    R.GET_SHMEM_CONFIG: Transition(handle_sharing.get_shmem_config),
    R.IOTLB_MSG: Transition(handle_iotlb.iotlb_msg),
}
