"""Testing a device without a virtual machine: a back-end in a thread, and the guest that drives it.

    with vq.testing.serving(Rng(), path), vq.testing.Guest(path) as guest:
        assert len(guest.ask(room=16)) == 16

In pytest the fixtures `vq_serve` and `vq_guest` do the same; `vq.testing.strategies` makes packets for Hypothesis.
"""

from __future__ import annotations

from vq.testing.guest import Guest
from vq.testing.hosting import serving

__all__ = ["Guest", "serving"]
