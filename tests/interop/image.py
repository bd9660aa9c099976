"""The initramfs of the guests: busybox, the virtio drivers, a few tools, and our init."""

from __future__ import annotations

import hashlib
import lzma
import os
import re
import shutil
import stat
import subprocess
from collections.abc import Sequence
from functools import cache
from pathlib import Path

INIT = Path(__file__).with_name("guest_init.sh")
MODULES = ("virtio_pci", "virtio_net", "virtio_console", "virtio_blk", "virtio_mem", "virtio_rng")
MODULES += ("vmw_vsock_virtio_transport",)
UML_MODULES = ("virtio_net", "virtio_console", "8021q", "ipv6")  # its transport is built in
TOOLS = ("ping", "ethtool", "iperf3")


def cache_folder() -> Path:
    """Give the folder that keeps built images between runs."""
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = Path(os.environ.get("VQ_TEST_CACHE") or base / "vq-tests")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


class Archive:
    """A cpio archive of the "newc" kind, the one that Linux unpacks as its first root."""

    def __init__(self) -> None:
        self.parts: list[bytes] = []
        self.names: set[str] = set()

    def add(self, name: str, mode: int, data: bytes = b"", device: tuple[int, int] = (0, 0)) -> None:
        """Add one entry, and the folders above it; a name that is already there stays as it is."""
        name = name.strip("/")
        if name in self.names:
            return
        if "/" in name:
            self.add(name.rsplit("/", 1)[0], stat.S_IFDIR | 0o755)
        self.names.add(name)
        fields = (len(self.names), mode, 0, 0, 1, 0, len(data), 0, 0, *device, len(name) + 1, 0)
        header = b"070701" + b"".join(b"%08X" % field for field in fields)
        for part in (header + name.encode() + b"\0", data):
            self.parts.append(part + b"\0" * (-len(part) % 4))

    def file(self, name: str, data: bytes) -> None:
        self.add(name, stat.S_IFREG | 0o755, data)

    def link(self, name: str, target: str) -> None:
        self.add(name, stat.S_IFLNK | 0o777, target.encode())

    def finish(self) -> bytes:
        self.add("TRAILER!!!", 0)
        return b"".join(self.parts)


def _module_bytes(path: Path) -> bytes:
    if path.suffix == ".xz":
        return lzma.decompress(path.read_bytes())
    if path.suffix == ".zst":
        return subprocess.run(["zstd", "-dcq", path], check=True, capture_output=True).stdout
    return path.read_bytes()


def _add_modules(archive: Archive, modules: Path, names: Sequence[str]) -> None:
    """Add the drivers with all they depend on, and a modules.dep of just these."""
    depends = dict(line.split(":", 1) for line in (modules / "modules.dep").read_text().splitlines())
    by_name = {re.sub(r"\.ko.*", "", Path(path).name).replace("-", "_"): path for path in depends}
    builtin = {Path(line).stem.replace("-", "_") for line in (modules / "modules.builtin").read_text().split()}
    wanted: dict[str, list[str]] = {}
    for name in names:
        if name in builtin:
            continue
        if name not in by_name:
            raise LookupError(f"{modules}: no module {name}, and it is not built in; install another guest kernel")
        wanted[by_name[name]] = depends[by_name[name]].split()
    for path in [path for needs in wanted.values() for path in needs]:
        wanted.setdefault(path, depends[path].split())

    def plain(path: str) -> str:
        return re.sub(r"\.ko\..*", ".ko", path)  # compressed modules are stored unpacked

    folder = f"lib/modules/{modules.name}"
    for path in wanted:
        archive.file(f"{folder}/{plain(path)}", _module_bytes(modules / path))
    text = "".join(f"{plain(path)}: {' '.join(map(plain, needs))}\n" for path, needs in wanted.items())
    archive.file(f"{folder}/modules.dep", text.encode())


def _add_program(archive: Archive, program: str) -> None:
    """Add a program under /bin, and its shared libraries where its loader looks for them."""
    path = shutil.which(program)
    if path is None:
        raise LookupError(f"{program}: not installed")
    archive.file(f"bin/{program}", Path(path).read_bytes())
    listing = subprocess.run(["ldd", path], capture_output=True, text=True, check=True).stdout
    for library in re.findall(r"(/\S+) \(0x", listing):
        archive.file(library, Path(library).read_bytes())


@cache
def build(modules: Path, names: Sequence[str] = MODULES) -> Path:
    """Build the image for the kernel of ``modules``, or find it already built.

    Parameters
    ----------
    modules : Path
        The kernel's folder ``lib/modules/VERSION``.
    names : sequence of str
        Modules that are taken along, with all they depend on; hashable.
    """
    busybox = shutil.which("busybox")
    if busybox is None:
        raise LookupError("busybox: not installed")
    archive = Archive()
    for folder in ("proc", "sys", "dev", "tmp", "etc"):
        archive.add(folder, stat.S_IFDIR | 0o755)
    archive.add("dev/console", stat.S_IFCHR | 0o600, device=(5, 1))
    archive.file("init", INIT.read_bytes())
    _add_modules(archive, modules, names)
    for tool in TOOLS:
        _add_program(archive, tool)
    _add_program_static(archive, busybox)
    data = archive.finish()
    target = cache_folder() / f"initramfs-{hashlib.sha256(data).hexdigest()[:16]}.cpio"
    if not target.exists():
        fresh = target.with_suffix(f".{os.getpid()}")
        fresh.write_bytes(data)
        fresh.replace(target)  # two test runs may build it at the same time
    return target


def _add_program_static(archive: Archive, busybox: str) -> None:
    """Add busybox and its names; the full-grown tools that are there already keep theirs."""
    archive.file("bin/busybox", Path(busybox).read_bytes())
    applets = subprocess.run([busybox, "--list"], capture_output=True, text=True, check=True).stdout.split()
    for applet in applets:
        archive.link(f"bin/{applet}", "busybox")
