"""Comings and goings: guests reboot, drivers leave, front-ends and back-ends die, and traffic resumes."""

from __future__ import annotations

import threading
import time

import pytest

from interop.backend import Backend, Pump
from interop.features import KINDS
from interop.guest import Guest
from interop.host import Host
from interop.process import wait_until
from interop.rig import Rig
from interop.traffic import assert_ping, await_path, bulk_data, send_bulk

pytestmark = pytest.mark.guest
RESUME_SECONDS = 15
SOME_MIB = 4
# The stand-in's TAP takes no offloads; with them off the same tests run on both.
PROPERTIES = KINDS["no_offloads"].properties
ROLES = {"back-end listens": "", "back-end connects": ",client"}


class Link:
    """A guest and the host over a TAP, in either socket role."""

    def __init__(self, rig: Rig, role: str = "") -> None:
        self.rig, self.client = rig, bool(role)
        self.host: Host = rig.host()
        self.backend: Backend = rig.backend(f"vhost:{rig.sock()}{role}", "tap:vq0", host=self.host, start=False)
        if self.client:
            self.guest = self.new_guest(boot=False)
            wait_until("QEMU listens", rig.sock().exists, 10, [self.guest.child])
            self.backend.start()
            self.guest.wait_booted()
        else:
            self.backend.start()
            self.guest = self.new_guest()
        self.configure()

    def new_guest(self, **more: bool) -> Guest:
        return self.rig.guest(self.rig.sock(), server=self.client, properties=PROPERTIES, **more)

    def configure(self) -> None:
        self.host.configure(1)
        self.guest.configure(2)
        self.works()

    def works(self) -> None:
        """Check the link in both directions."""
        assert_ping(self.guest, self.host, count=30)
        assert_ping(self.host, self.guest, count=30)
        send_bulk(self.guest, self.host, mib=SOME_MIB)
        send_bulk(self.host, self.guest, mib=SOME_MIB)


@pytest.fixture
def link(rig: Rig) -> Link:
    """Give a link whose back-end listens."""
    return Link(rig)


def _descriptors(backend: Backend) -> int:
    return len(backend.descriptors())


@pytest.mark.parametrize("how", ["reboot", "reset"])
def test_guest_reboots(link: Link, how: str) -> None:
    before = _descriptors(link.backend)
    for _ in range(2):
        getattr(link.guest, how)()
        link.guest.configure(2)
        link.works()
    assert _descriptors(link.backend) == before, "each reboot leaves a file descriptor behind"


def test_driver_is_removed_and_loaded_again(link: Link) -> None:
    before = _descriptors(link.backend)
    for _ in range(3):
        link.guest.rmmod()
        link.guest.modprobe()
        link.guest.configure(2)
        link.works()
    assert _descriptors(link.backend) == before, "each unbinding leaves a file descriptor behind"


def test_driver_leaves_and_comes_under_traffic(link: Link) -> None:
    """The rings stop while the host sends as fast as it can."""
    link.host.background(f"/bin/ping -q -n -f -s 1000 {link.guest.address}")
    for _ in range(3):
        link.guest.rmmod()
        link.guest.modprobe()
        link.guest.configure(2)
        await_path(link.guest, link.host)
    assert link.backend.child.running
    link.host.run("busybox pkill -INT -f 'ping -q -n -f'")
    link.works()


def test_guest_is_stopped_and_continued(link: Link) -> None:
    """QEMU stops the rings and starts them again at the place where they stood."""
    for _ in range(3):
        link.guest.qmp("stop")
        time.sleep(0.2)
        link.guest.qmp("cont")
        link.works()


@pytest.mark.parametrize("role", list(ROLES.values()), ids=list(ROLES))
def test_front_end_is_killed_and_another_comes(rig: Rig, role: str) -> None:
    link = Link(rig, role)
    before = _descriptors(link.backend)
    for _ in range(2):
        link.guest.kill()
        if link.client:
            rig.sock().unlink(missing_ok=True)  # QEMU had no time to take its socket away
        link.guest = link.new_guest()
        link.guest.configure(2)
        link.works()
    assert _descriptors(link.backend) == before, "each front-end leaves a file descriptor behind"


@pytest.mark.parametrize("role", list(ROLES.values()), ids=list(ROLES))
def test_back_end_is_killed_and_started_again(rig: Rig, role: str) -> None:
    link = Link(rig, role)
    for _ in range(2):
        link.backend.kill()
        assert link.guest.run("true").code == 0, "the guest has to outlive its back-end"
        link.backend.start()
        link.host.configure(1)  # the TAP went with the process that had made it
        seconds = await_path(link.guest, link.host, RESUME_SECONDS)
        rig.note(f"traffic resumes {seconds:.2f} s after the new back-end is up")
        link.works()


@pytest.mark.parametrize("role", list(ROLES.values()), ids=list(ROLES))
def test_back_end_ends_in_order_and_starts_again(rig: Rig, role: str) -> None:
    link = Link(rig, role)
    seconds = link.backend.stop()
    rig.note(f"ends {seconds:.2f} s after SIGTERM")
    assert link.guest.run("true").code == 0, "the guest has to outlive its back-end"
    link.backend.start()
    link.host.configure(1)
    await_path(link.guest, link.host, RESUME_SECONDS)
    link.works()


def test_connection_outlives_a_killed_back_end(rig: Rig) -> None:
    """A transfer between two guests goes on after the back-end between them was killed and started again."""
    backend = rig.backend(f"vhost:{rig.sock('a')}", f"vhost:{rig.sock('b')}")
    started = [rig.guest(rig.sock(name), boot=False, properties=PROPERTIES) for name in "ab"]
    first, second = (guest.wait_booted() for guest in started)
    first.configure(1)
    second.configure(2)
    await_path(first, second)
    bulk_data(first)
    failures: list[BaseException] = []

    def transfer() -> None:
        try:
            rig.note(f"64 MiB with two kills in {send_bulk(first, second):.1f} s")
        except BaseException as error:
            failures.append(error)

    begin = second.counters()["rx_bytes"]
    thread = threading.Thread(target=transfer)
    thread.start()
    for _ in range(2):
        time.sleep(1.5)
        assert thread.is_alive(), f"the transfer ended before the back-end was killed: {failures}"
        backend.kill()
        backend.start()
    thread.join(200)
    assert not thread.is_alive() and not failures, failures
    assert second.counters()["rx_bytes"] - begin > 64 << 20


def test_one_guest_of_a_patch_is_killed(rig: Rig) -> None:
    """The other one stays, and works with the new one."""
    backend = rig.backend(f"vhost:{rig.sock('a')}", f"vhost:{rig.sock('b')}")
    started = [rig.guest(rig.sock(name), boot=False) for name in "ab"]
    first, second = (guest.wait_booted() for guest in started)
    first.configure(1)
    second.configure(2)
    assert_ping(first, second, count=30)
    first.kill()
    # The one that stays sends on to nobody: what cannot be delivered must not fill its ring for good.
    second.check("arp -s 192.0.2.1 52:54:00:76:71:fe")
    second.run("/bin/ping -q -n -f -c 2000 -W 1 -w 2 192.0.2.1", 15)
    second.check("arp -d 192.0.2.1")
    first = rig.guest(rig.sock("a"))
    first.configure(1)
    assert_ping(first, second, count=30)
    send_bulk(second, first, mib=SOME_MIB)
    assert backend.child.running


def test_idle_pump_sleeps(rig: Rig) -> None:
    """Adaptive polling: a guest without traffic costs less than a hundredth of a core."""
    link = Link(rig)
    if not isinstance(link.backend, Pump):
        pytest.skip("the stand-in polls busily")
    time.sleep(1)
    before, begin = link.backend.cpu_seconds(), time.monotonic()
    time.sleep(5)
    share = (link.backend.cpu_seconds() - before) / (time.monotonic() - begin)
    rig.note(f"idle pump: {100 * share:.2f} % of a core")
    assert share < 0.01
