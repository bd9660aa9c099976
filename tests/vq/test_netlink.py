"""What the pump asks of interfaces, against the kernel in a namespace of the test's own."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Iterator

import pytest

from netns import ip, needs_root, own_network
from vq import netlink
from vq.errors import ResourceError, UsageError

pytestmark = needs_root


@pytest.fixture(autouse=True)
def network() -> Iterator[None]:
    with own_network():
        yield


def test_look_up() -> None:
    ip("tuntap add vqp0 mode tap")
    ip("tuntap add vqp1 mode tap multi_queue")
    ip("tuntap add vqp2 mode tun")
    ip("link set vqp1 address 02:00:00:00:00:05 mtu 4000 up")
    assert netlink.get_link("nothing") is None
    assert not netlink.exists("nothing")
    assert netlink.exists("vqp0")
    loop = netlink.get_link("lo")
    assert loop is not None
    assert (loop.kind, loop.index, loop.persistent, loop.up, loop.mtu) == ("", 1, False, False, 65536)
    plain = netlink.get_link("vqp0")
    assert plain is not None
    assert (plain.kind, plain.persistent, plain.multi_queue, plain.queues, plain.mtu) == ("tap", True, False, 0, 1500)
    several = netlink.get_link("vqp1")
    assert several is not None
    assert (several.multi_queue, several.address, several.mtu) == (True, "02:00:00:00:00:05", 4000)
    assert (several.up, several.carrier) == (True, False)  # nobody holds it
    tun = netlink.get_link("vqp2")
    assert tun is not None
    assert (tun.kind, tun.address) == ("tun", "")


def test_configure_changes_what_differs() -> None:
    ip("tuntap add vqp0 mode tap")
    link = netlink.configure("vqp0", mtu=9000, up=True)
    assert (link.mtu, link.up) == (9000, True)
    assert "mtu 9000" in ip("link show vqp0")
    assert netlink.configure("vqp0") == link
    assert not netlink.set_up("vqp0", False).up
    assert netlink.set_mtu("vqp0", 68).mtu == 68
    assert netlink.set_up("vqp0").up
    assert netlink.set_mtu("vqp0", 65521).mtu == 65521


@pytest.mark.parametrize("mtu", [67, 65522, 0, -1])
def test_impossible_mtu(mtu: int) -> None:
    with pytest.raises(UsageError, match=rf"lo: MTU {mtu}; 68 to 65521 bytes are possible"):
        netlink.set_mtu("lo", mtu)


def test_no_such_interface() -> None:
    with pytest.raises(ResourceError, match=r"nothing: .*'ip link' lists") as caught:
        netlink.configure("nothing", up=True)
    assert (caught.value.errno, caught.value.path) == (errno.ENODEV, "nothing")


def test_value_that_this_interface_does_not_take() -> None:
    """A macvlan cannot have a larger MTU than the interface below it."""
    ip("tuntap add vqp0 mode tap")
    try:
        ip("link add link vqp0 name vqv0 type macvlan")
    except subprocess.CalledProcessError:
        pytest.skip("this kernel has no macvlan devices; run: sudo modprobe macvlan")
    with pytest.raises(ResourceError, match="setting mtu 2000 failed") as caught:
        netlink.set_mtu("vqv0", 2000)
    assert caught.value.errno == errno.EINVAL
    assert "ip -d link show" in str(caught.value)


ATTEMPT = """
from vq import netlink
from vq.errors import ResourceError
print(netlink.configure("vqp0", mtu=4000, up=True).mtu)
for change in ({"mtu": 1400}, {"up": False}, {"mtu": 1400, "up": False}):
    try:
        netlink.configure("vqp0", **change)
    except ResourceError as error:
        print(error)
"""


def test_without_privileges() -> None:
    """What is set already may be asked for by anybody; for the rest the administrator is told what to type."""
    ip("tuntap add vqp0 mode tap")
    ip("link set vqp0 mtu 4000 up")
    command = ["setpriv", "--inh-caps=-all", "--bounding-set=-all", sys.executable, "-c", ATTEMPT]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    result = subprocess.run(command, check=True, capture_output=True, text=True, timeout=120, env=environment)
    remedy = "run with CAP_NET_ADMIN, or have the administrator run: ip link set vqp0"
    assert result.stdout.splitlines() == [
        "4000",
        f"vqp0: setting mtu 1400 failed: Operation not permitted; {remedy} mtu 1400",
        f"vqp0: setting down failed: Operation not permitted; {remedy} down",
        f"vqp0: setting mtu 1400 down failed: Operation not permitted; {remedy} mtu 1400 down",
    ]


def test_import_is_cheap() -> None:
    code = "import sys, vq.netlink; sys.exit('pyroute2' in sys.modules)"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    assert subprocess.run([sys.executable, "-c", code], env=environment, timeout=120, check=False).returncode == 0
