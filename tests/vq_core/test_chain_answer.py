"""What a compiled subclass of the worker for requests answers; apart from its other tests, which need no compiler."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import vq
from chain_rig import Swallow
from waiting import wait_for

Connect = Callable[..., vq.Frontend]
pytest_plugins = ["vq.testing.plugin"]


def test_an_answer_that_makes_its_own_room_breaks_its_queue(vq_frontend: Connect, harness: ModuleType) -> None:
    """Whatever a subclass writes into the exchange: nothing behind the worker's memory goes to the driver."""
    device = Swallow(harness.Boaster)
    driver = vq_frontend(device).driver(0, 8)
    driver.add([b"x"], [1 << 16])
    driver.kick()
    # Not by a stop: the worker may obey that before it has looked at the ring.
    wait_for(lambda: device.worker.snapshot()["refused"] == 1)
    assert "does not take" in device.queues[0].snapshot()["broken"]
