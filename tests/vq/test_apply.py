"""Effects of a session on real queues."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from vq import effects as e
from vq import virtio as v
from vq.apply import Applier
from vq.devices.net import FEATURES, NetDevice
from vq.errors import FrontendError
from vq_core.driver import DriverQueue
from vq_core.guest_memory import GuestMemory
from vq_core.plan import Plan
from vq_core.ports.null import NullPort
from vq_core.worker import Worker
from waiting import wait_for

VERSION_1 = v.mask(v.VIRTIO_F_VERSION_1)
LOG_ALL = v.mask(v.VHOST_F_LOG_ALL)


class Connection:
    """An applier on a network device, and the driver whose memory and rings it is told of."""

    def __init__(self) -> None:
        self.device = NetDevice("net", pairs=2)
        self.changes = 0
        self.apply = Applier(self.device, self.changed)
        self.memory = GuestMemory(1 << 20, guest_addr=0)
        self.drivers = [DriverQueue(self.memory, 64) for _ in range(4)]
        self.err = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self.apply(e.SetFeatures(VERSION_1))
        self.apply(e.SetMemory(self.regions))

    def changed(self) -> None:
        self.changes += 1

    @property
    def regions(self) -> tuple[e.MemoryRegion, ...]:
        return tuple(e.MemoryRegion(*row) for row in self.memory.regions)

    def config(self, index: int, **changes: Any) -> e.RingConfig:
        driver = self.drivers[index]
        desc, avail, used = driver.addresses
        fields: dict[str, Any] = {
            "index": index,
            "num": 64,
            "desc": desc,
            "avail": avail,
            "used": used,
            "base": 0,
            "flags": 0,
            "log_guest_addr": driver.guest_addresses[2],
            "kick_fd": driver.kick_fd,
            "call_fd": driver.call_fd,
            "err_fd": self.err,
            "packed": False,
            "enabled": True,
        }
        return e.RingConfig(**(fields | changes))

    def start(self, *indices: int, **changes: Any) -> None:
        for index in indices:
            self.apply(e.StartRing(self.config(index, **changes)))

    def close(self) -> None:
        for index in list(self.apply.rings):
            self.apply(e.StopRing(index))
        self.apply(e.SetMemory(()))
        self.memory.close()
        for driver in self.drivers:
            driver.close()
        os.close(self.err)


@pytest.fixture
def connection() -> Iterator[Connection]:
    connection = Connection()
    yield connection
    connection.close()


def signals(fd: int) -> int:
    try:
        return os.eventfd_read(fd)
    except BlockingIOError:
        return 0


def test_start_enable_stop(connection: Connection) -> None:
    connection.start(0, enabled=False)
    queue = connection.device.queues[0]
    assert (queue.started, queue.enabled, connection.device.port.sources, connection.device.port.targets) == (
        True,
        False,
        [],
        [],
    )
    connection.apply(e.EnableRing(0, True))
    assert (queue.live, connection.device.port.targets) == (True, [0])
    connection.start(3)
    assert connection.device.port.sources == [1]
    assert connection.apply(e.StopRing(0)) == 0
    assert not queue.started
    assert connection.changes == 4


def test_a_ring_needs_memory() -> None:
    applier = Applier(NetDevice("net", pairs=1))
    connection = Connection()
    try:
        with pytest.raises(FrontendError, match="no memory table"):
            applier(e.StartRing(connection.config(0)))
    finally:
        connection.close()


def test_what_the_engine_refuses_is_the_front_ends_fault(connection: Connection) -> None:
    with pytest.raises(FrontendError, match=r"StartRing.*one memory region"):
        connection.start(0, desc=1)
    assert not connection.device.queues[0].started
    with pytest.raises(FrontendError, match="overlap"):
        connection.apply(e.AddRegion(connection.regions[0]))
    with pytest.raises(FrontendError, match="no memory region"):
        connection.apply(e.RemoveRegion(e.MemoryRegion(1 << 50, 4096, 0, 0)))


def test_a_ring_whose_memory_goes_is_stopped_and_the_front_end_told(connection: Connection) -> None:
    connection.start(0, 1)
    connection.memory.add_region(1 << 16)
    connection.apply(e.AddRegion(connection.regions[1]))
    before = connection.changes
    connection.apply(e.RemoveRegion(connection.regions[1]))
    assert connection.device.queues[0].live
    assert (signals(connection.err), connection.changes) == (0, before)
    connection.apply(e.AddRegion(connection.regions[1]))
    connection.apply(e.RemoveRegion(connection.regions[0]))
    assert not connection.device.queues[0].started
    assert not connection.device.queues[1].started
    assert signals(connection.err) == 2
    assert connection.changes == before + 2
    assert connection.apply(e.StopRing(0)) == 0  # GET_VRING_BASE is answered all the same
    connection.apply(e.SetMemory(connection.regions))
    connection.start(0)
    assert connection.device.queues[0].live


def test_a_ring_goes_on_when_its_memory_is_there_again(connection: Connection) -> None:
    """With what was said meanwhile: descriptors, and whether it is enabled; at the place where it stood."""
    connection.start(0, 1, 2)
    queues = connection.device.queues
    calls = [os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC) for _ in range(2)]
    driver = connection.drivers[1]
    worker = Worker()
    thread = threading.Thread(target=worker.run)
    try:
        thread.start()
        worker.set_plan(Plan([(connection.device.port, 0, NullPort("null"), 0)]))
        for _ in range(5):
            driver.add([bytes(12) + b"packet"])
        driver.kick()
        assert driver.wait(60)
        assert len(driver.poll()) == 5
        worker.set_plan(Plan())
        connection.apply(e.SetMemory(()))
        assert not any(queue.started for queue in queues)
        connection.apply(e.SetCall(1, calls[0]))
        connection.apply(e.SetErr(1, calls[1]))
        connection.apply(e.EnableRing(2, False))
        assert connection.apply(e.StopRing(0)) == 0
        connection.memory.add_region(1 << 16)
        connection.apply(e.SetMemory(connection.regions[1:]))
        assert not any(queue.started for queue in queues)
        before = connection.changes
        connection.apply(e.AddRegion(connection.regions[0]))
        assert [queue.started for queue in queues] == [False, True, True, False]
        assert [queue.enabled for queue in queues[1:3]] == [True, False]
        assert connection.changes == before + 2
        worker.set_plan(Plan([(connection.device.port, 0, NullPort("null"), 0)]))
        for _ in range(3):
            driver.add([bytes(12) + b"packet"])
            driver.arm()
            driver.kick()
            assert len(wait_for(driver.poll)) == 1
            wait_for(lambda: signals(calls[0]))
        connection.apply(e.SetMemory(()))
        assert signals(calls[1]) == 1
        assert connection.apply(e.StopRing(1)) == 8
        connection.apply(e.SetMemory(connection.regions))
        assert [queue.started for queue in queues] == [False, False, True, False]
    finally:
        worker.set_plan(Plan())
        worker.stop()
        thread.join()
        for index in list(connection.apply.rings):
            connection.apply(e.StopRing(index))
        for fd in calls:
            os.close(fd)


def test_memory_may_go_as_a_whole(connection: Connection) -> None:
    connection.start(0)
    connection.apply(e.SetMemory(()))
    assert not connection.device.queues[0].started
    assert connection.apply.memory is None


def test_descriptors_are_replaced(connection: Connection) -> None:
    connection.start(1)
    fds = [os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC) for _ in range(2)]
    try:
        connection.apply(e.SetCall(1, fds[0]))
        assert signals(fds[0]) == 1
        connection.apply(e.SetErr(1, fds[1]))
        connection.apply(e.SetMemory(()))  # stops the ring
        assert (signals(fds[1]), signals(connection.err)) == (1, 0)
        connection.apply(e.SignalErr(1, fds[1]))
        assert signals(fds[1]) == 1
        connection.apply(e.StopRing(1))
    finally:
        for fd in fds:
            os.close(fd)


def test_logging_follows_feature_log_and_ring_flags(connection: Connection) -> None:
    """A used element shows which stores are logged: by giving back what a disabled transmitq holds."""
    log = os.memfd_create("log", os.MFD_CLOEXEC)
    os.ftruncate(log, 4096)
    page = connection.drivers[1].guest_addresses[2] // 4096
    driver, port = connection.drivers[1], connection.device.port

    def logged() -> bool:
        driver.add([bytes(12) + b"packet"])
        driver.publish()
        worker = Worker()
        thread = threading.Thread(target=worker.run)
        thread.start()
        worker.set_plan(Plan([(port, 0, NullPort("null"), 0)]))
        assert driver.wait(60)
        driver.poll()
        worker.set_plan(Plan())
        worker.stop()
        thread.join()
        found = os.pread(log, 4096, 0)
        os.pwrite(log, bytes(4096), 0)
        assert found in (bytes(4096), (1 << page).to_bytes(4096, "little"))
        return any(found)

    try:
        addresses = {"index": 1, "log_guest_addr": driver.guest_addresses[2]}
        connection.start(1)
        assert not logged()
        connection.apply(e.SetLog(log, 4096, 0))
        assert not logged()  # LOG_ALL is not acknowledged
        connection.apply(e.SetFeatures(VERSION_1 | LOG_ALL))
        assert not logged()  # the ring's flag is not set
        connection.apply(e.SetRingAddresses(**addresses, flags=v.VHOST_VRING_F_LOG))
        assert logged()
        connection.apply(e.SetRingAddresses(**addresses, flags=0))
        assert not logged()
        connection.apply(e.SetRingAddresses(**addresses, flags=v.VHOST_VRING_F_LOG))
        connection.apply(e.ClearLog())
        assert not logged()
        connection.apply(e.SetLog(log, 4096, 0))
        assert logged()
        connection.apply(e.SetFeatures(VERSION_1))
        assert not logged()
        connection.apply(e.StopRing(1))
        connection.apply(e.SetFeatures(VERSION_1 | LOG_ALL))
        connection.start(1, base=driver.used_idx, flags=v.VHOST_VRING_F_LOG)
        assert logged()
    finally:
        os.close(log)


def test_reset_keeps_what_was_negotiated(connection: Connection) -> None:
    """RESET_DEVICE leaves the negotiation as it is, and front-ends do not repeat SET_FEATURES for it."""
    features = VERSION_1 | v.mask(v.VIRTIO_NET_F_GUEST_CSUM)
    connection.apply(e.SetFeatures(features))
    connection.apply(e.ResetDevice())
    assert connection.apply.features == connection.device._features == features


@pytest.mark.shows("VIRTIO_NET_F_GUEST_ANNOUNCE")
def test_what_the_network_device_offers() -> None:
    device = NetDevice("net", pairs=3)
    assert len(device.queues) == device.offer.queue_count == 6
    assert device.offer.queue_num_answer == 3
    assert device.offer.features == FEATURES
    assert device.offer.max_mem_slots >= 8
    without = NetDevice("net", pairs=3, slots=False).offer.protocol_features
    assert device.offer.protocol_features ^ without == v.mask(v.VHOST_USER_PROTOCOL_F_CONFIGURE_MEM_SLOTS)
    with pytest.raises(ValueError, match="1 to 128"):
        NetDevice("net", pairs=129)
