"""The destination of a postcopy migration: whole pumps and disks whose guest's pages are still on their way."""

from __future__ import annotations

import gc
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from blk_rig import IN, OK, content, header, make_file
from disk_rig import VERSION_1
from postcopy_rig import MovingDisk, MovingGuest, Pager, share
from pump_rig import USUAL, Background, Guest, every_layout, mapped, pumping
from vq import postcopy
from vq import virtio as v
from vq.devices.blk import BlkDevice
from vq.errors import ResourceError
from vq.serve import Server
from vq_core.disk import Disk
from vq_core.guest_memory import GuestMemory
from vq_core.userfault import Userfault
from waiting import wait_for

MIB = 1 << 20


def permitted() -> bool:
    try:
        Userfault().close()
    except OSError:
        return False
    return True


pytestmark = pytest.mark.skipif(not permitted(), reason="userfaultfd is not permitted here")


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "a.sock")


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(postcopy, "PATIENCE_S", 1.0)


@pytest.fixture(autouse=True)
def no_mapping_is_left() -> Iterator[None]:
    gc.collect()
    before = mapped()
    yield
    gc.collect()
    assert mapped() == before


def watchers() -> int:
    return sum(thread.name == "vq-postcopy" for thread in threading.enumerate())


@pytest.mark.shows("POSTCOPY_ADVISE", "POSTCOPY_LISTEN", "POSTCOPY_END", "SET_MEM_TABLE")
@pytest.mark.shows("VHOST_USER_PROTOCOL_F_PAGEFAULT")
@every_layout
def test_a_guest_arrives_with_packets_in_its_rings(path: str, layout: int) -> None:
    with pumping(f"vhost:{path},postcopy"), MovingGuest(path, USUAL | layout) as guest:
        wait_for(lambda: guest.pager.asked > 20)  # rings, headers, payloads, receive buffers
        guest.arrive()
        assert watchers() == 0
        came: list[bytes] = []
        wait_for(lambda: came.extend(token.written(n)[12:] for token, n in guest.receiveqs[0].poll()) or len(came) == 64)
        assert came == guest.sent
        wait_for(lambda: guest.transmitqs[0].poll() or not guest.transmitqs[0].outstanding)
        background = Background(guest.streams())
        background.goes_on(500)
        background.finish()
