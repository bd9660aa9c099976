"""Testing a device without a virtual machine: a back-end in a thread, and the guest that drives it.

    with vq.testing.serving(Rng(), path), vq.testing.Guest(path) as guest:
        assert len(guest.ask(room=16)) == 16

In pytest the fixtures `vq_serve`, `vq_guest` and `vq_frontend` do the same; `vq.testing.strategies` makes packets for
Hypothesis. All of it is loaded when it is used first: pytest loads this package in every run.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from vq.testing.guest import Guest
    from vq.testing.hosting import serving

__all__ = ["Guest", "serving"]

_ROOMS: Final = {"Guest": "vq.testing.guest", "serving": "vq.testing.hosting"}


def __getattr__(name: str) -> Any:
    if name not in _ROOMS:
        raise AttributeError(f"module 'vq.testing' has no attribute {name!r}")
    return getattr(import_module(_ROOMS[name]), name)
