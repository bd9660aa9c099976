"""Which stages are measured in which variants, and how each is run."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from types import ModuleType
from typing import Any

from .guest import HEADER_BYTES, NUM, Guest, Shape

LAYOUTS = {"split": False, "packed": True}
HEADERS = {  # flags, gso_type, hdr_len, gso_size, csum_start, csum_offset
    "zero": (0, 0, 0, 0, 0, 0),
    "csum": (1, 0, 0, 0, 34, 6),
    "tso4": (1, 1, 54, 1448, 34, 16),
}


PLAIN = Shape()


@dataclass(frozen=True)
class Case:
    """One row of the table in one layout.

    Attributes
    ----------
    stage, variant
        Names for people.
    layout
        split, packed, or any: the stage knows no layout.
    shape
        The guest (both guests of a whole round).
    option
        What the stage itself varies in.
    unit
        What is counted.
    """

    stage: str
    variant: str
    layout: str = "any"
    shape: Shape = PLAIN
    option: Any = None
    unit: str = "packet"

    def __str__(self) -> str:
        return f"{self.stage}, {self.variant}, {self.layout}"


@dataclass
class Job:
    """A case made ready: `run(laps)` gives cycles, units, and for some stages what was found on the way."""

    run: Callable[[int], tuple[int, ...]]
    units: int  # of a lap
    source: Guest | None = None
    target: Guest | None = None
    data: Any = None
    _ends: list[Callable[[], None]] = field(default_factory=list)

    def close(self) -> None:
        """Give back what the job holds."""
        for end in self._ends:
            end()


def both(stage: str, variant: str, shape: Shape = PLAIN, **more: Any) -> list[Case]:
    """A case in each layout."""
    return [Case(stage, variant, name, replace(shape, packed=packed), **more) for name, packed in LAYOUTS.items()]


def _cases() -> list[Case]:
    many, log = Shape(regions=64), Shape(log=True)
    two, eight = Shape(parts=2), Shape(parts=8)
    indirect, in_order = Shape(parts=2, indirect=True), Shape(in_order=True)
    long = Shape(size=1518)
    cases = [
        *[
            Case("translate", f"{name}{variant}", shape=shape, option=(near, same))
            for name, near in (("near, ", True), ("hint, ", False))
            for variant, shape, same in (
                ("1 region", PLAIN, False),
                ("64 regions, as before", many, True),
                ("64 regions, another", many, False),
            )
        ],
        *both("walk", "1 descriptor"),
        *both("walk", "2 descriptors", two),
        *both("walk", "8 descriptors", eight),
        *both("walk", "indirect, 2", indirect),
        *both("walk", "indirect, 8", replace(indirect, parts=8)),
        *both("walk", "indirect, 2, 64 regions", replace(indirect, regions=64)),
        *both("pop", "look, use, commit"),
        *both("used", "publish"),
        *both("used", "publish, in order", in_order),
        *both("used", "publish, log", log),
        *both("notify", "not wanted", unit="call"),
        *both("notify", "wanted", option="wanted", unit="call"),
        *both("notify", "not wanted, event idx", Shape(event_idx=True), unit="call"),
        Case("notify", "signal an eventfd", option="signal", unit="call"),
        *[Case("header", f"check, {name}", option=fields) for name, fields in HEADERS.items()],
        *[Case("copy", f"{size} bytes", option=size) for size in (64, 256, 1518, 9000)],
    ]
    for stage in ("pull", "pull, release", "push", "whole round"):
        logged = [] if stage == "pull" else both(stage, "log", log)
        cases += [*both(stage, "64 bytes"), *both(stage, "64 regions", many), *logged]
        cases += [*both(stage, "2 descriptors", two), *both(stage, "indirect, 2", indirect)]
        if stage in {"pull, release", "whole round"}:
            cases += both(stage, "in order", in_order)
        if stage == "pull":
            cases += both(stage, "headers ask", Shape(asks=True))
        elif stage == "push":
            cases += [*both(stage, "headers change", option="changing"), *both(stage, "1518 bytes", long)]
            cases += both(stage, "1518 bytes, 2 buffers each", replace(long, share=2))
        elif stage == "whole round":
            cases += [*both(stage, "event idx", Shape(event_idx=True)), *both(stage, "1518 bytes", long)]
    return cases


CASES = _cases()


def prepare(stages: ModuleType, case: Case) -> Job:
    """Make a case ready to run."""
    return PREPARE[case.stage](stages, case)


def _translate(stages: ModuleType, case: Case) -> Job:
    guest = Guest(stages, case.shape, receives=False)
    addresses = [parts[0][0] for parts in guest.places]
    near, same = case.option
    if same:
        addresses = [addresses[0] + i for i in range(NUM)]
    length = HEADER_BYTES + case.shape.size
    return Job(
        lambda laps: stages.translate(guest.map, addresses, length, near, laps),
        NUM,
        source=guest,
        data=addresses,
        _ends=[guest.close],
    )


def _header(stages: ModuleType, case: Case) -> Job:
    return Job(lambda laps: stages.header(case.option, 1514, laps), NUM)


def _copy(stages: ModuleType, case: Case) -> Job:
    copies = stages.Copies(case.option)
    return Job(lambda laps: stages.copy(copies, laps), NUM, data=copies)


def _notify(stages: ModuleType, case: Case) -> Job:
    if case.option == "signal":
        fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        return Job(lambda laps: stages.signal(fd, laps), NUM, data=fd, _ends=[lambda: os.close(fd)])
    guest = Guest(stages, case.shape, receives=False)
    if case.option == "wanted":
        guest.lane.want_calls()
    return Job(lambda laps: stages.notify(guest.lane, laps), NUM, source=guest, _ends=[guest.close])


def _of_source(name: str) -> Callable[[ModuleType, Case], Job]:
    """A stage that works on the packets of a transmitq."""

    def prepare_source(stages: ModuleType, case: Case) -> Job:
        guest = Guest(stages, case.shape, receives=False)
        stage = getattr(stages, name)
        return Job(lambda laps: stage(guest.lane, laps), case.shape.chains, source=guest, _ends=[guest.close])

    return prepare_source


def _push(stages: ModuleType, case: Case) -> Job:
    guest = Guest(stages, case.shape, receives=True)
    packets = stages.Burst(case.shape.size, case.option == "changing")
    return Job(
        lambda laps: stages.push(guest.lane, packets, laps),
        case.shape.chains // case.shape.share,
        target=guest,
        data=packets,
        _ends=[guest.close],
    )


def _whole(stages: ModuleType, case: Case) -> Job:
    source, target = Guest(stages, case.shape, receives=False), Guest(stages, case.shape, receives=True)
    return Job(
        lambda laps: stages.whole(source.lane, target.lane, laps),
        case.shape.chains,
        source=source,
        target=target,
        _ends=[source.close, target.close],
    )


PREPARE: dict[str, Callable[[ModuleType, Case], Job]] = {
    "translate": _translate,
    "walk": _of_source("walk"),
    "pop": _of_source("pop"),
    "used": _of_source("used"),
    "notify": _notify,
    "header": _header,
    "copy": _copy,
    "pull": _of_source("pull"),
    "pull, release": _of_source("pull_release"),
    "push": _push,
    "whole round": _whole,
}
