"""The back-end that is checked: its socket, what it offers, and whether it still lives."""

from __future__ import annotations

import os
import time
from contextlib import suppress
from typing import Any, Final

from vq import virtio as v
from vq.check.devices import Driving, driving
from vq.check.guest import BASIC_PROTOCOL, Guest
from vq.check.outcome import Failed, Gone
from vq.check.program import Program
from vq.endpoint import listen
from vq.errors import BackendError, ConnectionClosed, ResourceError, VqError
from vq.frontend import Frontend
from vq.message import Request

__all__ = ["Target"]

GLANCE_S: Final = 0.1  # between two looks whether the program still runs
START_S: Final = 20.0  # that a back-end may take until it listens; DPDK takes seconds


class Target:
    """A back-end's socket; every check makes connections of its own.

    Parameters
    ----------
    path
        Where it listens.
    device
        "net", "blk" or "any": how it is driven.
    timeout
        Seconds that any answer may take.
    program
        What to start when nobody serves the socket any more; None: nothing.

    Attributes
    ----------
    features, protocol_features
        What it offers.
    echoes
        Whether packets come back (net), found out by the first check that sends some.
    """

    def __init__(self, path: str, device: str = "any", *, timeout: float = 2.0, program: Program | None = None) -> None:
        self.path = path
        self.device = device
        self.timeout = timeout
        self.driving: Driving = driving(device)
        self.features = 0
        self.protocol_features = 0
        self.echoes: bool | None = None
        self._program = program

    # --- Connections -------------------------------------------------------------------------------------------------

    def open(self) -> Frontend:
        """Connect, and insist that the connection is served; the connection before may still be on its way out.

        Raises
        ------
        Gone
            Nobody accepts a connection and answers in time.
        """
        return self._open(self.timeout)

    def _open(self, patience: float) -> Frontend:
        end = time.monotonic() + patience
        while True:
            left = end - time.monotonic()
            problem: VqError
            try:
                frontend = Frontend.connect(self.path, timeout=min(max(left, 0.0), GLANCE_S))
            except ResourceError as refused:
                if left > 0 and not self._death():
                    continue
                raise Gone(self._obituary("accepts no connection")) from refused
            frontend.timeout = self.timeout
            try:
                frontend.offered_features = frontend.request(Request.GET_FEATURES)
                return frontend
            except (ConnectionClosed, BackendError) as broken:
                frontend.close()
                problem = broken
            if time.monotonic() >= end or self._death():
                raise Gone(self._obituary(f"does not serve a fresh connection ({problem})"))
            time.sleep(0.005)

    def _death(self) -> str:
        return self._program.death() if self._program is not None else ""

    def _obituary(self, what: str) -> str:
        # A process that dumps core accepts nothing any more before its end can be seen.
        if self._program is not None:
            time.sleep(0.2)
        death = self._death()
        return f"the back-end {what}" + (f"; {death}" if death else "")

    def negotiate(self, features: int = 0, protocol: int = BASIC_PROTOCOL) -> Frontend:
        """Connect and agree on features, those that every connection wants and the given ones."""
        frontend = self.open()
        try:
            frontend.set_features(frontend.negotiate(features | self.driving.features, protocol))
        except BaseException:
            frontend.close()
            raise
        return frontend

    def guest(self, **options: Any) -> Guest:
        """Connect with memory and rings, by default running; see `Guest`."""
        return Guest(self, **options)

    # --- Life and death ----------------------------------------------------------------------------------------------

    def probe(self) -> None:
        """Learn what the back-end offers.

        Raises
        ------
        ResourceError
            Nobody listens, or answers, at all.
        """
        try:
            with self._open(START_S if self._program is not None else self.timeout) as frontend:
                self.features = frontend.offered_features
                if v.has(self.features, v.VHOST_USER_F_PROTOCOL_FEATURES):
                    self.protocol_features = frontend.request(Request.GET_PROTOCOL_FEATURES)
        except Gone as gone:
            raise ResourceError(str(gone), path=self.path, remedy="start the back-end first") from gone

    def verify(self) -> None:
        """Insist that a fresh connection is served."""
        self.open().close()

    def works(self) -> None:
        """Insist that a fresh connection does the device's work."""
        try:
            with self.guest() as guest:
                self.driving.exchange(guest)
        except Gone:
            raise
        except VqError as problem:
            raise Failed(f"a fresh connection does not work afterwards: {problem}") from problem

    def start(self) -> None:
        """Start the program behind the socket, if that is ours to do."""
        if self._program is not None:
            self._program.end()
            with suppress(VqError):
                listen(self.path).close()  # removes the socket file of a dead process, which not every program does
            self._program.start()

    def revive(self) -> bool:
        """Start the back-end again, if we may; tell whether it serves."""
        if self._program is None:
            return False
        self.start()
        with suppress(Gone):
            self._open(START_S).close()
            return True
        return False

    def process(self) -> int | None:
        """The process that listens, as the kernel knows it; None if we may not look at it."""
        with self.open() as frontend:
            pid = frontend.peer_process()
        return pid if pid and os.access(f"/proc/{pid}/fd", os.R_OK) else None
