"""``vq blk``: the conventions of a back-end program, and wrong usage."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from vq import virtio as v
from vq.cli import main
from vq.frontend import Frontend
from waiting import wait_for


def test_print_capabilities(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["blk", "--print-capabilities"]) == 0
    assert json.loads(capsys.readouterr().out) == {"type": "block", "features": ["read-only", "blk-file"]}


@pytest.mark.parametrize(
    ("words", "text"),
    [
        ([], "--socket-path"),
        (["--socket-path", "a", "--fd", "3", "--null", "1M"], "--socket-path"),
        (["--socket-path", "a"], "--blk-file"),
        (["--socket-path", "a", "--blk-file", "b", "--null", "1M"], "--blk-file"),
        (["--socket-path", "a", "--null", "1.5G"], "--null 1.5G"),
        (["--socket-path", "a", "--null", "511"], "512 bytes"),
        (["--socket-path", "a", "--null", "1M", "--queues", "0"], "0 queues"),
        (["--socket-path", "a", "--blk-file", "/dev/null"], "neither a regular file"),
        (["--socket-path", "a", "--null", "1M", "--cpu", "x"], "--cpu"),
        (["--socket-path", "a", "--null", "1M", "--serial", "é" * 11], "22 bytes; write at most 20"),
    ],
)
def test_wrong_usage(words: list[str], text: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["blk", *words]) == 2
    assert text in capsys.readouterr().err


def test_files_that_cannot_be_served(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").touch()
    assert main(["blk", "--socket-path", "a", "--blk-file", str(tmp_path / "none")]) == 4
    assert main(["blk", "--socket-path", "a", "--blk-file", str(tmp_path / "empty")]) == 2
    text = capsys.readouterr().err
    assert "No such file" in text
    assert "--read-only" not in text
    assert text.count("truncate -s 1G") == 2


@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGTERM])
def test_serves_until_a_signal(tmp_path: Path, end: signal.Signals) -> None:
    """SIGHUP ends nothing: the file's length is looked at again."""
    path, image = str(tmp_path / "s"), tmp_path / "disk.img"
    image.write_bytes(bytes(4096))
    command = [sys.executable, "-m", "vq", "blk", "--socket-path", path, "--blk-file", str(image), "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
        wait_for(lambda: os.path.exists(path))
        frontend = Frontend.connect(path)
        frontend.negotiate(v.mask(v.VIRTIO_F_VERSION_1), v.mask(v.VHOST_USER_PROTOCOL_F_CONFIG))
        assert frontend.get_config(0, 8) == (8).to_bytes(8, "little")
        os.truncate(image, 8192)
        child.send_signal(signal.SIGHUP)
        wait_for(lambda: frontend.get_config(0, 8) == (16).to_bytes(8, "little"))
        frontend.close()
        child.send_signal(end)
        output, _ = child.communicate(timeout=120)
    assert child.returncode == 0
    report = json.loads(output)
    assert report["capacity"] == 8192
    assert len(report["queues"]) == 4
    assert not os.path.exists(path)
