"""Live migration between two QEMU processes of this host.

A destination is a second `Guest` with the same devices on a socket of its own, which waits for what comes in; `migrate`
moves the guest there, with its command port and its addresses.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple, TypeVar

from interop.guest import Guest
from interop.process import wait_until

INCOMING = ("-incoming", "defer")  # QEMU options of a destination: it waits until QMP says where the guest comes from
ENDED = frozenset({"completed", "failed", "cancelled"})
SECONDS = 60
# Nothing is held back, as the way between the two is a Unix socket; a busy machine may take a second for the last step.
FAST: Mapping[str, int] = {"max-bandwidth": 4 << 30, "downtime-limit": 1000}
SLOW: Mapping[str, int] = {"max-bandwidth": 256 << 10, "downtime-limit": 1}  # never comes to its end
# A pass over all memory lasts long enough for traffic to make pages dirty, so that others follow it.
MANY_ROUNDS: Mapping[str, int] = {"max-bandwidth": 200 << 20, "downtime-limit": 1}
AnyGuest = TypeVar("AnyGuest", bound=Guest)


class Moved(NamedTuple):
    """What QEMU says of a migration that is over."""

    total_ms: int
    downtime_ms: int


def prepare(destination: AnyGuest, source: Guest) -> AnyGuest:
    """Wait until a destination's sockets are there, and have it take over the source's command port and addresses.

    Call it before `start`, so that whoever is inside the guest never sees its command port closed.
    """
    destination.inherit(source)
    return destination


def start(
    source: Guest,
    destination: Guest,
    *,
    capabilities: Iterable[str] = (),
    parameters: Mapping[str, Any] = FAST,
) -> None:
    """Begin to move a guest, and return at once.

    Parameters
    ----------
    source, destination
        The destination was started with `INCOMING`.
    capabilities : iterable of str
        Switched on at both ends, such as ``postcopy-ram``.
    parameters : mapping
        Of ``migrate-set-parameters``, at both ends.
    """
    wanted = [{"capability": name, "state": True} for name in capabilities]
    for guest in (destination, source):
        if wanted:
            guest.qmp("migrate-set-capabilities", capabilities=wanted)
        guest.qmp("migrate-set-parameters", **parameters)
    uri = f"unix:{destination.migration_path}"
    destination.qmp("migrate-incoming", uri=uri)
    source.qmp("migrate", uri=uri)


def status(source: Guest) -> dict[str, Any]:
    """What the source knows of the migration."""
    found: dict[str, Any] = source.qmp("query-migrate")
    return found


def wait_status(source: Guest, *wanted: str, timeout: float = SECONDS) -> dict[str, Any]:
    """Wait until the migration is in one of these states; an end that is not wanted fails at once."""
    found: dict[str, Any] = {}

    def there() -> bool:
        found.update(status(source))
        now = found.get("status")
        assert now in wanted or now not in ENDED, f"migration {now}, not {wanted}: {found.get('error-desc')}"
        return now in wanted

    wait_until(f"migration of {source.name}: {' or '.join(wanted)}", there, timeout, [source.child])
    return found


def wait_rounds(source: Guest, rounds: int) -> None:
    """Wait until QEMU has asked so often which pages are dirty, or is at the end."""

    def there() -> bool:
        found = status(source)
        return found["status"] in ENDED or found.get("ram", {}).get("dirty-sync-count", 0) >= rounds

    wait_until(f"{rounds} rounds", there, SECONDS, [source.child])


def cancel(source: Guest) -> None:
    """Have the guest stay where it is."""
    source.qmp("migrate_cancel")
    wait_status(source, "cancelled")


def finish(source: Guest, destination: Guest) -> Moved:
    """Wait for the end of a migration, and until the guest runs at the destination."""
    found = wait_status(source, "completed")
    wait_until(
        f"{destination.name} runs",
        lambda: bool(destination.qmp("query-status")["status"] == "running"),
        SECONDS,
        [destination.child],
    )
    return Moved(found["total-time"], found["downtime"])


def migrate(
    source: Guest,
    destination: Guest,
    *,
    capabilities: Iterable[str] = (),
    parameters: Mapping[str, Any] = FAST,
    rounds: int = 0,
    postcopy: bool = False,
) -> Moved:
    """Move a guest, and end QEMU at its old place.

    Parameters
    ----------
    source, destination, capabilities, parameters
        As for `start`.
    rounds : int
        Have the dirty log read so often at least, if the guest makes pages dirty, before the last step is allowed;
        `MANY_ROUNDS` makes it happen.
    postcopy : bool
        The guest goes over to the destination as soon as memory is being copied; ``postcopy-ram`` is among the
        capabilities then.
    """
    prepare(destination, source)
    start(source, destination, capabilities=capabilities, parameters=parameters)
    if postcopy:
        wait_status(source, "active")
        source.qmp("migrate-start-postcopy")
    if rounds:
        wait_rounds(source, rounds)
        source.qmp("migrate-set-parameters", **FAST)
    moved = finish(source, destination)
    source.kill()
    return moved
