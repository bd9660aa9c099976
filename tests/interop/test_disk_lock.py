"""The locks of ``vq blk`` and those of QEMU's programs are the same: each keeps out of the other's way."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from blk_front import Guest, serving
from blk_rig import IN, OK, OUT, content, make_file
from interop.process import wait_until
from interop.requirements import need
from vq.errors import BackendError
from vq_core.disk import Disk


def test_a_file_is_kept_from_qemu_and_by_qemu(tmp_path: Path) -> None:
    need("storage-daemon")
    image, theirs = tmp_path / "disk.img", tmp_path / "q"
    make_file(image)
    command = ["qemu-storage-daemon", "--blockdev", f"driver=file,node-name=f,filename={image}"]
    command += ["--export", f"vhost-user-blk,id=e,addr.type=unix,addr.path={theirs},node-name=f,writable=on"]
    with serving(Disk(image), str(tmp_path / "s")):
        guest = Guest(str(tmp_path / "s"))
        guest.start()
        assert guest.ask(OUT, content(512)) == OK
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert done.returncode != 0
        assert "lock" in done.stderr, done.stderr
        guest.frontend.stop_ring(0)
        with subprocess.Popen(command) as daemon:
            try:
                wait_until("the daemon listens", lambda: theirs.exists() or daemon.poll() is not None, 30)
                assert daemon.poll() is None
                with pytest.raises(BackendError, match="ack is 1"):
                    guest.start()
            finally:
                daemon.terminate()
        guest.start()
        assert guest.ask(IN, size=512) == OK
        guest.close()
