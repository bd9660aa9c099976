"""How long a driver is without packets when its back-end is killed and started again: a fact, no limit."""

from __future__ import annotations

import time

import pytest

from interop.rig import Rig
from pump_rig import PACKED, USUAL, Guest

PATIENCE_S = 60.0


@pytest.mark.parametrize("layout", [0, PACKED], ids=["split", "packed"])
def test_from_the_start_of_a_back_end_to_the_first_packet(rig: Rig, layout: int) -> None:
    """Our own driver connects again and again, sets everything up anew, and sends a packet until it comes back."""
    backend = rig.backend(f"vhost:{rig.sock()}")
    backend.requires("a choice of memory slots")  # the figure is of ours
    guest = Guest(str(rig.sock()), USUAL | layout)
    guest.post(60)
    guest.send(bytes(60))
    guest.receive(PATIENCE_S)
    times = []
    for _ in range(5):
        backend.kill()
        begin = time.monotonic()
        backend.launch()
        heir = Guest(str(rig.sock()), USUAL | layout, heir_of=guest)
        guest.frontend.close()
        guest = heir
        guest.post(60)
        guest.send(bytes(60))
        guest.receive(PATIENCE_S)
        times.append(time.monotonic() - begin)
    guest.close()
    shown = ", ".join(f"{seconds:.2f}" for seconds in sorted(times))
    rig.note(f"{'packed' if layout else 'split'}: from the start of the process to the first packet: {shown} s")
