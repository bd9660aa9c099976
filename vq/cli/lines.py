"""Rates with units for people, and snapshots as plain lines."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vq.queue_stats import QueueWork, queue_works
from vq.stats import Flow, flows, queue_words

__all__ = ["plain_lines", "scaled", "short"]


def scaled(value: float, unit: str) -> str:
    """A rate with the prefix that keeps it below 1000, and one decimal at most: ``1.2 kpps``, ``3 kbit/s``."""
    for prefix in ("", "k", "M", "G"):
        if round(value, 1) < 1000:
            return f"{value:.1f}".removesuffix(".0") + f" {prefix}{unit}"
        value /= 1000
    return f"{value:.1f}".removesuffix(".0") + f" T{unit}"


def short(value: float) -> str:
    """As `scaled`, without a unit: ``1.2k``, ``15M``."""
    return scaled(value, "").replace(" ", "")


def _line(flow: Flow) -> str:
    line = (
        f"{flow.port} {flow.state} {flow.direction} {scaled(flow.packet_rate, 'pps')}"
        f" {scaled(flow.bit_rate, 'bit/s')} {flow.packets} packets"
    )
    return line + (f", dropped: {flow.drops}" if flow.dropped else "")


def _queue_line(work: QueueWork) -> str:
    parts = [f"{work.cycles:.1f} cycles/packet"] if work.cycles is not None else []
    if work.median:
        parts.append(f"batch {work.median}, largest {work.largest}")
    if work.empty_rate is not None:
        parts.append(f"{short(work.empty_rate)} empty polls/s")
    parts += [f"{short(work.call_rate)} calls/s", f"{short(work.suppressed_rate)} suppressed/s"]
    return f"{work.port} {work.queue} {work.ring}: {', '.join(parts)}"


def plain_lines(before: Mapping[str, Any] | None, now: Mapping[str, Any], *, everything: bool = False) -> list[str]:
    """One line for each direction and each queue with packets, for a log file: no colours, no cursor movement.

    Parameters
    ----------
    before, now
        Two snapshots; without the first one rates are since the start.
    everything
        Also directions that never had a packet, and queues that had none between the snapshots; without it a port
        that has only such directions gets one line.
    """
    head = f"{now['uptime']:.1f}s"
    lines = []
    found = flows(before, now)
    for name, port in now["ports"].items():
        own = [flow for flow in found if flow.port == name]
        shown = [flow for flow in own if everything or flow.packets or flow.dropped]
        lines += [f"{head} {_line(flow)}" for flow in shown]
        if not shown:
            lines.append(f"{head} {name} {port.get('state', '')}, no packet yet")
    lines += [f"{head} {_queue_line(work)}" for work in queue_works(before, now) if everything or work.packets]
    for name, port in now["ports"].items():
        lines += [f"{head} {name} {words}" for words in queue_words(port)]
    return lines
