"""Memory that is plugged into a running guest, and unplugged, under checked traffic that uses it.

Linux puts its own memory (buffers of network packets) into what is onlined as "online", and that of programs into what
is "online_movable"; only the latter can be got back from it.
"""

from __future__ import annotations

import hashlib
import itertools
import re
import threading
from pathlib import Path

import pytest

from interop.features import KINDS, assert_kind
from interop.guest import Guest
from interop.host import Host
from interop.process import Child, wait_until
from interop.rig import Rig
from interop.traffic import send_bulk

pytestmark = pytest.mark.guest
MIB = 1 << 20
PLUG_SECONDS = 30
ROOM = ("-m", "192M,slots=8,maxmem=2G")
AUTO_ONLINE = "/sys/devices/system/memory/auto_online_blocks"
LAYOUTS = {"split": KINDS["defaults"], "packed": KINDS["packed_defaults"]}


class Dimms:
    """The memory of a guest that comes and goes, as QEMU, the guest and the back-end see it."""

    def __init__(self, guest: Guest, back_end: Child) -> None:
        self.guest, self.back_end = guest, back_end

    def plug(self, name: str, mib: int) -> None:
        """Plug a DIMM, and wait until the back-end has mapped it; each has a size of its own, by which it is known."""
        self.guest.qmp(
            "object-add", **{"qom-type": "memory-backend-memfd", "id": f"m{name}", "size": mib * MIB, "share": True}
        )
        self.guest.qmp("device_add", driver="pc-dimm", id=name, memdev=f"m{name}")
        wait_until(f"{name} is mapped", lambda: self.mapped(mib), PLUG_SECONDS, [self.guest.child, self.back_end])

    def unplug(self, name: str, mib: int) -> None:
        """Unplug a DIMM, and wait until the guest has let go of it and the back-end as well."""
        self.guest.qmp("device_del", id=name)
        wait_until(f"{name} is gone", lambda: name not in self.plugged(), PLUG_SECONDS, [self.guest.child])
        # Told the front-end before QEMU forgot the DIMM, so there is nothing to wait for.
        assert not self.mapped(mib), "the DIMM is unplugged, and its memory still mapped"
        self.guest.qmp("object-del", id=f"m{name}")

    def plugged(self) -> set[str]:
        return {device["data"]["id"] for device in self.guest.qmp("query-memory-devices")}

    def maps(self) -> list[tuple[int, int]]:
        """(MiB, resident KiB) of each mapping of guest memory in the back-end."""
        text = Path(f"/proc/{self.back_end.pid}/smaps").read_text()
        blocks = re.findall(r"^([0-9a-f]+)-([0-9a-f]+) [^\n]*memory-backend-memfd.*?^Rss: +(\d+) kB", text, re.M | re.S)
        return [((int(end, 16) - int(start, 16)) // MIB, int(rss)) for start, end, rss in blocks]

    def mapped(self, mib: int) -> bool:
        return any(size == mib for size, _ in self.maps())

    def touched(self, mib: int) -> int:
        """KiB of a DIMM that the back-end has read or written: what it has page table entries of."""
        return sum(rss for size, rss in self.maps() if size == mib)


class Transfers:
    """Checked transfers between a guest and the host, in both directions by turns, until somebody ends them."""

    def __init__(self, guest: Guest, host: Host, mib: int = 4) -> None:
        self.host = host
        self.count = 0
        self.failures: list[BaseException] = []
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(guest, mib))
        self._thread.start()

    def _run(self, guest: Guest, mib: int) -> None:
        try:
            for ends in itertools.cycle([(guest, self.host), (self.host, guest)]):
                send_bulk(*ends, mib=mib)
                self.count += 1
                if self._ending.is_set():
                    return
        except BaseException as problem:
            self.failures.append(problem)

    def go_on(self, count: int = 2) -> None:
        """Wait until so many more have been right."""
        until = self.count + count
        wait_until("transfers go on", lambda: self.count >= until or bool(self.failures), 120)
        assert not self.failures, self.failures

    def finish(self) -> None:
        self._ending.set()
        self._thread.join(200)
        assert not self._thread.is_alive()
        assert not self.failures, self.failures


def messages(back_end: Child, name: str) -> int:
    """How many messages of a name the back-end has got."""
    return back_end.errors().count(f"Message({name},")


@pytest.mark.shows("SET_MEM_TABLE", "ADD_MEM_REG", "REM_MEM_REG", "VHOST_USER_PROTOCOL_F_CONFIGURE_MEM_SLOTS")
@pytest.mark.parametrize("slots", ["on", "off"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_dimms_come_and_go_under_traffic(rig: Rig, layout: str, slots: str) -> None:
    """A DIMM from which Linux takes its packet buffers, and others that come and go; no byte is wrong."""
    host = rig.host()
    pump = rig.backend(f"vhost:{rig.sock()},slots={slots}", "tap:vq0", host=host, options=["-vv"])
    pump.requires("a choice of memory slots")
    guest = rig.guest(
        rig.sock(), more=ROOM, kernel_words="memhp_default_state=online", properties=LAYOUTS[layout].properties
    )
    host.configure(1)
    guest.configure(2)
    assert_kind(guest, LAYOUTS[layout])
    dimms = Dimms(guest, pump.child)
    tables, added = messages(pump.child, "SET_MEM_TABLE"), messages(pump.child, "ADD_MEM_REG")
    traffic = Transfers(guest, host)
    traffic.go_on()
    dimms.plug("kernel", 256)
    traffic.go_on(4)
    rig.note(f"{layout}, slots {slots}: packets touched {dimms.touched(256)} KiB of a new DIMM")
    assert dimms.touched(256) >= 1024, "the traffic does not use the new memory"
    traffic.finish()
    assert memory_mib(guest) > 256
    guest.check(f"echo online_movable >{AUTO_ONLINE}")
    traffic = Transfers(guest, host)
    for _ in range(2):
        dimms.plug("movable", 384)
        traffic.go_on(1)
        dimms.unplug("movable", 384)
        traffic.go_on(1)
    traffic.finish()
    tables, added = messages(pump.child, "SET_MEM_TABLE") - tables, messages(pump.child, "ADD_MEM_REG") - added
    assert (tables == 0 and added >= 3) if slots == "on" else (tables >= 5 and added == 0)


@pytest.mark.shows("ADD_MEM_REG", "REM_MEM_REG")
@pytest.mark.parametrize("layout", ["split", "packed"])
def test_dimms_come_and_go_under_disk_traffic(rig: Rig, layout: str) -> None:
    """Programs of the guest read and write the disk directly from and into memory that was plugged a moment ago."""
    path = rig.scratch / "disk.img"
    with path.open("wb") as made:
        made.truncate(64 * MIB)
    blk = rig.disk(path)
    guest = rig.disk_guest(
        rig.sock(),
        more=ROOM,
        kernel_words="memhp_default_state=online_movable",
        properties={"packed": "on" if layout == "packed" else "off"},
    )
    dimms = Dimms(guest, blk)
    for mib in (384, 640):
        dimms.plug("movable", mib)
        wait_until("the DIMM is online", lambda mib=mib: memory_mib(guest) > mib, 10, [guest.child])
        # What a file in tmpfs holds, and the buffers of dd, is movable memory: Linux takes it out of the DIMM first.
        whole = guest.check(
            "dd if=/dev/urandom of=/tmp/data bs=1M count=32 2>/dev/null"
            " && dd if=/tmp/data of=/dev/vda bs=1M oflag=direct 2>/dev/null"
            " && dd if=/dev/vda bs=1M count=32 iflag=direct 2>/dev/null | sha256sum"
            " && sha256sum </tmp/data",
            90,
        ).split()
        with path.open("rb") as disk:
            assert whole[0] == whole[2] == hashlib.sha256(disk.read(32 * MIB)).hexdigest()
        rig.note(f"blk, {layout}: requests touched {dimms.touched(mib)} KiB of a new DIMM")
        assert dimms.touched(mib) >= 1024, "the requests do not use the new memory"
        guest.background(
            "echo $$ >/tmp/reads; while :; do dd if=/dev/vda of=/dev/null bs=1M count=32 iflag=direct; done"
        )
        dimms.unplug("movable", mib)
        guest.check("kill $(cat /tmp/reads) && rm /tmp/data")


def memory_mib(guest: Guest) -> int:
    """What the guest's kernel has to its use."""
    return int(re.findall(r"MemTotal: +(\d+)", guest.check("cat /proc/meminfo"))[0]) // 1024


@pytest.mark.shows("ADD_MEM_REG", "REM_MEM_REG")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_virtio_mem_grows_and_shrinks_under_traffic(rig: Rig, layout: str) -> None:
    """Memory that the guest's driver plugs block by block; QEMU gives the back-end a slot for each part in use."""
    host = rig.host()
    pump = rig.backend(f"vhost:{rig.sock()}", "tap:vq0", host=host, options=["-vv"])
    guest = rig.guest(
        rig.sock(),
        more=["-m", "192M,slots=8,maxmem=4G", *virtio_mem(2048)],
        kernel_words="memhp_default_state=online_movable",
        properties=LAYOUTS[layout].properties,
    )
    host.configure(1)
    guest.configure(2)
    guest.check("modprobe virtio_mem")
    added, removed = messages(pump.child, "ADD_MEM_REG"), messages(pump.child, "REM_MEM_REG")
    traffic = Transfers(guest, host)
    for wanted in (1280, 0, 1280):  # a slot of QEMU's has 1024
        resize(guest, wanted)
        traffic.go_on(1)
    traffic.finish()
    assert messages(pump.child, "ADD_MEM_REG") == added + 4
    assert messages(pump.child, "REM_MEM_REG") == removed + 2
    # What is plugged from here on may be used for packets.
    guest.check(f"echo online >{AUTO_ONLINE}")
    resize(guest, 1792)
    traffic = Transfers(guest, host)
    traffic.go_on()
    traffic.finish()
    touched = Dimms(guest, pump.child).touched(1024)
    rig.note(f"virtio-mem, {layout}: packets touched {touched} KiB of it")
    assert touched >= 1024


def virtio_mem(mib: int) -> list[str]:
    """QEMU options for a virtio-mem device, of which nothing is plugged yet."""
    memory = f"memory-backend-memfd,id=mem1,size={mib}M,share=on,reserve=off"
    device = "virtio-mem-pci,id=grown,memdev=mem1,requested-size=0,dynamic-memslots=on"
    return ["-object", memory, "-device", device]


def resize(guest: Guest, mib: int) -> None:
    """Ask the guest's driver to have so much of the device plugged, and wait until it has."""
    path = "/machine/peripheral/grown"
    guest.qmp("qom-set", path=path, property="requested-size", value=mib * MIB)
    wait_until(
        f"{mib} MiB are plugged",
        lambda: guest.qmp("qom-get", path=path, property="size") == mib * MIB,
        PLUG_SECONDS,
        [guest.child],
    )
