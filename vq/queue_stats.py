"""What each queue of a guest cost between two snapshots: cycles, batches, polls in vain, notifications."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from vq.stats import Snapshot, seconds_between

__all__ = ["BATCHES", "QueueWork", "queue_works"]

BATCHES: Final = ("1", "2-3", "4-7", "8-15", "16-31", "32")  # packets; as the engine names them (BURST_NAMES)


@dataclass(frozen=True, slots=True)
class QueueWork:
    """One queue between two snapshots.

    Parameters
    ----------
    port, queue
        Names of the port and of the queue, such as "transmitq0".
    ring
        Layout and entries: "packed 256".
    packets
        How many moved.
    cycles
        Ticks of the time stamp counter for each packet, in rounds that moved some; None: nobody measured any, as for
        what a switch delivers.
    batches
        Rounds by how many packets they moved, in the order of `BATCHES`.
    empty_rate
        Polls that found nothing, times a second; None: the queue is not polled, since packets go out to it.
    call_rate, suppressed_rate
        Notifications of the driver, and those that it did not want, times a second.
    """

    port: str
    queue: str
    ring: str
    packets: int
    cycles: float | None
    batches: tuple[int, ...]
    empty_rate: float | None
    call_rate: float
    suppressed_rate: float

    @property
    def median(self) -> str:
        """The batch of the middle round, "16-31"; empty without any."""
        seen, half = 0, sum(self.batches) / 2
        for name, rounds in zip(BATCHES, self.batches, strict=True):
            seen += rounds
            if rounds and seen >= half:
                return name
        return ""

    @property
    def largest(self) -> str:
        """The largest batch, as `median`."""
        names = [name for name, rounds in zip(BATCHES, self.batches, strict=True) if rounds]
        return names[-1] if names else ""


def queue_works(before: Snapshot | None, now: Snapshot) -> list[QueueWork]:
    """The queues that ever moved a packet, in the order of the ports.

    Parameters
    ----------
    before, now
        As for `vq.stats.flows`.
    """
    seconds = seconds_between(before, now)
    found = []
    for name, port in now["ports"].items():
        earlier = {} if before is None else before["ports"].get(name, {})
        old = {queue["name"]: queue for queue in earlier.get("queues", ())}
        found += [
            _work(name, old.get(queue["name"], {}), queue, seconds)
            for queue in port.get("queues", ())
            if queue["packets"]
        ]
    return found


def _work(port: str, old: Mapping[str, Any], new: Mapping[str, Any], seconds: float) -> QueueWork:
    def grown(name: str) -> int:
        return int(new[name]) - int(old.get(name, 0))

    packets, cycles = grown("packets"), grown("busy_cycles")
    batches = tuple(new["bursts"].get(size, 0) - old.get("bursts", {}).get(size, 0) for size in BATCHES)
    return QueueWork(
        port=port,
        queue=new["name"],
        ring=f"{new['layout']} {new['size']}",
        packets=packets,
        cycles=cycles / packets if packets and cycles else None,
        batches=batches,
        empty_rate=grown("empty_polls") / seconds if new["name"].startswith("transmitq") else None,
        call_rate=grown("calls") / seconds,
        suppressed_rate=grown("calls_suppressed") / seconds,
    )
