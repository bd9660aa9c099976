"""The QEMU options that `vq qemu` prints make a guest that works, in both socket roles."""

from __future__ import annotations

import shlex
import subprocess
import sys

import pytest

from interop.backend import Pump
from interop.features import assert_packed, kernel_mtu
from interop.process import wait_until
from interop.rig import Rig
from interop.traffic import assert_ping, send_bulk


def printed_options(port: str) -> list[str]:
    command = [sys.executable, "-m", "vq", "qemu", port, "null:", "--memory", "192M"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    return shlex.split(line)


PORTS = {"pump listens": ",queues=2", "pump connects": ",client,layout=split,mtu=1400"}


@pytest.mark.guest
@pytest.mark.parametrize("options", PORTS.values(), ids=PORTS)
def test_a_guest_of_the_printed_options_works(rig: Rig, options: str) -> None:
    host = rig.host()
    port = f"vhost:{rig.sock()}{options}"
    pairs = 2 if "queues" in options else 1
    backend = rig.backend(port, f"tap:vq0,queues={pairs}", host=host, start=False)
    if not isinstance(backend, Pump):
        pytest.skip("these are the lines of vq")
    guest = rig.guest(rig.sock(), boot=False, options=printed_options(port), cpus=pairs)
    if "client" in options:
        wait_until("QEMU listens", rig.sock().exists, 10, [guest.child])
    backend.start()
    guest.wait_booted()
    host.configure(1)
    guest.configure(2)
    assert_packed(guest, "split" not in options)
    assert kernel_mtu(guest) == (1400 if "mtu" in options else 1500)
    queues = backend.fresh_record()["ports"][port.partition(",")[0]]["queues"]
    assert [queue["size"] for queue in queues] == [1024] * 2 * pairs
    assert_ping(guest, host, count=30)
    send_bulk(guest, host, mib=4)
    send_bulk(host, guest, mib=4)
