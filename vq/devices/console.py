"""The console device (VIRTIO 1.3, 5.3): a guest's terminal, at two descriptors or a pseudo-terminal of the host."""

from __future__ import annotations

import os
import tty
from typing import Final, Self

from vq.config_layout import ConfigLayout, le16, le32
from vq.device import Device
from vq.virtio import DeviceId
from vq_core.device_queue import DeviceQueue

__all__ = ["ConsoleDevice"]

F_SIZE: Final = 0
RECEIVEQ, TRANSMITQ = 0, 1
READ_BYTES = 4096


class ConsoleDevice(Device):
    """One port: what the guest writes goes to `sink`, what comes at `source` goes to the guest.

    Parameters
    ----------
    source, sink
        Descriptors, which are the device's from now on and do not block from now on. A source that is a file is read to
        its end.

    Attributes
    ----------
    path : str or None
        Of the pseudo-terminal, if it is at one: for ``screen`` and other terminals.

    Notes
    -----
    Where nobody reads the sink the guest waits. Of what comes while the guest has no buffer nothing is read.
    """

    device_id = DeviceId.CONSOLE
    queues = ("receiveq", "transmitq")
    features = (F_SIZE,)
    max_bytes = 1 << 16

    class Config(ConfigLayout):
        """VIRTIO 1.3, 5.3.4."""

        cols: le16 = 80
        rows: le16 = 24
        max_nr_ports: le32
        emerg_wr: le32

    def __init__(self, source: int, sink: int) -> None:
        self._source = source
        self._sink = os.dup(sink) if sink == source else sink  # two events, two descriptors
        self._rest = b""  # the sink was full
        self._input = b""  # the guest had no more room
        self._reading = False  # a file, soon
        self.path: str | None = None
        for fd in (self._source, self._sink):
            os.set_blocking(fd, False)

    @classmethod
    def at_pty(cls) -> Self:
        """A console at a new pseudo-terminal."""
        master, slave = os.openpty()
        tty.setraw(slave)  # lines are edited and echoed by the guest
        device = cls(master, master)
        device.path = os.ttyname(slave)
        device._slave = slave  # held, so that the terminal is there before and after somebody uses it
        return device

    _slave: int | None = None

    def resize(self, cols: int, rows: int) -> None:
        """Tell the guest how large the terminal is; from any thread."""
        self.config.update(cols=cols, rows=rows)

    def handle(self, queue: DeviceQueue) -> None:
        if queue.index == TRANSMITQ:
            self._print()
        else:
            self._listen()

    def _print(self) -> None:
        """Pass on what the guest writes, until the sink is full."""
        if self._rest:
            return
        for chain in self.chains[TRANSMITQ]:
            self._rest = chain.read()
            chain.complete()
            if not self._drain():
                break

    def _drain(self) -> bool:
        """Write what is left; whether that was all."""
        while self._rest:
            try:
                self._rest = self._rest[os.write(self._sink, self._rest) :]
            except BlockingIOError:
                self.watch(self._sink, self._has_room, writing=True)
                return False
            except OSError:  # nobody will ever read it
                self._rest = b""
        return True

    def _has_room(self) -> None:
        self.unwatch(self._sink)
        if self._drain():
            self._print()

    def _arrived(self) -> None:
        """Give the guest what has come; without a buffer of it, look again when there is one."""
        self.unwatch(self._source)
        if not self._feed():
            return
        try:
            data = os.read(self._source, READ_BYTES)
        except BlockingIOError:
            data = None
        except OSError:  # nobody will ever write again
            data = b""
        if data != b"":
            self._input += data or b""
            self._listen()

    def _listen(self) -> None:
        """Look at the source as long as the guest has taken what came, and has room for more."""
        if not self._feed():
            return
        self.unwatch(self._source)
        try:
            self.watch(self._source, self._arrived)
        except PermissionError:  # a file, or /dev/null: all that it has is there, and nothing can be waited for
            if not self._reading:
                self._reading = True
                self.call(self._read_on)

    def _read_on(self) -> None:
        self._reading = False
        self._arrived()

    def _feed(self) -> bool:
        """Fill buffers of the guest with what has come; whether there is another one for what comes."""
        queue = self.chains[RECEIVEQ]
        while self._input:
            chain = queue.pop()
            if chain is None:
                return False
            count = chain.write(self._input[: chain.writable_bytes])
            self._input = self._input[count:]
            chain.complete()
        return queue.waiting

    def close(self) -> None:
        super().close()
        for fd in {self._source, self._sink, self._slave} - {None, -1}:
            assert fd is not None
            os.close(fd)
        self._source = self._sink = -1
        self._slave = None
