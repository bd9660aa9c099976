"""vq.testing and the drivers of a front-end, as somebody uses them who tests a device of their own."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import vq
from vq import virtio as v
from vq.errors import BackendError, UsageError
from vq.testing import Guest, serving
from vq_core.queue import Queue

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
Connect = Callable[..., vq.Frontend]
Serve = Callable[[vq.HostedDevice], str]
pytest_plugins = ["vq.testing.plugin"]

FEATURES = v.mask(v.VIRTIO_F_VERSION_1, v.VHOST_USER_F_PROTOCOL_FEATURES)


class Idle(vq.HostedDevice):
    """Two queues that nobody serves; split rings only."""

    def __init__(self) -> None:
        self.name = "idle"
        self.queues = [Queue(0, "queue0"), Queue(1, "queue1")]
        self.offer = vq.Offer(FEATURES, v.mask(v.VHOST_USER_PROTOCOL_F_MQ), queue_count=2, queue_num_answer=2)


def outside(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """Run pytest away from this tree and its conftest.py."""
    plugin = ["-p", "vq.testing.plugin", "-p", "no:cacheprovider"]
    command = [sys.executable, "-m", "pytest", "-q", *plugin, *words]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True)


def test_a_device_is_tested_by_the_fixtures(tmp_path: Path) -> None:
    examples = ("test_reverser.py", "test_key_store.py")
    for name in examples:
        (tmp_path / name).write_text((EXAMPLES / name).read_text())
    run = outside(tmp_path, *examples)
    assert run.returncode == 0, run.stdout + run.stderr
    assert "11 passed" in run.stdout


def test_a_wrong_device_fails(tmp_path: Path) -> None:
    text = (EXAMPLES / "test_reverser.py").read_text()
    assert "chain.read()[::-1]" in text
    (tmp_path / "test_reverser.py").write_text(text.replace("chain.read()[::-1]", "chain.read()"))
    run = outside(tmp_path, "test_reverser.py", "-k", "split")
    assert run.returncode == 1, run.stdout + run.stderr
    assert "2 failed" in run.stdout


def test_the_fixtures_cost_nothing_unused(tmp_path: Path) -> None:
    (tmp_path / "test_other.py").write_text(
        "import sys\n\ndef test_other():\n"
        "    assert 'vq.testing.plugin' in sys.modules\n"
        "    heavy = ['numpy', 'hypothesis', 'vq.session', 'vq.testing.guest', 'vq_core']\n"
        "    assert [name for name in heavy if name in sys.modules] == []\n"
    )
    run = outside(tmp_path, "-p", "no:hypothesispytest", "test_other.py")
    assert "1 passed" in run.stdout, run.stdout + run.stderr


def test_strategies_say_what_they_need() -> None:
    code = "import sys; sys.modules['hypothesis'] = None; import vq.testing.strategies"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "pip install hypothesis" in run.stderr


def test_two_drivers_share_a_memory(vq_frontend: Connect) -> None:
    device = Idle()
    frontend = vq_frontend(device)
    one, other = frontend.driver(0, 4), frontend.driver(1, 8, "split")
    assert (one.ring.layout, other.ring.layout) == ("split", "split")
    assert one.ring.memory is other.ring.memory
    assert dict(frontend.drivers) == {0: one, 1: other}
    assert [queue.started for queue in device.queues] == [True, True]
    other.close()
    assert [queue.started for queue in device.queues] == [True, False]
    frontend.close()
    assert dict(frontend.drivers) == {}


def test_what_a_driver_cannot_be(vq_frontend: Connect) -> None:
    frontend = vq_frontend(Idle())
    with pytest.raises(UsageError, match="split and packed"):
        frontend.driver(0, layout="round")
    with pytest.raises(UsageError, match="power of two"):
        frontend.driver(0, 3)
    frontend.driver(0)
    with pytest.raises(UsageError, match="has a driver"):
        frontend.driver(0)
    with pytest.raises(BackendError, match="RING_PACKED in"):
        frontend.driver(1, layout="packed")


def test_a_layout_that_is_not_offered(vq_frontend: Connect) -> None:
    with pytest.raises(BackendError, match="RING_PACKED in"):
        vq_frontend(Idle()).driver(0, layout="packed")


def test_a_device_that_does_not_answer(vq_frontend: Connect) -> None:
    driver = vq_frontend(Idle()).driver(0)
    with pytest.raises(BackendError, match=r"nothing was used within 0\.05 s of 1 .*does the device complete"):
        driver.ask(b"hello", timeout=0.05)


class Failing(vq.Device):
    """Two queues; answers what it can read, and fails at what is no number."""

    queues = ("first", "second")

    def handle(self, queue: vq.DeviceQueue) -> None:
        for chain in queue:
            chain.write(b"%d" % (int(chain.read()) + 1))
            chain.complete()


# Were it not for the error descriptor, these would wait for ten minutes.
@pytest.mark.parametrize("layout", ["split", "packed"])
def test_a_device_that_fails_is_told_at_once(vq_serve: Serve, layout: str) -> None:
    with vq.Frontend.connect(vq_serve(Failing()), timeout=600) as frontend:
        driver = frontend.driver(0, layout=layout)
        good, bad = driver.add([b"41"], [2]), driver.add([b"x"], [2])
        driver.kick()
        assert [(buffer, buffer.written(length)) for buffer, length in driver.wait()] == [(good, b"42")]
        with pytest.raises(BackendError, match="queue 0 is stopped by the back-end; its log says why"):
            driver.wait()
        assert frontend.driver(1).ask(b"1", room=1) == b"2"
        driver.stop()
        driver.start()
        with pytest.raises(BackendError, match="queue 0 is stopped by the back-end"):  # the request comes again
            driver.wait()
        assert bad.id >= 0


@pytest.mark.parametrize("layout", ["split", "packed"])
def test_a_guest_is_told_of_a_device_that_fails(vq_guest: Callable[..., Guest], layout: str) -> None:
    guest = vq_guest(Failing(), layout=layout, timeout=600)
    guest.send(b"41", room=2)
    guest.send(b"x", room=2)
    assert [answer for _, answer in guest.used()] == [b"42"]
    for _ in range(2):
        with pytest.raises(BackendError, match="queue 0 is stopped by the back-end; its log says why"):
            guest.used()
    assert guest.ask(b"1", room=1, queue=1) == b"2"


def test_a_guest_says_which_queues_it_has(vq_guest: Callable[..., Guest], vq_serve: Serve) -> None:
    assert len(vq_guest(Failing()).drivers) == 2  # all that the device has
    assert len(vq_guest(Failing(), queues=1).drivers) == 1
    guest = vq_guest(vq_serve(Failing()))
    for queue in (1, -1, "first"):
        with pytest.raises(UsageError, match=r"has started 1 of them, from 0 on; give it as many by queues="):
            guest.ask(b"1", room=1, queue=queue)


def test_a_queue_is_an_index(vq_frontend: Connect) -> None:
    with pytest.raises(UsageError, match="queue is 'first'; give its index"):
        vq_frontend(Failing()).driver("first")  # type: ignore[arg-type]


def test_a_change_that_does_not_come_is_told(vq_guest: Callable[..., Guest]) -> None:
    guest = vq_guest(Failing())
    guest.timeout = 0.05
    with pytest.raises(BackendError, match=r"one more is expected within 0\.05 s"):
        guest.wait_config_change()


def test_a_request_finds_room_in_the_memory(vq_frontend: Connect) -> None:
    driver = vq_frontend(Idle()).driver(0, memory_bytes=1 << 20)
    with pytest.raises(MemoryError, match=r"make it larger \(memory_bytes\)"):
        driver.add([bytes(2 << 20)])
    with pytest.raises(ValueError, match="bytes for the device to read, or room for it to write"):
        driver.ask()


def test_a_guest_without_a_configuration_space(vq_guest: Callable[..., Guest]) -> None:
    with pytest.raises(UsageError, match=r"has no configuration space; .* a class Config"):
        vq_guest(Failing()).config(4)


@pytest.mark.parametrize("data", [b"41", bytearray(b"41"), memoryview(b"41"), [b"4", b"", bytearray(b"1")]])
def test_a_guest_sends_bytes_of_any_kind(vq_guest: Callable[..., Guest], data: Any) -> None:
    assert vq_guest(Failing()).ask(data, room=2) == b"42"


def test_a_guest_sends_no_text(vq_guest: Callable[..., Guest]) -> None:
    with pytest.raises(TypeError, match="bytes-like"):
        vq_guest(Failing()).ask("41", room=2)  # type: ignore[arg-type]


def test_what_ended_the_server_is_told_rather_than_its_silence(tmp_path: Path) -> None:
    class Leaving(vq.Device):
        def handle(self, queue: vq.DeviceQueue) -> None:
            raise SystemExit(3)

    def ask() -> None:
        with Guest(path) as guest:
            guest.timeout = 0.1
            guest.ask(room=1)

    path = tmp_path / "s"
    with pytest.raises(SystemExit) as ended, serving(Leaving(), path):
        ask()
    assert ended.value.code == 3
    assert isinstance(ended.value.__cause__, BackendError)
