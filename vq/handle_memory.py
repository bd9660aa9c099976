"""Handlers of the session: the memory table and the dirty log.

Spec: vhost-user, "Multiple memory regions", "Migration".
"""

from __future__ import annotations

from vq import effects as e
from vq.errors import FrontendError
from vq.handle_postcopy import release_table, send_table
from vq.message import Message
from vq.payload import Log, Region
from vq.region_table import ADDRESS_END, check_regions, live, same_region, with_fd
from vq.ring_state import prepare_signal_fd, replace_fd
from vq.session_state import LISTENING, SessionState
from vq.shared_file import check_memory_file


def set_mem_table(session: SessionState, message: Message) -> tuple[Region, ...] | None:
    """Replace the whole table, or keep the old one; the same table again changes nothing."""
    if isinstance(message.payload, int):
        release_table(session, message)
        return None
    regions: tuple[Region, ...] = message.payload
    check_regions(message.name, regions)
    for fd in message.fds:
        check_memory_file(message.name, fd)
    table = tuple(live(region, fd) for region, fd in zip(regions, message.fds, strict=True))
    if session.postcopy in LISTENING:
        return send_table(session, message, regions, table)
    if table != session.regions:
        fds = message.fds
        session.apply(e.SetMemory(tuple(with_fd(region, fd) for region, fd in zip(regions, fds, strict=True))))
        session.regions = table
    return None


def get_max_mem_slots(session: SessionState, _: Message) -> int:
    """Tell how many regions the table can have, always the same."""
    return session.offer.max_mem_slots


def add_mem_reg(session: SessionState, message: Message) -> None:
    """Add a region beside the others."""
    region: Region = message.payload
    if len(message.fds) != 1:
        raise FrontendError(message.name, "number of fds", len(message.fds), "it takes 1")
    if len(session.regions) >= session.offer.max_mem_slots:
        raise FrontendError(message.name, "regions", len(session.regions) + 1, f"limit {session.offer.max_mem_slots}")
    check_regions(message.name, [*(known.region for known in session.regions), region])
    check_memory_file(message.name, message.fds[0])
    added = live(region, message.fds[0])
    session.apply(e.AddRegion(with_fd(region, message.fds[0])))
    session.regions = (*session.regions, added)


def rem_mem_reg(session: SessionState, message: Message) -> None:
    """Take a region out; an fd that old front-ends send along is closed unused."""
    found = next((known for known in session.regions if same_region(known.region, message.payload)), None)
    if found is None:
        where = f"{message.payload.guest_addr:#x}"
        raise FrontendError(message.name, "region", where, "no live region has this address and size")
    session.apply(e.RemoveRegion(with_fd(found.region)))
    session.regions = tuple(known for known in session.regions if known is not found)


def set_log_base(session: SessionState, message: Message) -> Log:
    """Map a dirty log in place of the one before, and answer with its description."""
    area = message.payload
    if not isinstance(area, Log):
        raise FrontendError(message.name, "payload", f"{area:#x}", "with LOG_SHMFD it is a size and an offset")
    if area.mmap_size == 0 or area.mmap_offset > ADDRESS_END - area.mmap_size:
        value = f"{area.mmap_size:#x} bytes at {area.mmap_offset:#x}"
        raise FrontendError(message.name, "log", value, "at least 1 byte, not past 2^64")
    check_memory_file(message.name, message.fds[0])
    session.apply(e.SetLog(message.fds[0], area.mmap_size, area.mmap_offset))
    session.has_log = True
    return area


def set_log_fd(session: SessionState, message: Message) -> None:
    """Keep the eventfd that may be signalled about log writes; nobody waits for that."""
    prepare_signal_fd(message.name, message.fds[0], write=True)
    session.log_fd = replace_fd(session.log_fd, message.take_fd())
