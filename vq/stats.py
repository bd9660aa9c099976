"""From snapshots of a pump to rates and to JSON; nothing here prints.

A snapshot holds counters since the start. Two of them make rates.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

__all__ = ["Flow", "Load", "Snapshot", "encode", "flows", "loads", "queue_words", "seconds_between"]

Snapshot = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Flow:
    """One direction of one port.

    Parameters
    ----------
    port, state
        Name and state of the port.
    direction
        "from_guest", "to_tap", ...: seen from the pump.
    packets, bytes
        Since the start.
    packet_rate, bit_rate
        Packets and bits a second between the two snapshots; bits of the packets, without preamble and gap.
    dropped
        Packets by cause, since the start.
    """

    port: str
    state: str
    direction: str
    packets: int
    bytes: int
    packet_rate: float
    bit_rate: float
    dropped: Mapping[str, int]

    @property
    def drops(self) -> str:
        """The causes for people: "no_descriptors 12, mtu 3"; empty without any."""
        return ", ".join(f"{cause} {count}" for cause, count in self.dropped.items())


@dataclass(frozen=True, slots=True)
class Load:
    """What one worker did between two snapshots.

    Parameters
    ----------
    cpu
        The processor it is bound to, or None.
    busy
        Share of its waking time in rounds that moved packets, 0 to 1.
    sleep_rate
        How often it went to sleep, times a second.
    """

    cpu: int | None
    busy: float
    sleep_rate: float


def _directions(port: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    # What comes in first: a reader follows the packets.
    for prefix in ("from_", "to_"):
        for key, counters in port.items():
            if key.startswith(prefix):
                yield key, counters


def seconds_between(before: Snapshot | None, now: Snapshot) -> float:
    """Seconds between two snapshots, or since the start; never zero."""
    begin = 0.0 if before is None else float(before["uptime"])
    return max(float(now["uptime"]) - begin, 1e-9)


def flows(before: Snapshot | None, now: Snapshot) -> list[Flow]:
    """Every direction of every port, with rates.

    Parameters
    ----------
    before
        An earlier snapshot; None: rates since the start.
    now
        The later one.
    """
    seconds = seconds_between(before, now)
    found = []
    for name, port in now["ports"].items():
        earlier = {} if before is None else before["ports"].get(name, {})
        for direction, counters in _directions(port):
            old = earlier.get(direction, {"packets": 0, "bytes": 0})
            found.append(
                Flow(
                    name,
                    str(port.get("state", "")),
                    direction,
                    counters["packets"],
                    counters["bytes"],
                    (counters["packets"] - old["packets"]) / seconds,
                    (counters["bytes"] - old["bytes"]) * 8 / seconds,
                    counters.get("dropped", {}),
                )
            )
    return found


def loads(before: Snapshot | None, now: Snapshot) -> list[Load]:
    """What each worker did; parameters as for `flows`."""
    seconds = seconds_between(before, now)
    none = {"busy_cycles": 0, "idle_cycles": 0, "sleeps": 0}
    earlier = [none] * len(now["workers"]) if before is None else before["workers"]
    found = []
    for old, new in zip(earlier, now["workers"], strict=True):
        busy = new["busy_cycles"] - old["busy_cycles"]
        awake = busy + new["idle_cycles"] - old["idle_cycles"]
        found.append(Load(new.get("cpu"), busy / awake if awake else 0.0, (new["sleeps"] - old["sleeps"]) / seconds))
    return found


def queue_words(port: Mapping[str, Any]) -> list[str]:
    """The queues of a port that are not simply running: "receiveq0 disabled", "transmitq1 broken: ..."."""
    words = []
    for queue in port.get("queues", ()):
        if queue.get("broken"):
            words.append(f"{queue['name']} broken: {queue['broken']}")
        elif not queue.get("started", True):
            words.append(f"{queue['name']} stopped")
        elif not queue.get("enabled", True):
            words.append(f"{queue['name']} disabled")
    return words


def encode(record: Mapping[str, Any], *, final: bool = False) -> bytes:
    """One line of JSON, newline included.

    Parameters
    ----------
    record
        A snapshot, or anything of dicts, lists, numbers and strings.
    final
        Whether it is the last one; adds ``"final": true``.
    """
    import msgspec

    return msgspec.json.encode({**record, "final": True} if final else record) + b"\n"
