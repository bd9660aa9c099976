"""The socket device under a guest with Linux: streams both ways, called from either side."""

from __future__ import annotations

import select
import socket
import subprocess
from pathlib import Path

import numpy as np
import pytest

from interop.guest import Guest, shared_words
from interop.rig import Rig
from vq.devices.vsock import VsockDevice
from vq.testing import serving

pytestmark = pytest.mark.guest
TOOL = Path(__file__).with_name("vsock_tool.c")
BYTES = 3_000_000
SAYS = "for i in $(seq 300); do grep -q '{0}' {1} && break; sleep 0.1; done; grep '{0}' {1}"


def numbers(ours: int) -> bytes:
    """The sequence of the tool in the guest (1), and the one that it expects (0)."""
    place = np.arange(BYTES, dtype=np.uint64)
    return bytes((place * 31 + (place >> 8) + (place >> 16) + ours).astype(np.uint8))


def exchange(sock: socket.socket) -> bytes:
    """Send all, and read to the end, at the same time."""
    out, found = memoryview(numbers(0)), bytearray()
    sock.setblocking(False)
    while True:
        readable, writable, _ = select.select([sock], [sock] if out else [], [], 60)
        assert readable or writable, (len(out), len(found))
        if writable:
            out = out[sock.send(out[:6000]) :]
            if not out:
                sock.shutdown(socket.SHUT_WR)
        if readable:
            part = sock.recv(9000)
            if not part and not out:
                return bytes(found)
            found += part


def called(path: str, port: int) -> socket.socket | None:
    """A stream to a port of the guest, or None if nobody listens there."""
    sock = socket.socket(socket.AF_UNIX)
    sock.settimeout(60)
    sock.connect(path)
    sock.sendall(b"CONNECT %d\n" % port)
    answer = b""
    while not answer.endswith(b"\n"):
        part = sock.recv(1)
        if not part:
            sock.close()
            return None
        answer += part
    assert answer.startswith(b"OK ")
    return sock


def boot(rig: Rig, packed: str) -> Guest:
    """A guest with the tool in /tmp."""
    tool = rig.scratch / "tool"
    subprocess.run(["gcc", "-O2", "-Wall", "-static", "-o", tool, TOOL], check=True)
    with tool.open("ab") as file:
        file.write(bytes(-tool.stat().st_size % 512))
    options = [word.split(",reconnect")[0] for word in shared_words(rig.sock())]
    options += ["-device", f"vhost-user-vsock-pci,chardev=c0,packed={packed}"]
    options += ["-drive", f"if=none,id=d,format=raw,readonly=on,file={tool}", "-device", "virtio-blk-pci,drive=d"]
    guest = rig.guest(rig.sock(), options=options)
    guest.check("cat /dev/vda >/tmp/tool && chmod +x /tmp/tool && modprobe vmw_vsock_virtio_transport")
    return guest


@pytest.mark.parametrize("packed", ["off", "on"])
def test_streams_of_a_guest(rig: Rig, packed: str) -> None:
    path = str(rig.sock("host"))
    with (
        serving(VsockDevice(42, path), rig.sock()),
        socket.socket(socket.AF_UNIX) as server,
    ):
        guest = boot(rig, packed)
        # The guest calls: nobody is there, then somebody is.
        assert guest.run("/tmp/tool call 2 1234 1").code == 2
        server.bind(f"{path}_1234")
        server.listen()
        guest.check(f"/tmp/tool call 2 1234 {BYTES} >/tmp/out 2>&1 & echo $! >/tmp/pid")
        stream, _ = server.accept()
        with stream:
            assert exchange(stream) == numbers(1)
        words = f"sent {BYTES} read {BYTES}"
        guest.check(SAYS.format(words, "/tmp/out"), 60)
        # And is called.
        guest.check(f"/tmp/tool serve 77 {BYTES} >/tmp/out2 2>&1 &")
        while (caller := called(path, 77)) is None:
            pass  # it is about to listen
        with caller:
            assert exchange(caller) == numbers(1)
        guest.check(SAYS.format(words, "/tmp/out2"), 60)
        assert called(path, 78) is None  # nobody listens there
        guest.kill()
