"""Hooks of a device that raise: its connection may end, the process and what comes after it go on."""

from __future__ import annotations

import gc
import logging
from pathlib import Path
from types import SimpleNamespace

import pytest

from channel_rig import ChannelDevice, Hosted, Peer
from vhost_rig import open_fds
from vq.errors import BackendError, ConnectionClosed
from vq.throttle import WARNINGS_MAX
from waiting import wait_for


class Faulty(ChannelDevice):
    """Raises in the hooks that it is told to."""

    def __init__(self, *hooks: str) -> None:
        super().__init__()
        self.hooks = set(hooks)

    def _come(self, hook: str) -> None:
        if hook in self.hooks:
            raise KeyError(hook)

    def save_state(self) -> bytes:
        self._come("save_state")
        return super().save_state()

    def load_state(self, state: bytes) -> None:
        self._come("load_state")
        super().load_state(state)

    def set_status(self, status: int) -> None:
        self._come("set_status")

    def ring_stopping(self, index: int) -> None:
        self._come("ring_stopping")

    def ring_stopped(self, index: int) -> None:
        self._come("ring_stopped")

    def reset(self) -> None:
        self._come("reset")


def test_a_state_at_which_a_device_fails_is_refused(tmp_path: Path) -> None:
    """A parser of its own meets what a hostile front-end made up."""
    hosted = Hosted(Faulty("load_state", "save_state"), str(tmp_path / "s"))
    peer = Peer(hosted.path)
    with pytest.raises(BackendError, match="CHECK_DEVICE_STATE"):
        peer.frontend.load_state(b"garbage")
    with pytest.raises(BackendError, match="0x101"):
        peer.frontend.save_state()
    hosted.device.hooks.clear()
    peer.frontend.load_state(b"sense")
    assert peer.frontend.save_state() == b"sense"
    peer.close()
    hosted.close()


@pytest.mark.parametrize("hook", ["ring_stopping", "ring_stopped", "reset"])
def test_a_connection_ends_whatever_its_device_raises(tmp_path: Path, hook: str) -> None:
    """No queue runs on with the memory of a front-end that has gone, and the next one is served."""
    before = open_fds()
    hosted = Hosted(Faulty(hook), str(tmp_path / "s"))
    peer = Peer(hosted.path)
    peer.start(0)
    peer.start(1)
    peer.close()
    wait_for(lambda: hosted.backend.state == "listening" and not any(queue.started for queue in hosted.device.queues))
    peer = Peer(hosted.path)
    peer.start(0)
    if hook != "reset":
        with pytest.raises(ConnectionClosed):
            peer.frontend.stop_ring(0)
        assert not hosted.device.queues[0].started
    peer.close()
    hosted.close()
    gc.collect()
    assert open_fds() == before


def test_a_front_end_that_knows_how_to_make_hooks_fail_does_not_fill_the_log(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vq.throttle.time", SimpleNamespace(monotonic=lambda: 0.0))  # however long it takes
    hosted = Hosted(Faulty("set_status", "ring_stopping", "reset"), str(tmp_path / "s"))
    with caplog.at_level(logging.WARNING):
        for status in range(30):
            peer = Peer(hosted.path)
            peer.start(0)
            with pytest.raises(ConnectionClosed):
                peer.frontend.set_status(status)
            peer.close()
    hosted.close()
    assert len(caplog.records) == WARNINGS_MAX
