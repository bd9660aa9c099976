"""Fixtures for pytest; loaded by its entry point, so that nothing is imported before one of them is asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from vq.frontend import Frontend
    from vq.hosted_device import HostedDevice
    from vq.testing.guest import Guest


@pytest.fixture
def vq_serve(tmp_path: Path) -> Iterator[Callable[[HostedDevice], str]]:
    """Serve a device until the test ends: called with it, gives the path of its socket."""
    from vq.testing.hosting import serving

    with ExitStack() as stack:
        count = 0

        def serve(device: HostedDevice) -> str:
            nonlocal count
            count += 1
            path = tmp_path / f"vq{count}.sock"
            stack.enter_context(serving(device, path))
            return str(path)

        yield serve


@pytest.fixture
def vq_guest(vq_serve: Callable[[HostedDevice], str]) -> Iterator[Callable[..., Guest]]:
    """Connect a guest to a device that is served, or to the path of a socket; options as of `vq.testing.Guest`.

    All queues of such a device are started, if `queues` does not say how many.
    """
    from vq.testing.guest import Guest

    with ExitStack() as stack:

        def connect(to: Any, **options: Any) -> Guest:
            if isinstance(to, str | Path):
                return stack.enter_context(Guest(to, **options))
            path = vq_serve(to)
            return stack.enter_context(Guest(path, **{"queues": len(to.queues)} | options))

        yield connect


@pytest.fixture
def vq_frontend(vq_serve: Callable[[HostedDevice], str]) -> Iterator[Callable[..., Frontend]]:
    """Connect a front-end to a device that is served, or to the path of a socket; `driver(0)` drives its queue 0."""
    from vq.frontend import Frontend

    with ExitStack() as stack:

        def connect(to: Any, **options: Any) -> Frontend:
            path = str(to) if isinstance(to, str | Path) else vq_serve(to)
            return stack.enter_context(Frontend.connect(path, **options))

        yield connect
