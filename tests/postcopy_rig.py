"""Postcopy from the front-end's side: pages of a guest that come to the back-end when it asks for them, or never.

The pages are taken out of the file behind the guest's memory, as at the destination of a migration, and kept. Until all
are back nobody in this process may touch that memory but the back-end: whoever does makes a page of zeroes.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import select
import struct
import threading
from types import TracebackType
from typing import Final, Self

from disk_rig import DiskGuest
from pump_rig import Guest
from vq import virtio as v
from vq.frontend import Frontend
from vq.payload import Region
from vq_core.guest_memory import GuestMemory

PAGE: Final = 4096
POSTCOPY: Final = v.mask(
    v.VHOST_USER_PROTOCOL_F_MQ,
    v.VHOST_USER_PROTOCOL_F_REPLY_ACK,
    v.VHOST_USER_PROTOCOL_F_RESET_DEVICE,
    v.VHOST_USER_PROTOCOL_F_PAGEFAULT,
)
PUNCH_HOLE: Final = 3  # with the size kept
EVENT: Final = struct.Struct("=BxxxxxxxQQQ")  # struct uffd_msg: event; flags, address and thread of a page fault
PAGEFAULT: Final = 0x12
WAKE: Final = 0x8010AA02  # UFFDIO_WAKE
_libc = ctypes.CDLL(None, use_errno=True)


class Pager:
    """The pages of a guest that are on their way, and the thread that brings those that are asked for.

    Parameters
    ----------
    memory
        Its pages are taken away now.
    serving
        Whether pages that are asked for come.
    """

    def __init__(self, memory: GuestMemory, *, serving: bool = True) -> None:
        self.rows = memory.regions
        self.asked = 0  # pages that the back-end has waited for
        self.heard = threading.Event()  # of the first of these
        self.serving = serving
        self._lock = threading.Lock()
        self._away: dict[tuple[int, int], bytes] = {}
        for number, (_, size, _, offset, fd) in enumerate(self.rows):
            for at in range(0, size, PAGE):
                self._away[number, at] = os.pread(fd, PAGE, offset + at)
            if _libc.fallocate(fd, PUNCH_HOLE, ctypes.c_long(offset), ctypes.c_long(size)) != 0:
                raise OSError(ctypes.get_errno(), "fallocate")
        self._end_fd = os.eventfd(0, os.EFD_CLOEXEC)
        self._uffd = -1
        self._places: tuple[Region, ...] = ()
        self._thread: threading.Thread | None = None

    def begin(self, uffd: int, places: tuple[Region, ...]) -> None:
        """Serve faults at these addresses of the back-end; the descriptor is ours from here on."""
        self._uffd, self._places = uffd, places
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        poll = select.poll()
        poll.register(self._uffd, select.POLLIN)
        poll.register(self._end_fd, select.POLLIN)
        while True:
            if any(fd == self._end_fd for fd, _ in poll.poll()):
                return
            try:
                event, _, address, _ = EVENT.unpack(os.read(self._uffd, EVENT.size))
            except BlockingIOError:
                continue  # who waited has been woken meanwhile
            assert event == PAGEFAULT
            self.asked += 1
            self.heard.set()
            if self.serving:
                for number, place in enumerate(self._places):
                    if 0 <= address - place.user_addr < place.size:
                        self.bring(number, (address - place.user_addr) // PAGE * PAGE)

    def bring(self, number: int, at: int) -> None:
        """Put a page in its place, once, and wake who waits for it."""
        with self._lock:
            page = self._away.pop((number, at), None)
            if page is not None:
                row = self.rows[number]
                os.pwrite(row[4], page, row[3] + at)
        if self._uffd >= 0:
            fcntl.ioctl(self._uffd, WAKE, struct.pack("=QQ", self._places[number].user_addr + at, PAGE))

    def move(self, places: tuple[Region, ...]) -> None:
        """The back-end has mapped the memory anew: it lies somewhere else."""
        self._places = places

    def resident(self) -> int:
        """Bytes of the memory that are there, whoever put them there."""
        return sum(os.fstat(row[4]).st_blocks * 512 for row in self.rows)

    def bring_all(self) -> None:
        """Bring all pages that have not come."""
        for number, at in list(self._away):
            self.bring(number, at)

    def close(self) -> None:
        """End the thread and let go of the userfaultfd."""
        if self._thread is not None:
            os.eventfd_write(self._end_fd, 1)
            self._thread.join(60)
            assert not self._thread.is_alive()
            self._thread = None
        for fd in (self._uffd, self._end_fd):
            if fd >= 0:
                os.close(fd)
        self._uffd = self._end_fd = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def share(frontend: Frontend, pager: Pager) -> None:
    """Give the back-end memory whose pages are on their way, in the order of QEMU."""
    uffd = frontend.postcopy_advise()
    assert uffd is not None
    frontend.postcopy_listen()
    regions = [Region(*row[:4]) for row in pager.rows]
    places = frontend.send_postcopy_table(regions, [row[4] for row in pager.rows])
    assert [place.user_addr for place in places] != [region.user_addr for region in regions]
    pager.begin(uffd, places)
    frontend.release_postcopy_table()


class MovingGuest(Guest):
    """A guest of a pump that arrives by postcopy, with packets in its rings.

    `packets` of them wait in the transmitq, and as many buffers in the receiveq.
    """

    packets = 64

    def __init__(self, path: str, features: int, *, serving: bool = True) -> None:
        self.serving = serving
        super().__init__(path, features, protocol=POSTCOPY)

    def share(self) -> None:
        self.sent = [bytes([number]) * (60 + number * 20) for number in range(self.packets)]
        self.posted = [self.receiveqs[0].add(writable=[12 + 1514]) for _ in range(self.packets)]
        for data in self.sent:
            self.transmitqs[0].add([bytes(12) + data])
        for driver in (self.receiveqs[0], self.transmitqs[0]):
            driver.publish()
        self.pager = Pager(self.memory, serving=self.serving)
        share(self.frontend, self.pager)

    def arrive(self) -> None:
        """The rest of the pages comes, and postcopy is over."""
        self.pager.bring_all()
        self.frontend.postcopy_end()

    def close(self) -> None:
        self.pager.close()
        super().close()


class MovingDisk(DiskGuest):
    """A guest of a block device that arrives by postcopy, with what `prepare` puts into its ring."""

    protocol = POSTCOPY

    def __init__(self, path: str, features: int, memory: GuestMemory, *, serving: bool = True) -> None:
        self.serving = serving
        super().__init__(path, features, memory)

    def prepare(self) -> None:
        """Add requests."""

    def share(self) -> None:
        self.prepare()
        self.driver.publish()
        self.pager = Pager(self.memory, serving=self.serving)
        share(self.frontend, self.pager)

    def __exit__(self, *what: object) -> None:
        self.pager.close()
        super().__exit__(*what)
