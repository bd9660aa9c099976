"""Devices that Python serves, under guests with Linux."""

from __future__ import annotations

import os
import select
import signal
import sys
from pathlib import Path

import pytest

from interop.guest import shared_words
from interop.process import wait_until
from interop.rig import Rig
from vq.devices.console import ConsoleDevice
from vq.testing import serving
from vq.virtio import DeviceId

pytestmark = pytest.mark.guest
EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def test_a_guest_takes_its_entropy_from_python(rig: Rig) -> None:
    """QEMU connects to such a device once, and does not wait for it."""
    path = rig.sock()
    example = rig.child("first", [sys.executable, str(EXAMPLES / "first_device.py"), str(path)])
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
    assert example.wait(60) == 0


@pytest.mark.parametrize("packed", ["off", "on"])
def test_a_host_made_of_arrays_answers_a_guest(rig: Rig, packed: str) -> None:
    """A network device in Python, burst by burst: ARP, and pings whose bytes and checksums the guest looks at."""
    path = rig.sock()
    example = rig.child("responder", [sys.executable, str(EXAMPLES / "responder.py"), str(path)])
    wait_until("the example listens", path.exists, 20, [example])
    guest = rig.guest(path, properties={"packed": packed})
    guest.check("ip addr add 10.0.0.1/24 dev eth0 && ip link set eth0 up")
    for size in (0, 56, 1472):
        assert "5 packets received" in guest.check(f"ping -c 5 -i 0.1 -s {size} 10.0.0.2")
    assert "02:76:71:00:00:01" in guest.check("ip neigh")
    guest.kill()
    example.signal(signal.SIGTERM)
    assert example.wait(60) == 0


class SplitConsole(ConsoleDevice):
    """User-mode Linux says a packed ring's base without its wrap counter."""

    packed = False


def test_linux_has_a_terminal_here(rig: Rig) -> None:
    """A console of Linux at a pseudo-terminal of ours, both ways, with a size that changes."""
    device = SplitConsole.at_pty()
    assert device.path is not None
    with serving(device, rig.sock()):
        guest = rig.uml_guest(rig.sock(), device_id=DeviceId.CONSOLE)
        guest.check("modprobe virtio_console")
        terminal = os.open(device.path, os.O_RDWR | os.O_NOCTTY)
        try:
            guest.check("echo from the guest >/dev/hvc0")
            heard = b""
            while b"from the guest\r\n" not in heard:
                assert select.select([terminal], [], [], 60)[0], heard
                heard += os.read(terminal, 100)
            os.write(terminal, b"from the host\n")
            assert guest.check("head -n 1 </dev/hvc0", 30) == "from the host\n"
            device.resize(100, 30)
            size = "stty -F /dev/hvc0 size"
            guest.check(f"for i in $(seq 100); do [ \"$({size})\" = '30 100' ] && break; sleep 0.1; done")
            assert guest.check(size).strip() == "30 100"
        finally:
            os.close(terminal)
            guest.kill()
