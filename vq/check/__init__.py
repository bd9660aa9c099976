"""Conformance and hostile-input check of any vhost-user back-end, ours or others', as a front-end sees it.

`run` drives the back-end behind a socket with our own front-end and driver. Each check is a small function with the
clause that it is about (`vq.check.registry`), in the rooms `conformance` (what a front-end may rely on) and `hostile`
(what it must not be able to do). Every wait ends.
"""

from __future__ import annotations

from vq.check.outcome import Group, Outcome, Result
from vq.check.run import run, select

__all__ = ["Group", "Outcome", "Result", "run", "select"]
