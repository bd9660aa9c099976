"""Comings and goings: guests reboot, drivers leave, front-ends and back-ends die, and traffic resumes."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Iterator

import pytest

from interop.backend import Backend, Pump
from interop.features import KINDS, assert_kind
from interop.guest import Guest
from interop.host import Host
from interop.process import wait_until
from interop.rig import Rig
from interop.traffic import assert_ping, await_path, bulk_data, send_bulk

pytestmark = pytest.mark.guest
RESUME_SECONDS = 15
SOME_MIB = 4
# The stand-in's TAP takes no offloads; with them off the same tests run on both.
LAYOUTS = {"split": KINDS["no_offloads"], "packed": KINDS["packed_no_offloads"]}
OTHER = {"split": "packed", "packed": "split"}
ROLES = {"back-end listens": "", "back-end connects": ",client"}


class Link:
    """A guest and the host over a TAP, in either socket role, with either layout."""

    def __init__(self, rig: Rig, role: str = "", layout: str = "split") -> None:
        self.rig, self.client, self.layout = rig, bool(role), layout
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
        properties = LAYOUTS[self.layout].properties
        return self.rig.guest(self.rig.sock(), server=self.client, properties=properties, **more)

    def configure(self) -> None:
        self.host.configure(1)
        self.guest.configure(2)
        self.works()
        if "TAP offloads" not in self.backend.lacks:
            assert_kind(self.guest, LAYOUTS[self.layout])

    def works(self) -> None:
        """Check the link in both directions."""
        assert_ping(self.guest, self.host, count=30)
        assert_ping(self.host, self.guest, count=30)
        send_bulk(self.guest, self.host, mib=SOME_MIB)
        send_bulk(self.host, self.guest, mib=SOME_MIB)


@pytest.fixture(scope="module", params=LAYOUTS)
def link(request: pytest.FixtureRequest) -> Iterator[Link]:
    """Give a link of each layout, whose back-end listens and whose guest lives on from test to test."""
    with Rig(request.config.getoption("--backend"), f"life[{request.param}]") as rig:
        yield Link(rig, layout=request.param)


@pytest.fixture(params=[(role, layout) for role in ROLES for layout in LAYOUTS], ids=" ".join)
def own_link(request: pytest.FixtureRequest, rig: Rig) -> Link:
    """Give a link of this test's own, in each role with each layout."""
    role, layout = request.param
    return Link(rig, ROLES[role], layout)


def _descriptors(backend: Backend) -> int:
    return len(backend.descriptors())


def test_guest_reboots(link: Link) -> None:
    """As a user does it, and by the reset button."""
    before = _descriptors(link.backend)
    for reboot in (link.guest.reboot, link.guest.reset):
        reboot()
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
    pid = f"{link.host.scratch}/flood"
    link.host.background(f"echo $$ > {pid}; exec /bin/ping -q -n -f -s 1000 {link.guest.address}")
    for _ in range(3):
        link.guest.rmmod()
        link.guest.modprobe()
        link.guest.configure(2)
        await_path(link.guest, link.host)
    assert link.backend.child.running
    link.host.check(f"kill $(cat {pid})")
    link.works()


@pytest.mark.shows("GET_VRING_BASE", "SET_VRING_BASE")
def test_guest_is_stopped_and_continued(link: Link) -> None:
    """QEMU stops the rings and starts them again at the place where they stood."""
    for _ in range(3):
        link.guest.qmp("stop")
        time.sleep(0.2)
        link.guest.qmp("cont")
        link.works()


def test_idle_pump_sleeps(link: Link) -> None:
    """Adaptive polling: a guest without traffic costs less than a hundredth of a core."""
    if not isinstance(link.backend, Pump):
        pytest.skip("the stand-in polls busily")
    time.sleep(1)
    before, begin = link.backend.cpu_seconds(), time.monotonic()
    time.sleep(4)
    share = (link.backend.cpu_seconds() - before) / (time.monotonic() - begin)
    link.rig.note(f"idle pump: {100 * share:.2f} % of a core")
    assert share < 0.01


@pytest.mark.parametrize("role", list(ROLES.values()), ids=list(ROLES))
def test_front_end_is_killed_and_another_comes(rig: Rig, role: str) -> None:
    """The other one has the other layout, each time."""
    link = Link(rig, role)
    before = _descriptors(link.backend)
    for _ in range(2):
        link.guest.kill()
        if link.client:
            rig.sock().unlink(missing_ok=True)  # QEMU had no time to take its socket away
        link.layout = OTHER[link.layout]
        link.guest = link.new_guest()
        link.configure()
    assert _descriptors(link.backend) == before, "each front-end leaves a file descriptor behind"


def test_back_end_ends_and_is_started_again(own_link: Link) -> None:
    """In order, and twice by SIGKILL."""
    link = own_link
    for kill in (False, True, True):
        if kill:
            link.backend.kill()
        else:
            link.rig.note(f"ends {link.backend.stop():.2f} s after SIGTERM")
        assert link.guest.run("true").code == 0, "the guest has to outlive its back-end"
        link.backend.start()
        link.host.configure(1)  # the TAP went with the process that had made it
        seconds = await_path(link.guest, link.host, RESUME_SECONDS)
        link.rig.note(f"traffic resumes {seconds:.2f} s after the new back-end is up")
        link.works()


@pytest.mark.parametrize(("kind", "mib", "kills"), [("no_offloads", 64, 2), ("packed_chains", 16, 5)])
def test_connection_outlives_a_killed_back_end(rig: Rig, kind: str, mib: int, kills: int) -> None:
    """Transfers between two guests go on after the back-end between them was killed and started again.

    A packed ring tells by its own marks where it stands; chains of many slots must not mislead.
    """
    backend = rig.backend(f"vhost:{rig.sock('a')}", f"vhost:{rig.sock('b')}")
    if "packed" in kind:
        backend.requires("software completion")  # nor does the stand-in ask a packed ring
    started = [rig.guest(rig.sock(name), boot=False, properties=KINDS[kind].properties) for name in "ab"]
    first, second = (guest.wait_booted() for guest in started)
    first.configure(1)
    second.configure(2)
    await_path(first, second)
    if isinstance(backend, Pump):
        for guest in (first, second):
            assert_kind(guest, KINDS[kind])
    bulk_data(first, mib)
    bulk_data(second, mib)
    failures: list[BaseException] = []
    enough = threading.Event()

    def transfer() -> None:
        try:
            for ends in itertools.cycle([(first, second), (second, first)]):
                rig.note(f"{mib} MiB between kills in {send_bulk(*ends, mib=mib):.1f} s")
                if enough.is_set():
                    return
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=transfer)
    thread.start()
    for _ in range(kills):
        time.sleep(3 / kills)
        assert thread.is_alive(), failures
        backend.kill()
        backend.start()
    enough.set()
    thread.join(200)
    assert not thread.is_alive() and not failures, failures


def test_one_guest_of_a_patch_is_killed(rig: Rig) -> None:
    """The other one stays, and works with the new one; then it is killed itself. One of the two is on packed rings."""
    backend = rig.backend(f"vhost:{rig.sock('a')}", f"vhost:{rig.sock('b')}")
    kinds = dict(zip("ab", (KINDS["defaults"], KINDS["packed_defaults"]), strict=True))
    guests = {name: rig.guest(rig.sock(name), boot=False, properties=kind.properties) for name, kind in kinds.items()}
    for number, guest in enumerate(guests.values(), 1):
        guest.wait_booted().configure(number)
    for number, (name, other) in enumerate(("ab", "ba"), 1):
        stays = guests[other]
        assert_ping(guests[name], stays, count=30)
        guests[name].kill()
        # The one that stays sends on to nobody: what cannot be delivered must not fill its ring for good.
        gone = guests[name].address
        stays.check(f"arp -s {gone} 52:54:00:76:71:fe")
        stays.run(f"/bin/ping -q -n -f -c 2000 -W 1 -w 2 {gone}", 15)
        stays.check(f"arp -d {gone}")
        guests[name] = rig.guest(rig.sock(name), properties=kinds[name].properties)
        guests[name].configure(number)
        assert_ping(guests[name], stays, count=30)
        send_bulk(stays, guests[name], mib=SOME_MIB)
    if isinstance(backend, Pump):
        for name, kind in kinds.items():
            assert_kind(guests[name], kind)
    assert backend.child.running
