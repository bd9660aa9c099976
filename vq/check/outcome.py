"""What becomes of a check, and how its function says so."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from vq.errors import VqError

__all__ = ["Failed", "Gone", "Group", "Outcome", "Result", "Skipped"]


class Group(StrEnum):
    """The two halves of a run, in their order."""

    CONFORMANCE = "conformance"
    HOSTILE = "hostile"


class Outcome(StrEnum):
    """How a check ended."""

    PASS = "pass"
    FAIL = "fail"
    SKIPPED = "skipped"


@dataclass(frozen=True, slots=True)
class Result:
    """What one check found.

    Parameters
    ----------
    name
        Room and function, such as "rings.restart".
    group
        Conformance or hostile input.
    section
        Where the specification says what is checked.
    title
        What is checked, in one sentence.
    outcome
        Pass, fail or skipped.
    reason
        Why it failed or was skipped; of a check that passed, what was seen (may be empty).
    seconds
        How long it took.
    """

    name: str
    group: Group
    section: str
    title: str
    outcome: Outcome
    reason: str
    seconds: float


class Failed(VqError):
    """The back-end did something else than the specification says; the message tells what."""


class Gone(Failed):
    """Nobody serves the socket any more: no further check can tell anything."""


class Skipped(VqError):
    """The check does not apply to this back-end; the message tells why."""
