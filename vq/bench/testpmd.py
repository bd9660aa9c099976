"""DPDK's testpmd: its command lines for both roles, and the figures that it prints."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from vq.bench.cells import Cell
from vq.errors import ResourceError

__all__ = ["back_command", "check_dpdk", "cycles_per_packet", "front_command", "rates"]

PROGRAM: Final = "dpdk-testpmd"
MEMORY_MIB: Final = 512  # of each testpmd
RING: Final = 256
DEBIAN: Final = "install DPDK (Debian, Ubuntu: apt install dpdk)"


def check_dpdk() -> None:
    """Say what is missing before anything is started.

    Raises
    ------
    ResourceError
        No testpmd, not root, too few hugepages that are free, or nowhere to map them.
    """
    if shutil.which(PROGRAM) is None:
        raise ResourceError(f"the program {PROGRAM} is not there", remedy=DEBIAN)
    if os.geteuid() != 0:
        raise ResourceError("testpmd needs root for its hugepages", remedy="run it with sudo")
    fields = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines() if ":" in line)
    size_kib = int(fields.get("Hugepagesize", "0").split()[0])
    free = int(fields.get("HugePages_Free", "0").split()[0])
    needed = 2 * MEMORY_MIB * 1024 // size_kib if size_kib else 1
    if free < needed:
        remedy = f"run: echo {2 * needed} > /proc/sys/vm/nr_hugepages"
        raise ResourceError(f"two testpmd need {needed} free hugepages of {size_kib} KiB, {free} are", remedy=remedy)
    if " hugetlbfs " not in Path("/proc/mounts").read_text():
        raise ResourceError("hugetlbfs is not mounted", remedy="run: mount -t hugetlbfs hugetlbfs /dev/hugepages")


def _command(cpu: int, vdevs: Sequence[str], options: Sequence[str], *, cycles: bool) -> list[str]:
    # In memory: the files of hugepages would outlive a killed process and keep their pages. One file of them, since
    # virtio-user hands its memory over as few descriptors. Both threads on one processor: the first one only prints.
    words = [PROGRAM, "--lcores", f"0@{cpu},1@{cpu}", "--main-lcore", "0", "-m", str(MEMORY_MIB), "--no-pci"]
    words += ["--single-file-segments", "--in-memory"]
    words += [word for vdev in vdevs for word in ("--vdev", vdev)]
    return [*words, "--", *options, "--stats-period", "1", *(["--record-core-cycles"] if cycles else [])]


def back_command(cell: Cell, sockets: Sequence[Path], cpu: int, *, cycles: bool) -> list[str]:
    """The command line of DPDK's back-end, net_vhost."""
    vdevs = [f"net_vhost{number},iface={path}" for number, path in enumerate(sockets)]
    return _command(cpu, vdevs, ["--forward-mode", cell.way.back, "--txpkts", str(cell.size)], cycles=cycles)


def front_command(cell: Cell, sockets: Sequence[Path], cpu: int, more: str) -> list[str]:
    """The command line of the front-end, net_virtio_user, the same one for every back-end.

    Parameters
    ----------
    cell
        What to measure.
    sockets
        Of the back-end, one for each guest.
    cpu
        Its processor.
    more
        Further arguments of net_virtio_user, such as ``mrg_rxbuf=0``.
    """
    queue = f"queue_size={RING}" + (",packed_vq=1" if cell.layout == "packed" else "")
    queue += f",{more.strip(',')}" if more.strip(",") else ""
    vdevs = [f"net_virtio_user{number},path={path},{queue}" for number, path in enumerate(sockets)]
    options = ["--forward-mode", cell.way.front, "--txpkts", str(cell.size)]
    options += ["--tx-first"] if cell.way.primed else []
    options += ["--burst", str(cell.way.burst)] if cell.way.burst else []
    options += ["--port-topology=chained"] if cell.way.guests > 1 else []
    return _command(cpu, vdevs, options, cycles=False)


def rates(text: str, cell: Cell) -> list[int]:
    """Packets of each second that the front-end has reported, over all its ports."""
    found = [int(number) for number in re.findall(rf"{cell.way.counted}:\s+(\d+)", text)]
    ports = cell.way.guests
    return [sum(found[i : i + ports]) for i in range(0, len(found) - ports + 1, ports)]


def cycles_per_packet(text: str) -> float | None:
    """The busy cycles of a packet that testpmd reports at its end; None: it did not."""
    found = re.findall(r"CPU cycles/packet=([\d.]+)", text)
    return float(found[-1]) if found else None
