"""Packets of the socket device (VIRTIO 1.3, 5.10.6), and what is known of one stream."""

from __future__ import annotations

import socket
import struct
from enum import IntEnum
from typing import Final, NamedTuple

__all__ = ["HEADER", "HOST", "NO_RECEIVE", "NO_SEND", "STREAM", "Op", "Packet", "Stream"]

HOST: Final = 2  # its CID
STREAM: Final = 1  # type of a packet
HEADER: Final = struct.Struct("<QQIIIHHIII")
NO_RECEIVE, NO_SEND = 1, 2  # flags of SHUTDOWN: the sender of it will not


class Op(IntEnum):
    """What a packet says (5.10.6)."""

    REQUEST = 1
    RESPONSE = 2
    RST = 3
    SHUTDOWN = 4
    RW = 5
    CREDIT_UPDATE = 6
    CREDIT_REQUEST = 7


class Packet(NamedTuple):
    """A header (5.10.6), in the order of its bytes."""

    src_cid: int
    dst_cid: int
    src_port: int
    dst_port: int
    len: int
    type: int
    op: int
    flags: int
    buf_alloc: int
    fwd_cnt: int


class Stream:
    """One connection between a port of the guest and one of the host.

    Attributes
    ----------
    calling
        The host has called, and the guest has not answered.
    out, lead
        What the host's socket has not taken yet; how much of it is ours and not the guest's.
    received, forwarded, told
        Bytes that the guest has sent, that the host's socket has taken, and of which the guest knows that.
    sent, allowed, taken
        Bytes that the guest was sent; its buffer, and what of them it has taken, as it says.
    guest_done, host_done
        SHUTDOWN flags: what that side will not do any more.
    starved
        There is something for the guest, which has no room.
    hung
        The host's socket has been closed at its other end.
    watched
        Events that are waited for.
    """

    def __init__(self, sock: socket.socket, guest_port: int, host_port: int, *, calling: bool) -> None:
        self.sock = sock
        self.key = (guest_port, host_port)
        self.calling = calling
        self.out = bytearray()
        self.lead = 0
        self.received = self.forwarded = self.told = 0
        self.sent = self.allowed = self.taken = 0
        self.guest_done = self.host_done = 0
        self.starved = False
        self.hung = False
        self.watched = 0

    @property
    def credit(self) -> int:
        """How many bytes the guest has room for."""
        return max(0, self.allowed - (self.sent - self.taken & 0xFFFFFFFF))
