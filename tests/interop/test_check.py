"""``vq check`` on the back-ends of others: it runs to its end, and finds what docs/check.md says of them."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from interop.requirements import need


def check(path: Path, kind: str, command: list[str]) -> dict[str, dict[str, str]]:
    """Check a back-end that is started again whenever it has died; gives the record of each check."""
    words = ["vq", "check", str(path), "--type", kind, "--timeout", "2", "--json", "--start", shlex.join(command)]
    done = subprocess.run([sys.executable, "-m", *words], capture_output=True, text=True, timeout=280)
    assert done.returncode == 1, done.stderr[-3000:]  # each of them fails something
    *records, final = map(json.loads, done.stdout.splitlines())
    listed = subprocess.run([sys.executable, "-m", "vq", "check", "--list"], capture_output=True, text=True).stdout
    assert final["final"] is True
    assert len(records) == len(listed.splitlines())
    # Each was really looked at: none was skipped because the back-end was gone.
    assert [record for record in records if "is gone since" in record["reason"]] == []
    return {record["name"]: record for record in records}


def outcomes(records: dict[str, dict[str, str]], *names: str) -> dict[str, str]:
    return {name: records[name]["outcome"] for name in names}


@pytest.mark.dpdk
def test_dpdk(tmp_path: Path) -> None:
    need("dpdk")
    path = tmp_path / "a.sock"
    vdev = f"net_vhost0,iface={path},postcopy-support=1"
    command = ["dpdk-testpmd", "--lcores", "0@0,1@0", "--main-lcore", "0", "--no-pci", "-m", "256", "--in-memory"]
    command += ["--single-file-segments", "--vdev", vdev, "--", "--no-flush-rx"]
    command += ["--total-num-mbufs=8192", "--forward-mode=io", "--stats-period", "1000"]
    records = check(path, "net", command)
    right = ("framing.reply-form", "acks.every-message", "memory.translation", "net.split", "net.packed")
    right += ("postcopy.advise", "postcopy.order", "postcopy.listen-with-memory")
    assert set(outcomes(records, *right).values()) == {"pass"}, outcomes(records, *right)
    assert "out and back" in records["net.packed"]["reason"]
    # A message in pieces is read whole or not, as its pieces come.
    wrong = ("net.num-buffers", "hostile.truncated.buffers")
    assert set(outcomes(records, *wrong).values()) == {"fail"}, outcomes(records, *wrong)


def test_qemu_storage_daemon(tmp_path: Path) -> None:
    need("storage-daemon")
    path, image = tmp_path / "a.sock", tmp_path / "disk.img"
    image.write_bytes(bytes(range(256)) * 4096)
    command = ["qemu-storage-daemon", "--blockdev", f"driver=file,node-name=f,filename={image},read-only=on"]
    command += ["--export", f"vhost-user-blk,id=e,addr.type=unix,addr.path={path},node-name=f"]
    records = check(path, "blk", command)
    right = ("framing.reply-form", "framing.pieces", "acks.every-message", "blk.split", "slots.add")
    assert set(outcomes(records, *right).values()) == {"pass"}, outcomes(records, *right)
    wrong = ("framing.need-reply-is-not-echoed", "hostile.values.ring-indices", "hostile.truncated.rings")
    assert set(outcomes(records, *wrong).values()) == {"fail"}, outcomes(records, *wrong)
    assert image.read_bytes() == bytes(range(256)) * 4096
