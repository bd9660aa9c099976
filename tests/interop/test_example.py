"""A device that Python serves, from the examples, under a QEMU guest."""

from __future__ import annotations

import signal
import sys
from pathlib import Path

import pytest

from interop.guest import shared_words
from interop.process import wait_until
from interop.rig import Rig

pytestmark = pytest.mark.guest
EXAMPLE = Path(__file__).resolve().parents[2] / "examples/first_device.py"


def test_a_guest_takes_its_entropy_from_python(rig: Rig) -> None:
    """QEMU connects to such a device once, and does not wait for it."""
    path = rig.sock()
    example = rig.child("first", [sys.executable, str(EXAMPLE), str(path)])
    wait_until("the example listens", path.exists, 20, [example])
    options = [word.split(",reconnect")[0] for word in shared_words(path)]
    guest = rig.guest(path, options=[*options, "-device", "vhost-user-rng-pci,chardev=c0"])
    guest.check("modprobe virtio_rng")
    assert guest.check("cat /sys/class/misc/hw_random/rng_current").startswith("virtio_rng")
    sums = {guest.check("head -c 4096 /dev/hwrng | sha256sum") for _ in range(5)}
    assert len(sums) == 5
    assert guest.check("head -c 4096 /dev/hwrng | wc -c").strip() == "4096"
    guest.kill()
    example.signal(signal.SIGTERM)
    assert example.wait(10) == 0
