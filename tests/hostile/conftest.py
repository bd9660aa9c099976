"""Fixtures of the hostile tests: a process under attack, and a neighbour that proves after each test that it lives on.

Each test names the line of the security checklist (protocol section 11) that it is about: `@pytest.mark.checklist(26)`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from hostile.guest import Guest
from hostile.process import Host, Neighbour, wait_until
from hostile.rings import LAYOUTS


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    """The process under attack, one a file of tests."""
    host = Host(tmp_path_factory.mktemp("host"))
    yield host
    assert host.close() == 0
    assert "Traceback" not in host.messages


@pytest.fixture(scope="module")
def neighbour(host: Host) -> Iterator[Neighbour]:
    """The honest guest beside the attacker."""
    neighbour = Neighbour(host.neighbour_path)
    neighbour.check()
    # What is made once and kept (memory of the interpreter, caches) is made now.
    for _ in range(2):
        warm = Guest(host)
        warm.exchange(bytes(64))
        warm.close()
    neighbour.before = host.settled()
    yield neighbour
    neighbour.close()


@pytest.fixture
def unharmed(host: Host, neighbour: Neighbour) -> Iterator[None]:
    """Whatever a test did: the process lives, the neighbour's packets are right, nothing is left behind."""
    before = neighbour.before
    assert before is not None
    yield
    assert host.alive, f"the process died:\n{host.messages[-3000:]}"
    neighbour.check()
    host.wait_free()

    def clean() -> bool:
        now = host.holdings()
        return now.fds == before.fds and now.shared_maps == before.shared_maps and now.maps <= before.maps + 4

    try:
        wait_until("fds and mappings are as before", clean, 2)
    except AssertionError as failure:
        raise AssertionError(f"{failure}: {before} before, {host.holdings()} now") from None
    assert "Traceback" not in host.messages


Connect = Callable[..., Guest]


@pytest.fixture
def layout() -> str:
    """The layout of all rings of a test; `every_layout` makes it each of them."""
    return "split"


every_layout = pytest.mark.parametrize("layout", LAYOUTS)


@pytest.fixture
def connect(host: Host, unharmed: None, layout: str) -> Iterator[Connect]:
    """Make guests, one after the other or just one; all are gone after the test."""
    guests: list[Guest] = []

    def make(*args: Any, **options: Any) -> Guest:
        guest = Guest(host, *args, **{"layout": layout} | options)
        guests.append(guest)
        return guest

    yield make
    for guest in guests:
        if guest.err_fds:
            guest.close()


@pytest.fixture
def guest(connect: Connect) -> Guest:
    """A guest with both rings running."""
    return connect()


@pytest.fixture
def mute(connect: Connect) -> Guest:
    """A guest that has shared its memory, but started no ring."""
    return connect(running=False)
