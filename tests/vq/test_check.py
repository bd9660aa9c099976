"""The checks as a library: results, selection, and that a wrong back-end is found out, case by case."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

import vq.check
from vq import virtio as v
from vq.check import Group, Outcome, Result
from vq.check.registry import checks
from vq.errors import ResourceError, UsageError
from vq.message import HEADER, NEED_REPLY, REPLY, VERSION, Request, encode

OFFERED = v.mask(v.VIRTIO_F_VERSION_1, v.VHOST_USER_F_PROTOCOL_FEATURES)
PROTOCOL = v.mask(v.VHOST_USER_PROTOCOL_F_REPLY_ACK)


class Sloppy:
    """A back-end that acknowledges whatever it gets, and knows nothing of memory or rings.

    Parameters
    ----------
    path : Path
    echo_flags : bool
        Leave NEED_REPLY in replies.
    """

    def __init__(self, path: Path, *, echo_flags: bool = False) -> None:
        self.extra = NEED_REPLY if echo_flags else 0
        self.offers = [OFFERED]
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        with suppress(OSError):
            while True:
                peer, _ = self._listener.accept()
                with peer, suppress(OSError):
                    self._serve(peer)

    def _serve(self, peer: socket.socket) -> None:
        while len(head := peer.recv(HEADER.size, socket.MSG_WAITALL)) == HEADER.size:
            request, flags, size = HEADER.unpack(head)
            if size:
                peer.recv(size, socket.MSG_WAITALL)
            value = {Request.GET_FEATURES: self.offers[-1], Request.GET_PROTOCOL_FEATURES: PROTOCOL}.get(request, 0)
            if value or flags & NEED_REPLY:
                extra = self.extra if flags & NEED_REPLY else 0
                peer.sendall(encode(request, value.to_bytes(8, "little"), VERSION | REPLY | extra))
            if len(self.offers) > 1 and request == Request.GET_FEATURES:
                self.offers.pop()

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join()


@pytest.fixture
def sloppy(tmp_path: Path) -> Iterator[tuple[str, Sloppy]]:
    made = Sloppy(tmp_path / "a.sock")
    yield str(tmp_path / "a.sock"), made
    made.close()


def one(path: str, name: str) -> Result:
    (result,) = vq.check.run(path, only=[name], timeout=0.5)
    return result


def test_a_result_says_everything(sloppy: tuple[str, Sloppy]) -> None:
    seen: list[Result] = []
    results = vq.check.run(sloppy[0], only=["framing.*"], timeout=0.5, on_result=seen.append)
    assert seen == results
    assert {result.outcome for result in results} == {Outcome.PASS}
    first = results[0]
    assert (first.name, first.group) == ("framing.reply-form", Group.CONFORMANCE)
    assert first.section.startswith("vhost-user")
    assert first.title.startswith("A reply has version 1")
    assert 0 <= first.seconds < 1


def test_need_reply_in_a_reply_is_found(tmp_path: Path) -> None:
    back_end = Sloppy(tmp_path / "b.sock", echo_flags=True)
    try:
        result = one(str(tmp_path / "b.sock"), "framing.need-reply-is-not-echoed")
    finally:
        back_end.close()
    assert result.outcome is Outcome.FAIL
    assert "flags is 0xd" in result.reason


def test_an_offer_that_changes_is_found(sloppy: tuple[str, Sloppy]) -> None:
    path, back_end = sloppy
    back_end.offers = [OFFERED, OFFERED | 1, OFFERED, OFFERED]  # from the last on: probe, connection, check
    result = one(path, "features.constant")
    assert result.outcome is Outcome.FAIL
    assert "offers differ" in result.reason


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("hostile.values.features-not-offered", "bit 33: acknowledged, as if it were right"),
        ("hostile.regions.overlapping", "by a page: acknowledged, as if it were right"),
        ("hostile.values.ring-sizes", "0x0 entries: the ring starts"),
        ("acks.unknown-request", "request 60: acknowledged"),
    ],
)
def test_what_is_acknowledged_wrongly_is_found(sloppy: tuple[str, Sloppy], name: str, part: str) -> None:
    result = one(sloppy[0], name)
    assert result.outcome is Outcome.FAIL
    assert part in result.reason


def test_what_is_not_offered_is_skipped(sloppy: tuple[str, Sloppy]) -> None:
    result = one(sloppy[0], "slots.add")
    assert (result.outcome, result.reason) == (Outcome.SKIPPED, "not offered: CONFIGURE_MEM_SLOTS")
    assert one(sloppy[0], "net.split").reason == "for --type net"


def test_misuse(tmp_path: Path) -> None:
    path = str(tmp_path / "none.sock")
    with pytest.raises(UsageError, match="type 'disk' is not known"):
        vq.check.run(path, device="disk")
    with pytest.raises(UsageError, match="no check is named"):
        vq.check.select(["framing.nothing"])
    with pytest.raises(ResourceError, match="start the back-end first"):
        vq.check.run(path, timeout=0.1)


def test_selection() -> None:
    every = {check.name for check in checks()}
    hostile = {check.name for check in vq.check.select(["hostile"])}
    assert hostile == {name for name in every if name.startswith("hostile.")}
    assert {check.name for check in vq.check.select(skip=["hostile", "net.*", "blk.*"])} < every - hostile


def test_every_check_has_a_sentence_and_a_clause() -> None:
    for check in checks():
        assert check.section.startswith(("vhost-user, ", "VIRTIO 1.3, ")), check.name
        assert check.title[0].isupper(), check.name
        assert len(check.title) > 15, check.name
