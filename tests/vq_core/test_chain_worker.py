"""The worker for requests: its life, what it gives back, and what it does not take."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import pytest

import vq
from chain_rig import Swallow
from vq.server import Server
from vq.testing import Guest
from vq_core.chain_worker import ChainWorker
from vq_core.driver import Buffer
from vq_core.queue import Queue
from waiting import wait_for

OUTSIDE = 1 << 45  # no memory there

Connect = Callable[..., vq.Frontend]
pytest_plugins = ["vq.testing.plugin"]

every_layout = pytest.mark.parametrize("layout", ["split", "packed"])


@every_layout
def test_all_come_back(vq_frontend: Connect, layout: str) -> None:
    device = Swallow()
    frontend = vq_frontend(device)
    for index in (0, 1):
        driver = frontend.driver(index, 64, layout)
        sent: list[Buffer] = []
        back: list[tuple[Buffer, int]] = []
        for count in range(300):
            sent.append(driver.add([bytes(10)], [7], indirect=count % 3 == 0))
            if driver.ring.free < 2:
                driver.kick()
                back += driver.wait()
        driver.kick()
        while len(back) < len(sent):
            back += driver.wait()
        assert [buffer for buffer, _ in back] == sent
        assert {length for _, length in back} == {0}
    assert device.worker.snapshot()["answered"] == 600


@every_layout
def test_a_bad_chain_breaks_its_queue_alone(vq_frontend: Connect, layout: str) -> None:
    device = Swallow()
    frontend = vq_frontend(device)
    one, other = frontend.driver(0, 8, layout), frontend.driver(1, 8)
    one.add([(OUTSIDE, 64)])
    one.kick()
    assert other.ask(b"x") == b""
    one.stop()  # a boundary of the worker lies behind this
    assert device.queues[0].snapshot()["broken"] is not None
    assert device.queues[1].snapshot()["broken"] is None
    assert other.ask(b"x") == b""


def test_a_broken_queue_is_reported_to_who_serves_the_device(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    device = Swallow()
    with Server(device, path=tmp_path / "s") as server:
        serving = threading.Thread(target=server.run)
        serving.start()
        try:
            with vq.Frontend.connect(tmp_path / "s") as frontend:
                driver = frontend.driver(1, 8)
                driver.add([(OUTSIDE, 64)])
                driver.kick()
                # Nothing more is sent: a message would make the back-end look by itself.
                wait_for(lambda: "(queue1) address outside" in caplog.text)
        finally:
            server.request_stop()
            serving.join()
    assert device.worker.report_fd is None


def test_messages_come_through_under_load(vq_frontend: Connect) -> None:
    device = Swallow()
    frontend = vq_frontend(device)
    driver, other = frontend.driver(0, 256), frontend.driver(1)
    for _ in range(50):
        while driver.ring.free:
            driver.add([b"request"])
        driver.kick()
        other.stop()
        other.start()
        assert other.ask(b"x") == b""
        driver.wait()


def test_what_it_does_not_take() -> None:
    queue = Queue(0, "queue0")
    with pytest.raises(ValueError, match="adaptive"):
        ChainWorker([queue], poll="never")
    with pytest.raises(ValueError, match="limit"):
        ChainWorker([queue], limit=-1)
    worker = ChainWorker([queue])
    with pytest.raises(ValueError, match="belongs to a worker"):
        ChainWorker([queue])
    with pytest.raises(ValueError, match="already"):
        worker.__init__([])  # type: ignore[misc]
    worker.close()
    worker.close()
    with pytest.raises(ValueError, match="closed"):
        worker.run()
    ChainWorker([queue]).close()


def test_a_subclass_that_forgets_the_base() -> None:
    class Forgetful(ChainWorker):
        def __init__(self) -> None:
            pass

    with pytest.raises(ValueError, match="__init__"):
        Forgetful().run()
    Forgetful().close()


@every_layout
def test_long_chains_end_a_round_early(vq_guest: Callable[..., Guest], layout: str) -> None:
    """The other queues of the worker, and the control thread, wait for a round."""
    device = Swallow()
    guest = vq_guest(device, layout=layout, size=1024)
    driver = guest.drivers[0]
    for _ in range(32):
        driver.add([b"x"] * 1024, indirect=True)
    driver.publish()
    driver.kick()
    guest.used(32)
    now = device.worker.snapshot()
    assert now["answered"] == 32
    assert now["rounds"] - now["empty_rounds"] >= 32 * 1024 // 5120
