"""What the tests of this folder need from the machine, by name; a test without it is skipped, never passed."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

# A user's search path often lacks the folders of ethtool and ip, which need no privilege for what guests do with them.
os.environ["PATH"] = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"])

REMEDY = "sudo make peers"
KERNEL_FOLDERS = (Path("/var/cache/vq-peers/kernel"), Path("/"))
UML_FOLDER = Path("/var/cache/vq-peers/uml")
MINIMUM_QEMU = (8, 0)  # 7.2 crashes without KVM as soon as a guest uses MSI-X on a vhost-user device
HUGEPAGES = 512  # of 2 MiB: one testpmd takes 256, and two run at once when DPDK is both ends


def _program(name: str) -> Callable[[], str | None]:
    return lambda: None if shutil.which(name) else f"the program {name}"


@cache
def find_kernel() -> tuple[Path, Path] | None:
    """Find a guest kernel and its modules.

    Returns
    -------
    tuple of Path or None
        The bootable image and the folder ``lib/modules/VERSION`` that belongs to it. ``VQ_TEST_KERNEL`` may name
        another root folder that holds ``boot`` and ``lib/modules``.
    """
    roots = [Path(os.environ["VQ_TEST_KERNEL"])] if "VQ_TEST_KERNEL" in os.environ else list(KERNEL_FOLDERS)
    for root in roots:
        for image in sorted(root.glob("boot/vmlinuz-*"), reverse=True):
            version = image.name.removeprefix("vmlinuz-")
            for modules in (root / "lib/modules" / version, root / "usr/lib/modules" / version):
                if (modules / "modules.dep").exists() and os.access(image, os.R_OK):
                    return image, modules
    return None


@cache
def find_uml() -> tuple[Path, Path] | None:
    """Find a user-mode Linux, and the folder of its modules; ``VQ_TEST_UML`` may name another root folder."""
    root = Path(os.environ.get("VQ_TEST_UML", UML_FOLDER))
    program = root / "usr/bin/linux.uml"
    for modules in sorted(root.glob("usr/lib/uml/modules/*"), reverse=True):
        if (modules / "modules.dep").exists() and os.access(program, os.X_OK):
            return program, modules
    return None


def _uml() -> str | None:
    return None if find_uml() else "user-mode Linux"


def _root() -> str | None:
    return None if os.geteuid() == 0 else "root"


def _namespaces() -> str | None:
    if os.geteuid() != 0:
        return "root (network namespaces)"
    name = f"vqprobe{os.getpid()}"
    if not shutil.which("ip"):
        return "the program ip"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True)
    if made.returncode:
        return f"network namespaces ({made.stderr.strip()})"
    subprocess.run(["ip", "netns", "delete", name], capture_output=True)
    return None


def _tun() -> str | None:
    try:
        os.close(os.open("/dev/net/tun", os.O_RDWR))
    except OSError as error:
        return f"/dev/net/tun ({error.strerror})"
    return None


def _qemu() -> str | None:
    if not shutil.which("qemu-system-x86_64"):
        return "the program qemu-system-x86_64"
    text = subprocess.run(["qemu-system-x86_64", "--version"], capture_output=True, text=True).stdout
    match = re.search(r"version (\d+)\.(\d+)", text)
    if not match or (int(match[1]), int(match[2])) < MINIMUM_QEMU:
        return f"QEMU {'.'.join(map(str, MINIMUM_QEMU))} or newer (this is {match[0] if match else 'unknown'})"
    return None


def _kernel() -> str | None:
    return None if find_kernel() else "a guest kernel with its modules"


def _hugepages() -> str | None:
    pages = Path("/sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages")
    count = int(pages.read_text()) if pages.exists() else 0
    if count < HUGEPAGES:
        return f"{HUGEPAGES} hugepages of 2 MiB ({count} are reserved)"
    if not any(line.split()[2] == "hugetlbfs" for line in Path("/proc/mounts").read_text().splitlines()):
        return "a hugetlbfs mount"
    return None


CHECKS: dict[str, tuple[Callable[[], str | None], ...]] = {
    "root": (_root,),
    "guest": (_qemu, _kernel, *(_program(name) for name in ("busybox", "ping", "ethtool", "iperf3", "ldd", "setpriv"))),
    "uml": (_uml, *(_program(name) for name in ("busybox", "ping", "ethtool", "iperf3", "ldd", "setpriv"))),
    "tap": (_namespaces, _tun, _program("busybox")),
    "storage-daemon": (_program("qemu-storage-daemon"),),
    "dpdk": (_root, _program("dpdk-testpmd"), _hugepages, _program("setpriv")),
}


@cache
def missing(name: str) -> tuple[str, ...]:
    """Name what this machine lacks for one group of ``CHECKS``."""
    return tuple(lack for check in CHECKS[name] if (lack := check()))


def need(*names: str) -> None:
    """Skip the test, naming what is missing and the line that brings it."""
    lacks = [lack for name in names for lack in missing(name)]
    if lacks:
        pytest.skip(f"missing: {', '.join(dict.fromkeys(lacks))}. Run: {REMEDY}")
