"""A device and its test, without a guest: pytest examples/test_reverser.py.

The fixture comes with vq, and pytest finds it by itself (`vq.testing.plugin`): it serves a device and connects to it.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import vq
from vq.testing.strategies import frames, splits

Connect = Callable[..., vq.Frontend]


class Reverser(vq.Device):
    """Answers each request with its bytes in reverse."""

    def handle(self, queue: vq.DeviceQueue) -> None:
        for chain in queue:
            chain.write(chain.read()[::-1])
            chain.complete()


@pytest.mark.parametrize("indirect", [False, True])
@pytest.mark.parametrize("layout", ["split", "packed"])
def test_it_reverses(vq_frontend: Connect, layout: str, indirect: bool) -> None:
    driver = vq_frontend(Reverser()).driver(0, size=16, layout=layout)
    for _ in range(40):  # more than once around the ring
        assert driver.ask(b"abc", b"def", room=[4, 4], indirect=indirect) == b"fedcba"


def test_it_goes_on_where_it_stopped(vq_frontend: Connect) -> None:
    driver = vq_frontend(Reverser()).driver(0)
    assert driver.ask(b"before", room=6) == b"erofeb"
    driver.stop()
    driver.start()
    assert driver.ask(b"after", room=5) == b"retfa"


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_any_packet(vq_frontend: Connect, data: st.DataObject) -> None:
    packet = data.draw(frames(max_size=256))
    driver = vq_frontend(Reverser()).driver(0)
    assert driver.ask(*data.draw(splits(packet)), room=len(packet)) == packet[::-1]
