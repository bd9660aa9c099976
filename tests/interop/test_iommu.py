"""QEMU guests behind a virtual IOMMU: every address of their drivers is one that the back-end has to ask for."""

from __future__ import annotations

import hashlib
import re

import pytest

from interop.features import RING_PACKED, negotiated
from interop.guest import Guest
from interop.iommu import BEHIND, LAZY, MACHINE, STRICT
from interop.process import Child
from interop.rig import Rig
from interop.traffic import assert_ping, send_bulk

pytestmark = pytest.mark.guest
MIB = 1 << 20
ACCESS_PLATFORM = 33


def assert_translated(child: Child) -> None:
    """Check that the back-end was told translations, and told to forget them."""
    log = child.errors()
    assert len(re.findall("IOTLB_MSG", log)) > 20, log[-2000:]


def assert_domain(guest: Guest, strict: bool) -> None:
    """Check that the device really is behind the IOMMU, in the mode that is meant."""
    kinds = guest.check("cat /sys/kernel/iommu_groups/*/type").split()
    assert ("DMA" if strict else "DMA-FQ") in kinds, kinds


@pytest.mark.parametrize(
    ("layout", "mode", "mib"),
    [("split", STRICT, 64), ("split", LAZY, 16), ("packed", STRICT, 16), ("packed", LAZY, 64)],
    ids=["split-strict", "split-lazy", "packed-strict", "packed-lazy"],
)
@pytest.mark.shows("IOTLB_MSG", "BACKEND_IOTLB_MSG", "VIRTIO_F_ACCESS_PLATFORM")
def test_a_network_device(rig: Rig, layout: str, mode: str, mib: int) -> None:
    """Nothing is lost while pages come and go under each packet; the bytes are right in both directions."""
    host = rig.host()
    backend = rig.backend(f"vhost:{rig.sock()}", "tap:vq0", host=host, options=["-vv"])
    properties = {**BEHIND, **({"packed": "on"} if layout == "packed" else {})}
    guest = rig.guest(rig.sock(), properties=properties, kernel_words=mode, **MACHINE)
    host.configure(1)
    guest.configure(2)
    assert_domain(guest, mode == STRICT)
    found = negotiated(guest)
    assert ACCESS_PLATFORM in found
    assert (RING_PACKED in found) == (layout == "packed")
    assert_ping(guest, host, count=100)
    assert_ping(host, guest, count=100)
    assert_ping(host, guest, count=10, size=20000)
    for source, target, way in ((guest, host, "guest to host"), (host, guest, "host to guest")):
        seconds = send_bulk(source, target, mib=mib)
        rig.note(f"{way} {mib} MiB in {seconds:.1f} s")
    assert_ping(guest, host, count=20)
    assert_translated(backend.child)
    assert backend.stop() < 2


@pytest.mark.parametrize("layout", ["split", "packed"])
@pytest.mark.shows("IOTLB_MSG", "VIRTIO_F_ACCESS_PLATFORM")
def test_a_disk(rig: Rig, layout: str) -> None:
    """A file system is made and filled; the file on the host has the bytes that the guest has written."""
    path = rig.scratch / "disk.img"
    with path.open("wb") as made:
        made.truncate(64 * MIB)
    disk = rig.disk(path, "--queues", "2", "-vv")
    properties = {**BEHIND, "packed": "on" if layout == "packed" else "off"}
    guest = rig.disk_guest(rig.sock(), queues=2, cpus=2, properties=properties, kernel_words=STRICT, **MACHINE)
    features = guest.check("cat /sys/block/vda/device/features").strip()
    assert features[ACCESS_PLATFORM] == "1"
    assert (features[RING_PACKED] == "1") == (layout == "packed")
    assert_domain(guest, True)
    guest.check("mke2fs /dev/vda && mkdir -p /tmp/m && mount -t ext2 /dev/vda /tmp/m", timeout=60)
    guest.check("dd if=/dev/urandom of=/tmp/m/data bs=1M count=20 && sync", timeout=90)
    inside = guest.check("sha256sum </tmp/m/data; echo 3 >/proc/sys/vm/drop_caches; sha256sum </tmp/m/data", 90)
    assert len(set(inside.split())) == 2, inside  # the digest, twice, and "-"
    guest.check("umount /tmp/m", timeout=60)
    whole = guest.check("echo 3 >/proc/sys/vm/drop_caches; dd if=/dev/vda bs=1M 2>/dev/null | sha256sum", timeout=90)
    assert whole.split()[0] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert_translated(disk)
