"""A dialogue that moves the state of a device: out of one back-end, into another.

Spec: vhost-user, "Migrating back-end state".
"""

from __future__ import annotations

import os
import select
import time
from contextlib import suppress
from typing import Final

from vq.dialogue import Dialogue
from vq.errors import BackendError
from vq.message import Request
from vq.payload import Transfer
from vq.state_transfer import STATE_MAX

__all__ = ["StateDialogue"]

STATE_NO_FD: Final = 1 << 8  # the back-end uses the pipe that it was given


class StateDialogue(Dialogue):
    """A connection to a back-end whose device can save and load its state (DEVICE_STATE)."""

    def begin_state(self, fd: int, *, load: bool) -> None:
        """Have the device save its state to a pipe, or load it from there (the end is where nobody writes any more).

        Raises
        ------
        BackendError
            It refuses.
        """
        word, came = self.request_fd(Request.SET_DEVICE_STATE_FD, Transfer(int(load), 0), [fd])
        if came is not None:
            os.close(came)
        if word != STATE_NO_FD or came is not None:
            limit = f"{STATE_NO_FD:#x} is a success without a descriptor; other channels are not used"
            raise BackendError("SET_DEVICE_STATE_FD", "reply", f"{word:#x}", limit)

    def check_state(self) -> None:
        """Wait for the end of the transfer; raises BackendError if it has failed."""
        if self.request(Request.CHECK_DEVICE_STATE) != 0:
            raise BackendError("CHECK_DEVICE_STATE", "state", "not transferred", "see the log of the back-end")

    def save_state(self) -> bytes:
        """Have the device save its state, and read it; at most STATE_MAX bytes. All rings must stand."""
        reader, writer = os.pipe2(os.O_CLOEXEC)
        try:
            try:
                self.begin_state(writer, load=False)
            finally:
                os.close(writer)
            state = b""
            end = time.monotonic() + self.timeout
            while True:
                if not select.select([reader], [], [], max(0.0, end - time.monotonic()))[0]:
                    raise BackendError("SET_DEVICE_STATE_FD", "state", "incomplete", f"no end in {self.timeout:g} s")
                data = os.read(reader, 1 << 16)
                if not data:
                    break
                state += data
                if len(state) > STATE_MAX:
                    raise BackendError("SET_DEVICE_STATE_FD", "state", "too long", f"the limit is {STATE_MAX} bytes")
        finally:
            os.close(reader)
        self.check_state()
        return state

    def load_state(self, state: bytes) -> None:
        """Have the device load a state; raises BackendError if it does not like it. All rings must stand."""
        reader, writer = os.pipe2(os.O_CLOEXEC)
        try:
            try:
                self.begin_state(reader, load=True)
            finally:
                os.close(reader)
            os.set_blocking(writer, False)
            end = time.monotonic() + self.timeout
            left = memoryview(state)
            with suppress(BrokenPipeError):  # it has refused already, and says so below
                while left:
                    if not select.select([], [writer], [], max(0.0, end - time.monotonic()))[1]:
                        raise BackendError("SET_DEVICE_STATE_FD", "state", "unread", f"for {self.timeout:g} s")
                    left = left[os.write(writer, left[: 1 << 16]) :]
        finally:
            os.close(writer)
        self.check_state()
