"""QEMU moves a guest by postcopy: it runs at its new place while most of its memory is still on the way.

The destination's back-end may meet pages that have not come, in rings and in buffers, and waits for each; how many is
noted, as QEMU hears of each. How often that happens hangs on the guest, which touches most pages before its devices do:
that a back-end waits for them is shown in tests/vq/test_postcopy.py.
"""

from __future__ import annotations

import re
import time
from pathlib import Path

import pytest

from interop import migration
from interop.features import KINDS
from interop.guest import Guest
from interop.host import Host, Station
from interop.process import wait_until
from interop.rig import Rig
from interop.traffic import assert_ping, bulk_data, listening

pytestmark = [
    pytest.mark.guest,
    pytest.mark.skipif(not Path("/dev/userfaultfd").exists(), reason="no /dev/userfaultfd"),
]
LAYOUTS = {"split": KINDS["defaults"], "packed": KINDS["packed_defaults"]}
MIB = 1 << 20
SLOWLY = {"max-bandwidth": 16 * MIB, "downtime-limit": 100, "max-postcopy-bandwidth": 16 * MIB}
TRACE = ("-trace", "vhost_user_postcopy_fault_handler_found")  # a line for each page that a back-end asks for
DIRTIER = "while true; do busybox dd if=/dev/urandom of=/tmp/dirty bs=1048576 count=24 conv=notrunc 2>/dev/null; done"
SECONDS = 90


def leave_traces(guest: Guest, mib: int) -> None:
    """Write to memory that is free again then: what the guest makes buffers of next must come from its old place."""
    guest.check(f"busybox yes | busybox head -c {mib * MIB} > /tmp/traces; rm /tmp/traces", 60)


class Bulk:
    """Random data on its way by TCP while the guest moves."""

    def __init__(self, source: Station, target: Station, port: int, mib: int) -> None:
        self.target, self.source, self.mib = target, source, mib
        path, self.digest = bulk_data(source, mib)
        self.result = f"{target.scratch}/moved{port}"
        digest = f"{{ busybox sha256sum > {self.result}.part; mv {self.result}.part {self.result}; }}"
        target.background(f"sleep {2 * SECONDS} | busybox nc -l -p {port} | {digest}")
        wait_until(f"{target.name} listens", listening(target, port), 10)
        source.background(f"busybox nc {target.address} {port} < {path}")

    def came_whole(self, target: Station) -> bool:
        """Whether everything has come; what has changed on its way fails at once."""
        if target.run(f"[ -e {self.result} ]").code != 0:
            return False
        assert target.check(f"cat {self.result}").split()[0] == self.digest
        return True


def asked(guest: Guest) -> int:
    """Pages that back-ends have asked QEMU for."""
    return len(re.findall("vhost_user_postcopy_fault_handler_found", guest.child.errors()))


@pytest.mark.shows("POSTCOPY_ADVISE", "POSTCOPY_LISTEN", "POSTCOPY_END", "VHOST_USER_PROTOCOL_F_PAGEFAULT")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_guest_moves_by_postcopy_under_checked_traffic(rig: Rig, layout: str) -> None:
    host: Host = rig.host()
    kind = LAYOUTS[layout]
    backend = rig.backend(
        f"vhost:{rig.sock('a')},postcopy", f"vhost:{rig.sock('b')},postcopy", "tap:vq0", host=host, options=["-vv"]
    )
    source = rig.guest(rig.sock("a"), properties=kind.properties)
    source.modprobe()
    source.configure(2)
    host.await_interface("vq0")
    host.configure(1)
    assert_ping(source, host, count=20)
    leave_traces(source, 48)
    out = Bulk(source, host, 7001, 48)
    into = Bulk(host, source, 7002, 48)
    source.background(DIRTIER)
    time.sleep(1)
    destination = rig.guest(
        rig.sock("b"), boot=False, properties={**kind.properties, "mac": source.mac}, more=(*migration.INCOMING, *TRACE)
    )
    migration.prepare(destination, source)
    migration.start(source, destination, capabilities=["postcopy-ram"], parameters=SLOWLY)
    migration.wait_status(source, "active")
    time.sleep(1)
    source.qmp("migrate-start-postcopy")
    migration.finish(source, destination)
    found = migration.status(source)
    source.kill()
    assert found["ram"]["postcopy-requests"] > 0
    rig.note(f"{layout}: {found['ram']['postcopy-requests']} pages asked for, {asked(destination)} by the back-end")
    wait_until("the data from the guest", lambda: out.came_whole(host), SECONDS, [destination.child])
    wait_until("the data to the guest", lambda: into.came_whole(destination), SECONDS, [destination.child])
    assert_ping(destination, host, count=50)
    assert "POSTCOPY_END" in backend.child.errors()


# Writes, reads back past the guest's cache, compares; without a quote, as `Station.background` puts it into some.
WORK = (
    "i=0; while true; do i=$(( (i + 1) % 200 )); busybox dd if=/dev/urandom of=/tmp/new bs=65536 count=1; "
    "busybox dd if=/tmp/new of=/dev/vda bs=65536 seek=$((i * 4)) conv=notrunc,fsync; "
    "echo 3 > /proc/sys/vm/drop_caches; busybox dd if=/dev/vda of=/tmp/old bs=65536 skip=$((i * 4)) count=1; "
    "busybox cmp /tmp/new /tmp/old || echo $i >> /tmp/bad; echo $i >> /tmp/count; done"
)


READER = "while true; do busybox dd if=/dev/vda of=/dev/null bs=1048576; echo 3 > /proc/sys/vm/drop_caches; done"


def rounds(guest: Guest) -> int:
    """How often `WORK` has compared, without a difference."""
    assert guest.run("[ -e /tmp/bad ]").code != 0, guest.run("cat /tmp/bad").output
    return int(guest.check("touch /tmp/count; wc -l < /tmp/count"))


@pytest.mark.parametrize("layout", ["split", "packed"])
def test_a_guest_with_a_disk_moves_by_postcopy(rig: Rig, layout: str) -> None:
    """The guest touches most pages before its disk does; that a disk waits for pages is shown in tests/vq."""
    path = rig.scratch / "disk.img"
    with path.open("wb") as made:
        made.truncate(64 * MIB)
    properties = {"packed": "on" if layout == "packed" else "off"}
    backends = [rig.disk(path, "--postcopy", "-vv", name=name) for name in "ab"]
    source = rig.disk_guest(rig.sock("a"), properties=properties)
    leave_traces(source, 48)
    source.background(WORK)
    source.background(READER)
    wait_until("work on the disk", lambda: rounds(source) > 3, SECONDS, [source.child])
    destination = rig.disk_guest(rig.sock("b"), boot=False, properties=properties, more=(*migration.INCOMING, *TRACE))
    migration.prepare(destination, source)
    migration.start(source, destination, capabilities=["postcopy-ram"], parameters=SLOWLY)
    migration.wait_status(source, "active")
    source.qmp("migrate-start-postcopy")
    migration.finish(source, destination)
    found = migration.status(source)
    source.kill()
    assert found["ram"]["postcopy-requests"] > 0
    rig.note(f"{layout}: {found['ram']['postcopy-requests']} pages asked for, {asked(destination)} by the back-end")
    before = rounds(destination)
    wait_until("more work on the disk", lambda: rounds(destination) > before + 5, SECONDS, [destination.child])
    assert "POSTCOPY_END" in backends[1].errors()
