"""Handlers of the session: postcopy live migration, as its destination.

The guest runs here while some of its pages are still on their way. The front-end says so in this order: ADVISE, LISTEN,
memory tables each of which is answered with where its regions lie in this process and then released by a word of 0,
END. Before the word nothing of a table can be touched; after it, whoever touches a page that has not come waits for the
front-end.

Spec: vhost-user, "Migration", POSTCOPY_ADVISE, POSTCOPY_LISTEN, POSTCOPY_END, SET_MEM_TABLE.
"""

from __future__ import annotations

from typing import Final

from vq import effects as e
from vq.errors import FrontendError, VqError
from vq.message import Message
from vq.payload import Region
from vq.region_table import LiveRegion, with_fd
from vq.session_state import LISTENING, Postcopy, SessionState

DONE: Final = 0
REFUSED: Final = 1


def advise(session: SessionState, message: Message) -> None:
    """Open a userfaultfd, whose copy goes along with the reply; a reply without one says that there is none."""
    if session.postcopy in LISTENING:
        raise FrontendError(message.name, "postcopy", "under way", "POSTCOPY_END comes first")
    try:
        session.reply_fds.append(session.apply(e.AdvisePostcopy()))
    except VqError as failure:
        session.warn(str(failure))
        session.postcopy = Postcopy.OFF
    else:
        session.postcopy = Postcopy.ADVISED


def listen(session: SessionState, message: Message) -> int:
    """From here on memory tables are released by the front-end."""
    if session.postcopy is not Postcopy.ADVISED:
        return _refuse(session, message, "POSTCOPY_ADVISE comes before it, and it comes once")
    if session.regions:
        return _refuse(session, message, "memory that is shared already cannot be waited for")
    session.postcopy = Postcopy.LISTENING
    return DONE


def end(session: SessionState, message: Message) -> int:
    """All pages have come: the userfaultfd is of no use any more."""
    if session.postcopy is not Postcopy.LISTENING:
        return _refuse(session, message, "it comes after POSTCOPY_LISTEN, and not while a memory table is released")
    session.apply(e.EndPostcopy())
    session.postcopy = Postcopy.OFF
    return DONE


def send_table(
    session: SessionState, message: Message, regions: tuple[Region, ...], table: tuple[LiveRegion, ...]
) -> tuple[Region, ...]:
    """Map a table, and tell where its regions lie; it counts when the front-end has released it."""
    if session.postcopy is Postcopy.TABLE_SENT:
        limit = "a word of 0 must release the table before"
        raise FrontendError(message.name, "payload", "another table", limit, fatal=True)
    places: tuple[int, ...] = session.apply(
        e.PrepareMemory(tuple(with_fd(region, fd) for region, fd in zip(regions, message.fds, strict=True)))
    )
    session.postcopy = Postcopy.TABLE_SENT
    session.table_sent = table
    return tuple(region._replace(user_addr=place) for region, place in zip(regions, places, strict=True))


def release_table(session: SessionState, message: Message) -> None:
    """The front-end can serve our faults: the table that was sent last counts from here on."""
    if session.postcopy is not Postcopy.TABLE_SENT or message.payload != 0:
        limit = "a word must be 0, and come after a table of a postcopy migration"
        raise FrontendError(message.name, "payload", f"{message.payload:#x}", limit, fatal=True)
    with session.all_or_close():
        session.apply(e.AdoptMemory())
    session.regions = session.table_sent
    session.table_sent = ()
    session.postcopy = Postcopy.LISTENING


def _refuse(session: SessionState, message: Message, limit: str) -> int:
    session.warn(str(FrontendError(message.name, "postcopy", session.postcopy.name.lower(), limit)))
    return REFUSED
