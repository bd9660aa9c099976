"""The QEMU options that the pump prints connect a real QEMU to it, in both socket roles."""

from __future__ import annotations

import shlex
import subprocess
import threading
import time
from pathlib import Path

import pytest

import vq
from interop.requirements import need
from vq.cli.hints import qemu_options
from vq.ports import parse_port


@pytest.mark.interop
@pytest.mark.parametrize("role", ["", ",client"], ids=["pump listens", "pump connects"])
def test_qemu_connects(role: str, tmp_path: Path) -> None:
    need("guest")
    spec = parse_port(f"vhost:{tmp_path}/a.sock{role}")
    command = ["qemu-system-x86_64", "-accel", "tcg", "-display", "none", "-nodefaults", "-S"]
    # The test wants a connection, not the memory of a guest that never runs.
    options = [word.replace("1G", "64M") for word in shlex.split(qemu_options(spec))]
    with vq.Pump([spec, "null:"]) as pump:
        serving = threading.Thread(target=pump.run)
        serving.start()
        qemu = subprocess.Popen(command + options, stderr=subprocess.PIPE, text=True)
        try:
            end = time.monotonic() + 20
            while pump.snapshot()["ports"][spec.name]["connections"] == 0:
                assert qemu.poll() is None, qemu.stderr and qemu.stderr.read()
                assert time.monotonic() < end, "QEMU did not connect"
                time.sleep(0.05)
            time.sleep(0.5)  # a refused handshake would end QEMU or the connection now
            assert qemu.poll() is None, qemu.stderr and qemu.stderr.read()
            assert pump.snapshot()["ports"][spec.name]["state"] == "connected"
        finally:
            qemu.kill()
            qemu.communicate()
            pump.request_stop()
            serving.join()
