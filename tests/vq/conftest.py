"""Every test of the control plane gives back every fd that it opened."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest

from vhost_rig import Peer, open_fds


@pytest.fixture(autouse=True)
def no_fd_is_left() -> Iterator[None]:
    """Fail a test after which an fd is open that was not open before, or the other way round."""
    gc.collect()  # what earlier tests left may own fds
    before = open_fds()
    yield
    if open_fds() != before:
        gc.collect()
    assert open_fds() == before


@pytest.fixture
def peer(no_fd_is_left: None) -> Iterator[Peer]:
    """Talk to a session of a net device that nothing has been said to yet."""
    peer = Peer()
    yield peer
    peer.close()


@pytest.fixture
def ready(peer: Peer) -> Peer:
    """Talk to a session with features and memory."""
    peer.negotiate()
    peer.share_memory()
    peer.plane.take()
    return peer
