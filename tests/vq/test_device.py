"""Devices in Python, hosted for real and driven through their rings by the guest of vq.testing."""

from __future__ import annotations

import gc
import io
import logging
import os
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import vq
from driver_rig import every_layout
from vhost_rig import open_fds
from vq.payload import Region
from vq.testing import Guest, serving
from vq_core.guest_memory import GuestMemory
from waiting import wait_for

Serve = Callable[[vq.HostedDevice], str]
Connect = Callable[..., Guest]
pytest_plugins = ["vq.testing.plugin"]


class Echo(vq.Device):
    """Answers with what came, backwards."""

    def handle(self, queue: vq.DeviceQueue) -> None:
        for chain in queue:
            chain.write(chain.read()[::-1])
            chain.complete()


@every_layout
def test_chains_are_answered(vq_guest: Connect, layout: str) -> None:
    guest = vq_guest(Echo(), layout=layout, size=8)
    for number in range(1, 40):
        data = bytes([number]) * number
        assert guest.ask([data[:3], data[3:]], [number // 2, number]) == data[::-1]


def test_more_than_one_turn_holds_is_served(vq_guest: Connect) -> None:
    guest = vq_guest(Echo(), size=512)
    for number in range(200):
        guest.send(number.to_bytes(2, "big"), 2)
    assert [answer for _, answer in guest.used(200)] == [number.to_bytes(2, "little") for number in range(200)]


class Later(vq.Device):
    """Keeps its chains; what becomes of them is up to the test."""

    queues = ("first", "second")

    def __init__(self) -> None:
        self.kept: list[vq.DeviceChain] = []
        self.stops: list[str] = []
        self.resets = 0

    def handle(self, queue: vq.DeviceQueue) -> None:
        self.kept.extend(queue)

    def on_stop(self, queue: vq.DeviceQueue) -> None:
        self.stops.append(queue.name)

    def on_reset(self) -> None:
        self.resets += 1


@every_layout
def test_completion_in_any_order_from_any_thread(vq_guest: Connect, layout: str) -> None:
    device = Later()
    guest = vq_guest(device, layout=layout, queues=2)
    sent = [guest.send(bytes([number]), 1, queue=1) for number in range(8)]
    wait_for(lambda: len(device.kept) == 8)

    def complete(chains: list[vq.DeviceChain]) -> None:
        for chain in reversed(chains):
            chain.write(chain.read())
            assert chain.complete()

    threads = [threading.Thread(target=complete, args=(device.kept[part::2],)) for part in range(2)]
    for thread in threads:
        thread.start()
    answers = {buffer.id: answer for buffer, answer in guest.used(8, queue=1)}
    assert answers == {buffer.id: bytes([number]) for number, buffer in enumerate(sent)}
    for thread in threads:
        thread.join()


@every_layout
def test_what_is_out_when_a_ring_stops_comes_again(vq_guest: Connect, layout: str) -> None:
    device = Later()
    guest = vq_guest(device, layout=layout)
    for number in range(4):
        guest.send(bytes([number]), 1)
    wait_for(lambda: len(device.kept) == 4)
    first, *others = device.kept
    first.write(b"\0")
    first.complete()
    guest.used(1)
    base = guest.stop(0)
    assert device.stops == ["first"]
    assert not any(chain.alive or chain.complete(1) for chain in others)
    device.kept.clear()
    guest.start(0, base)
    wait_for(lambda: len(device.kept) == 3)
    assert [chain.read() for chain in device.kept] == [b"\1", b"\2", b"\3"]


def test_what_is_out_of_order_when_a_ring_stops_is_told(vq_guest: Connect, caplog: pytest.LogCaptureFixture) -> None:
    device = Later()
    guest = vq_guest(device)
    for number in range(3):
        guest.send(bytes([number]), 1)
    wait_for(lambda: len(device.kept) == 3)
    device.kept[1].complete()
    guest.used(1)
    with caplog.at_level(logging.WARNING):
        guest.stop(0)
    assert "2 chains were never completed" in caplog.text


# -- views --


class Probe(vq.Device):
    """Does what the test wants with each chain."""

    def __init__(self, act: Callable[[vq.DeviceChain], object]) -> None:
        self.act = act
        self.errors: list[Exception] = []

    def handle(self, queue: vq.DeviceQueue) -> None:
        for chain in queue:
            self.act(chain)
            if chain.alive:
                chain.complete()

    def on_error(self, queue: vq.DeviceQueue | None, error: Exception) -> None:
        self.errors.append(error)


@every_layout
def test_views_are_guest_memory(vq_guest: Connect, layout: str) -> None:
    kept: list[memoryview] = []

    def act(chain: vq.DeviceChain) -> None:
        assert [bytes(view) for view in chain.readable] == [b"abc", b"defg"]
        assert all(view.readonly for view in chain.readable)
        with pytest.raises(TypeError):
            chain.readable[0][0] = 0
        room = chain.writable
        assert [len(view) for view in room] == [2, 5]
        room[0][:] = b"xy"
        numbers = np.frombuffer(room[1], np.uint8)
        numbers[:] = range(5)
        with pytest.raises(BufferError, match="still uses a view"):
            chain.complete(7)
        assert chain.alive
        del numbers
        kept.extend(room)
        assert chain.complete(7)

    assert vq_guest(Probe(act), layout=layout).ask([b"abc", b"defg"], [2, 5]) == b"xy\0\1\2\3\4"
    for view in kept:
        with pytest.raises(ValueError, match="released"):
            view[0]


def test_a_slice_keeps_a_chain_from_being_given_back(vq_guest: Connect) -> None:
    def act(chain: vq.DeviceChain) -> None:
        part = chain.writable[0][1:3]
        with pytest.raises(BufferError):
            chain.complete(4)
        part[:] = b"!!"
        part.release()
        assert chain.complete(4)

    assert vq_guest(Probe(act)).ask(b"", 4)[1:3] == b"!!"


def test_wrong_use_is_an_error_and_touches_nothing(vq_guest: Connect) -> None:
    def act(chain: vq.DeviceChain) -> None:
        with pytest.raises(ValueError, match="room for 4"):
            chain.write(b"12345")
        with pytest.raises(ValueError, match="room for 4"):
            chain.complete(5)
        chain.write(b"12")
        with pytest.raises(ValueError, match="room for 4"):
            chain.write(b"345")
        with pytest.raises(TypeError):
            chain.write("text")  # type: ignore[arg-type]
        assert chain.complete()
        for wrong in (chain.complete, chain.read, chain.refuse, lambda: chain.write(b"1"), lambda: chain.writable):
            with pytest.raises(ValueError, match="completed already"):
                wrong()

    assert vq_guest(Probe(act)).ask(b"q", 4) == b"12"


def test_a_view_keeps_its_memory_mapped(vq_guest: Connect) -> None:
    """The front-end takes all memory away while a view of it is out: what is read is what was there."""
    device = Later()
    guest = vq_guest(device)
    guest.send(b"do not go", 4)
    wait_for(lambda: device.kept)
    view = device.kept[0].readable[0]
    guest.stop(0)
    with GuestMemory(1 << 20) as other:
        row = other.regions[0]
        guest.frontend.set_mem_table([Region(*row[:4])], [row[4]])
        assert bytes(view) == b"do not go"


@every_layout
@given(data=st.data())
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_places_in_a_chain_are_those_of_a_file(vq_guest: Connect, layout: str, data: st.DataObject) -> None:
    """Whatever the segments: reads, writes and seeks do what they do to a file in memory."""
    sent = data.draw(st.lists(st.binary(min_size=1, max_size=9), min_size=1, max_size=4))
    room = data.draw(st.lists(st.integers(1, 9), min_size=1, max_size=4))
    script = data.draw(st.lists(st.tuples(st.integers(0, 40), st.integers(0, 12), st.binary(max_size=12)), max_size=6))
    read, written = io.BytesIO(b"".join(sent)), bytearray(sum(room))

    def act(chain: vq.DeviceChain) -> None:
        reader, writer = vq.ChainReader(chain), vq.ChainWriter(chain)
        chain.write_at(0, bytes(len(written)))
        for place, count, text in script:
            assert reader.seek(place) == read.seek(place)
            assert reader.read(count) == read.read(count)
            assert reader.tell() == read.tell()
            writer.seek(place)
            fits = text[: max(0, len(written) - place)]
            if text and not fits:
                with pytest.raises(OSError, match="no more"):
                    writer.write(text)
            else:
                assert writer.write(text) == len(fits)
                written[place : place + len(fits)] = fits
        assert reader.seek(0) == 0
        assert reader.readall() == read.getvalue()
        chain.complete(chain.writable_bytes)

    device = Probe(act)
    with vq_guest(device, layout=layout) as guest:
        assert guest.ask(sent, room) == bytes(written)
    assert not device.errors


def test_a_request_over_the_limit_breaks_the_queue_and_room_is_cut(vq_guest: Connect) -> None:
    class Small(Echo):
        max_bytes = 8

        def handle(self, queue: vq.DeviceQueue) -> None:
            for chain in queue:
                chain.write(bytes([chain.writable_bytes]))
                chain.complete()

    guest = vq_guest(Small(), queues=1)
    assert guest.ask(b"12345678", [3, 100]) == b"\x08"
    guest.timeout = 0.3
    with pytest.raises(vq.BackendError, match="stopped by the back-end"):
        guest.ask(b"123456789", 1)


# -- errors --


def test_a_front_end_cannot_fill_the_log(vq_guest: Connect, caplog: pytest.LogCaptureFixture) -> None:
    """Stops with chains that are lost, and requests that a device fails at, again and again."""

    class Faulty(Later):
        def handle(self, queue: vq.DeviceQueue) -> None:
            super().handle(queue)
            if len(self.kept) == 2:
                self.kept[1].complete()
            elif self.kept:
                raise RuntimeError(f"no idea {len(self.kept)}")

    device = Faulty()
    guest = vq_guest(device)
    with caplog.at_level(logging.WARNING):
        for number in range(60):
            device.kept.clear()
            for _ in range(1 + number % 2):
                guest.drivers[0].add([b"x"], [1])
            guest.drivers[0].publish()
            guest.drivers[0].kick()
            guest.frontend.barrier()
            wait_for(lambda: device.kept)
            guest.stop(0)
            guest.drivers[0].reset()
            guest.start(0)
    assert len([record for record in caplog.records if record.name == "vq.device"]) < 20


def test_an_error_breaks_its_queue_alone(vq_serve: Serve, caplog: pytest.LogCaptureFixture) -> None:
    class Faulty(Later):
        def __init__(self) -> None:
            super().__init__()
            self.errors: list[tuple[str | None, str]] = []

        def handle(self, queue: vq.DeviceQueue) -> None:
            for chain in queue:
                if queue.index == 0:
                    raise RuntimeError("no idea")
                chain.complete()

        def on_error(self, queue: vq.DeviceQueue | None, error: Exception) -> None:
            self.errors.append((queue.name if queue else None, str(error)))

    device = Faulty()
    path = vq_serve(device)
    with caplog.at_level(logging.WARNING), Guest(path, queues=2) as guest:
        guest.send(b"?", queue=0)
        wait_for(lambda: device.errors)
        assert device.errors == [("first", "no idea")]
        assert guest.ask(b"ok", queue=1) == b""
        wait_for(lambda: "what serves it in the back-end has failed" in caplog.text)
    with Guest(path, queues=2) as guest:
        assert guest.ask(b"again", queue=1) == b""


# -- configuration space --


class Config(vq.ConfigLayout):
    capacity: vq.le64 = 2048
    mac: Annotated[bytes, 6] = b"\x52\x54"
    level: vq.u8 = vq.writable(3)
    flags: vq.le16


class Configured(vq.Device):
    Config = Config

    def __init__(self) -> None:
        self.written: list[frozenset[str]] = []

    def handle(self, queue: vq.DeviceQueue) -> None:
        for chain in queue:
            chain.complete()

    def on_config_written(self, names: frozenset[str]) -> None:
        self.written.append(names)


def test_fields_become_the_bytes_of_the_space(vq_guest: Connect) -> None:
    device = Configured()
    guest = vq_guest(device)
    assert Config.SIZE == 17
    assert guest.config(17) == (2048).to_bytes(8, "little") + b"\x52\x54\0\0\0\0" + b"\3" + b"\0\0"
    device.config.update(capacity=1 << 40, flags=0x1234)
    guest.wait_config_change()
    assert guest.config_changes == 1
    assert guest.config(8) == (1 << 40).to_bytes(8, "little")
    device.config.capacity = 1 << 40  # as it is
    device.config.flags = 1
    guest.wait_config_change()
    assert (guest.config(2, 15), guest.config_changes) == (b"\1\0", 2)


def test_a_driver_writes_what_it_may(vq_guest: Connect) -> None:
    device = Configured()
    guest = vq_guest(device)
    guest.frontend.set_config(14, b"\x09")
    guest.frontend.barrier()
    assert (device.config.level, device.written) == (9, [frozenset({"level"})])
    for offset, data in ((0, b"\1"), (14, b"\1\1"), (13, b"\1\1")):
        with pytest.raises(vq.BackendError):
            guest.frontend.set_config(offset, data)
    assert device.config.pack() == guest.config(17)
    assert device.config.level == 9


@pytest.mark.parametrize(
    "change",
    [{"capacity": -1}, {"capacity": 1 << 64}, {"level": 256}, {"mac": b"1234567"}, {"level": "3"}, {"size": 1}],
)
def test_a_wrong_value_is_refused(change: dict[str, Any]) -> None:
    config = Config()
    before = config.pack()
    with pytest.raises(vq.UsageError, match=next(iter(change))):
        config.update(**{"flags": 7} | change)
    assert config.pack() == before


def test_a_layout_goes_on_where_its_base_ends() -> None:
    class More(Config):
        serial: Annotated[bytes, 4] = b"next"

    assert More().pack() == Config().pack() + b"next"


def test_a_layout_that_cannot_be_is_refused() -> None:
    with pytest.raises(vq.UsageError, match=r"Odd.size is of no type"):
        type("Odd", (vq.ConfigLayout,), {"__annotations__": {"size": int}})
    with pytest.raises(vq.UsageError, match="257 bytes"):
        type("Big", (vq.ConfigLayout,), {"__annotations__": {"data": Annotated[bytes, 257]}})
    with pytest.raises(vq.UsageError, match=r"Odd.update hides"):
        type("Odd", (vq.ConfigLayout,), {"__annotations__": {"update": vq.u8}})
    for value in (2048, b"serial", vq.writable(1), vq.writable(b"x")):
        with pytest.raises(vq.UsageError, match=r"Odd.size has no type"):
            type("Odd", (vq.ConfigLayout,), {"size": value})


def test_a_layout_may_have_more_than_fields() -> None:
    class More(Config):
        _CAPACITY_MAX = 1 << 40
        capacity = 7  # another beginning for a field of the base

        @property
        def full(self) -> bool:
            return self.capacity == self._CAPACITY_MAX

    assert (More().capacity, More().full) == (7, False)


@pytest.fixture
def switching() -> Iterator[None]:
    """Threads take turns as often as they can."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


@pytest.mark.usefixtures("switching")
def test_what_both_sides_change_at_once_is_kept() -> None:
    """A field is the device's, another one the driver's: neither takes the other's change back."""
    config = Config()
    rounds = 3000
    written: list[int] = []

    def driver() -> None:
        for number in range(rounds):
            config.write(14, bytes([number % 256]), migration=False)
            written.append(config.level)

    thread = threading.Thread(target=driver)
    thread.start()
    for number in range(rounds):
        config.capacity = number
        assert config.capacity == number
    thread.join()
    assert written == [number % 256 for number in range(rounds)]


# -- life --


def test_what_waits_for_the_loop_is_bounded(tmp_path: Path) -> None:
    """A thread assigns a field again and again, while nobody serves the device, and after its end."""
    device = Configured()
    for number in range(1000):
        device.config.capacity = number
    assert len(device._calls) == 1
    with serving(device, tmp_path / "s"):
        wait_for(lambda: not device._calls)
    for number in range(1000):
        device.config.capacity = number
        device.call(print)
    assert not device._calls


def test_a_device_that_runs_is_not_closed(tmp_path: Path) -> None:
    before = open_fds()
    device = Configured()
    with serving(device, tmp_path / "s"), Guest(tmp_path / "s") as guest:
        with pytest.raises(vq.UsageError, match="close its back-end or server first"):
            device.close()
        assert guest.ask(b"x") is not None
    del device, guest
    gc.collect()
    assert open_fds() == before


def test_nothing_is_left_behind(tmp_path: Path) -> None:
    before = open_fds()
    for _ in range(3):
        with serving(Configured(), tmp_path / "s") as server, Guest(tmp_path / "s") as guest:
            guest.ask(b"x")
            assert server.backend is not None
    Configured()  # never served
    gc.collect()
    assert open_fds() == before


def test_descriptors_of_its_own_are_watched(vq_guest: Connect) -> None:
    """What comes at a descriptor goes into a chain that has waited for it."""

    class Wire(vq.Device):
        def __init__(self) -> None:
            self.ours, self.theirs = os.pipe()
            self.watch(self.ours, self.arrived)

        def handle(self, queue: vq.DeviceQueue) -> None:
            pass

        def arrived(self) -> None:
            data = os.read(self.ours, 100)
            chain = self.chains[0].pop()
            assert chain is not None
            chain.write(data)
            chain.complete()

        def close(self) -> None:
            super().close()
            os.close(self.ours)
            os.close(self.theirs)

    device = Wire()
    guest = vq_guest(device)
    for text in (b"one", b"two"):
        guest.send(room=10)
        guest.frontend.barrier()
        os.write(device.theirs, text)
        assert guest.used(1)[0][1] == text


def test_reset_and_features_reach_the_device(vq_guest: Connect) -> None:
    class Told(Later):
        features = (5,)

        def __init__(self) -> None:
            super().__init__()
            self.accepted: list[int] = []

        def on_features(self, features: int) -> None:
            self.accepted.append(features)

    device = Told()
    guest = vq_guest(device, features=1 << 5)
    assert device.accepted[-1] >> 5 & 1
    guest.frontend.reset_device()
    assert device.resets


def test_a_queue_tells_people_which_it_is() -> None:
    device = type("Two", (vq.Device,), {"queues": ("first", "second")})()
    assert "second" in repr(device.chains[1])
    device.close()
