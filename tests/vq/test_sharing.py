"""Shared objects, shared memory regions and host notifiers: a device that uses them, a front-end that maps them."""

from __future__ import annotations

import mmap
import os
import socket
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import pytest

from channel_rig import ALL, SHMEM, ChannelDevice, Hosted, Outcome, Peer, RawBackend, RawChannel
from vq import check
from vq import virtio as v
from vq.check.outcome import Outcome as CheckOutcome
from vq.errors import BackendError, FrontendError, ResourceError, UsageError
from vq.frontend import Frontend
from vq.message import BACKEND_REQUESTS, BackendRequest, Request
from vq.offer import Offer
from vq.payload import Mmap, VringArea
from vq.windows import OBJECTS_MAX, NotifierPages, ObjectDirectory, ShmemWindows

B = BackendRequest
PAGE = mmap.PAGESIZE


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "sock")


@pytest.fixture
def hosted(path: str) -> Iterator[Hosted]:
    hosted = Hosted(ChannelDevice(), path)
    yield hosted
    hosted.close()


@pytest.fixture
def peer(hosted: Hosted) -> Iterator[Peer]:
    peer = Peer(hosted.path)
    yield peer
    peer.close()


@pytest.fixture
def file() -> Iterator[int]:
    """Four pages, each filled with its number."""
    fd = os.memfd_create("pages")
    os.write(fd, b"".join(bytes([number]) * PAGE for number in range(4)))
    yield fd
    os.close(fd)


def map_file(fd: int, offset: int, length: int, writable: bool) -> mmap.mmap:
    access = mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)
    return mmap.mmap(fd, length, mmap.MAP_SHARED, access, offset=offset)


def done(peer: Peer, outcome: Outcome) -> Any:
    """What came of a request, once it has."""
    assert peer.frontend.serve(lambda: bool(outcome.calls))
    return outcome.failure


# -- shared memory regions --


@pytest.mark.shows(
    "GET_SHMEM_CONFIG", "BACKEND_SHMEM_MAP", "BACKEND_SHMEM_UNMAP", "VHOST_USER_PROTOCOL_F_SHMEM",
    "VHOST_USER_PROTOCOL_F_BACKEND_SEND_FD",
)  # fmt: skip
def test_files_appear_in_the_regions_of_the_device(hosted: Hosted, peer: Peer, file: int) -> None:
    windows = ShmemWindows(peer.frontend.get_shmem_config(), map_file)
    peer.frontend.open_channel(windows.handlers)
    peer.start()
    for shmid, shm_offset, fd_offset, length, writable in (
        (0, 0, PAGE, 2 * PAGE, True),
        (0, 14 * PAGE, 0, 2 * PAGE, False),
        (7, (1 << 40) - PAGE, 3 * PAGE, PAGE, False),
    ):
        outcome = Outcome()
        place: dict[str, Any] = {"fd_offset": fd_offset, "shm_offset": shm_offset, "length": length}
        hosted.call(hosted.channel.map_shmem, shmid, file, **place, writable=writable, done=outcome)
        assert done(peer, outcome) is None
        part = windows.part(shmid, shm_offset)
        assert part[:] == os.pread(file, length, fd_offset)
        if writable:
            part[0] = 77
            assert os.pread(file, 1, fd_offset) == bytes([77])
        else:
            with pytest.raises(TypeError):
                part[0] = 77
    for shmid, shm_offset, length, wanted in (
        (0, 0, PAGE, "refused"),  # a part of a mapping
        (0, PAGE, 2 * PAGE, "refused"),
        (0, 0, 2 * PAGE, None),
        (0, 0, 2 * PAGE, "refused"),  # twice
    ):
        outcome = Outcome()
        hosted.call(hosted.channel.unmap_shmem, shmid, shm_offset, length, done=outcome)
        failure = done(peer, outcome)
        assert failure is None if wanted is None else wanted in str(failure)
    assert len(windows) == 2
    windows.close()


def test_sizes_are_told_and_the_same_each_time(hosted: Hosted, path: str) -> None:
    for _ in range(3):
        peer = Peer(path)
        assert peer.frontend.get_shmem_config() == SHMEM
        peer.close()


def test_a_place_outside_a_region_is_our_own_mistake(hosted: Hosted, peer: Peer, file: int) -> None:
    peer.frontend.open_channel()
    peer.start()
    for shmid, shm_offset, length, fd_offset in (
        (0, 0, 0, 0),
        (0, 0, 100, 0),
        (0, 100, PAGE, 0),
        (0, 0, PAGE, 100),
        (0, 0, PAGE, -PAGE),
        (0, 16 * PAGE, PAGE, 0),
        (0, 15 * PAGE, 2 * PAGE, 0),
        (0, -PAGE, PAGE, 0),
        (1, 0, PAGE, 0),
        (256, 0, PAGE, 0),
    ):
        place = {"shm_offset": shm_offset, "length": length, "fd_offset": fd_offset}
        with pytest.raises(UsageError, match="shmem"):
            hosted.call(hosted.channel.map_shmem, shmid, file, **place)


def test_front_end_checks_each_mapping(peer: Peer, file: int) -> None:
    windows = ShmemWindows(peer.frontend.get_shmem_config(), map_file)
    back = RawBackend(peer.frontend, SHMEM_MAP=windows.handlers[B.SHMEM_MAP])
    codec = BACKEND_REQUESTS[B.SHMEM_MAP].payload
    with back.sock:

        def ask(part: Mmap) -> int:
            back.say(B.SHMEM_MAP, codec.encode(part), fds=(file,))
            return back.answer()[3]

        assert ask(Mmap(0, 0, PAGE, 2 * PAGE, 1)) == 0
        wrong = [
            Mmap(0, 0, PAGE, PAGE, 0),  # what is there already, or a part of it
            Mmap(0, 0, 0, 4 * PAGE, 0),
            Mmap(0, 0, 2 * PAGE, 2 * PAGE, 0),
            Mmap(0, 0, 4 * PAGE, 0, 0),
            Mmap(0, 0, 4 * PAGE, PAGE - 1, 0),
            Mmap(0, 0, 4 * PAGE + 1, PAGE, 0),
            Mmap(0, 1, 4 * PAGE, PAGE, 0),
            Mmap(0, 0, 16 * PAGE, PAGE, 0),
            Mmap(0, 0, (1 << 64) - PAGE, PAGE, 0),
            Mmap(0, 0, 4 * PAGE, (1 << 64) - PAGE, 0),
            Mmap(0, (1 << 64) - PAGE, 4 * PAGE, PAGE, 0),
            Mmap(0, 4 * PAGE, 4 * PAGE, PAGE, 0),  # beyond the file
            Mmap(0, 3 * PAGE, 4 * PAGE, 2 * PAGE, 0),
            Mmap(0, 0, 4 * PAGE, PAGE, 2),
            Mmap(3, 0, 0, PAGE, 0),  # no such region
        ]
        for part in wrong:
            assert ask(part) == 1, part
        pipe = os.pipe()
        back.say(B.SHMEM_MAP, codec.encode(Mmap(0, 0, 4 * PAGE, PAGE, 0)), fds=(pipe[0],))
        assert back.answer()[3] == 1
        for fd in pipe:
            os.close(fd)
    assert len(windows) == 1
    windows.close()


def test_front_end_believes_no_sizes(peer: Peer, monkeypatch: pytest.MonkeyPatch) -> None:
    for count, sizes in ((1, [0]), (0, [PAGE]), (1, [PAGE + 1]), (1, [1 << 63]), (0xFFFFFFFF, [PAGE])):
        answer = (count, *sizes, *[0] * (256 - len(sizes)))
        monkeypatch.setattr(peer.frontend, "request", lambda _, answer=answer: answer)
        with pytest.raises(BackendError, match="GET_SHMEM_CONFIG"):
            peer.frontend.get_shmem_config()


@pytest.mark.parametrize("shmem", [((0, 100),), ((0, 0),), ((0, 1 << 63),), ((256, PAGE),), ((0, PAGE), (0, PAGE))])
def test_regions_that_cannot_be_offered(shmem: tuple[tuple[int, int], ...]) -> None:
    features = v.mask(v.VHOST_USER_F_PROTOCOL_FEATURES)
    with pytest.raises(UsageError, match="shmem"):
        Offer(features, v.mask(v.VHOST_USER_PROTOCOL_F_SHMEM), queue_count=1, queue_num_answer=1, shmem=shmem)


# -- host notifiers --


@pytest.mark.shows("BACKEND_VRING_HOST_NOTIFIER_MSG", "VHOST_USER_PROTOCOL_F_HOST_NOTIFIER")
def test_a_page_to_kick_by(hosted: Hosted, peer: Peer, file: int) -> None:
    pages = NotifierPages(2, map_file)
    peer.frontend.open_channel(pages.handlers)
    peer.start()
    for queue, offset in ((0, 0), (1, PAGE), (1, 2 * PAGE)):
        outcome = Outcome()
        hosted.call(hosted.channel.set_host_notifier, queue, file, offset, done=outcome)
        assert done(peer, outcome) is None
        pages.pages[queue][0] = 99
        assert os.pread(file, 1, offset) == bytes([99])
    outcome = Outcome()
    hosted.call(hosted.channel.set_host_notifier, 0, None, done=outcome)
    assert done(peer, outcome) is None
    assert set(pages.pages) == {1}
    for queue, offset, size in ((2, 0, PAGE), (-1, 0, PAGE), (0, 1, PAGE), (0, 0, 2 * PAGE), (0, 0, 0)):
        with pytest.raises(UsageError, match="host notifier"):
            hosted.call(hosted.channel.set_host_notifier, queue, file, offset, size)
    pages.close()


def test_front_end_checks_each_page(peer: Peer, file: int) -> None:
    pages = NotifierPages(2, map_file)
    back = RawBackend(peer.frontend, VRING_HOST_NOTIFIER_MSG=pages.handlers[B.VRING_HOST_NOTIFIER_MSG])
    codec = BACKEND_REQUESTS[B.VRING_HOST_NOTIFIER_MSG].payload
    with back.sock:
        for area in (
            VringArea(0, 2 * PAGE, 0),
            VringArea(0, 0, 0),
            VringArea(0, PAGE, 1),
            VringArea(0, PAGE, 4 * PAGE),
            VringArea(0, PAGE, (1 << 64) - PAGE),
            VringArea(2, PAGE, 0),
            VringArea(255, PAGE, 0),
        ):
            back.say(B.VRING_HOST_NOTIFIER_MSG, codec.encode(area), fds=(file,))
            assert back.answer()[3] == 1, area
        back.say(B.VRING_HOST_NOTIFIER_MSG, codec.encode(VringArea(1 << 8 | 1, 0, 0)))
        assert back.answer()[3] == 0  # there was none
    assert not pages.pages


# -- shared objects --


@pytest.mark.shows(
    "GET_SHARED_OBJECT", "BACKEND_SHARED_OBJECT_ADD", "BACKEND_SHARED_OBJECT_REMOVE", "BACKEND_SHARED_OBJECT_LOOKUP",
    "VHOST_USER_PROTOCOL_F_SHARED_OBJECT",
)  # fmt: skip
def test_one_device_uses_an_object_of_another(tmp_path: Path, file: int) -> None:
    """Two devices of one guest: the front-end, which keeps the directory, asks the owner for whoever looks it up."""
    directory = ObjectDirectory()
    hosts = [Hosted(ChannelDevice(), str(tmp_path / name)) for name in "ab"]
    peers = [Peer(host.path) for host in hosts]
    for peer in peers:
        peer.frontend.open_channel(directory.handlers(peer.frontend))
        peer.start()
    (owner, user), (owners, users) = hosts, peers
    uuid = uuid4()
    owner.call(owner.channel.objects.share, uuid, file)
    assert owners.frontend.serve(lambda: uuid in directory.owners)
    outcome = Outcome()
    user.call(user.channel.objects.look_up, uuid, outcome)
    assert done(users, outcome) is None
    fd = outcome.calls[0][1]
    assert fd is not None
    assert os.fstat(fd).st_ino == os.fstat(file).st_ino
    os.close(fd)
    for wrong in (uuid4(), UUID(int=0)):
        outcome = Outcome()
        user.call(user.channel.objects.look_up, wrong, outcome)
        assert isinstance(done(users, outcome), FrontendError)
        assert outcome.calls[0][1] is None
    # Only the owner can take it back.
    outcome = Outcome()
    user.send(B.SHARED_OBJECT_REMOVE, uuid.bytes, need_reply=True, done=outcome)
    assert isinstance(done(users, outcome), FrontendError)
    owner.call(owner.channel.objects.withdraw, uuid)
    assert owners.frontend.serve(lambda: not directory.owners)
    assert owners.frontend.get_shared_object(uuid) is None
    for item in (*peers, *hosts):
        item.close()


def test_objects_are_told_to_each_front_end(hosted: Hosted, path: str, file: int) -> None:
    first, second = uuid4(), uuid4()
    hosted.call(hosted.channel.objects.share, first, file)  # nobody is there
    for number in range(3):
        peer = Peer(path)
        directory = ObjectDirectory()
        peer.frontend.open_channel(directory.handlers(peer.frontend))
        assert not directory.owners  # all rings stand
        peer.start()
        assert peer.frontend.serve(lambda directory=directory: first in directory.owners)
        if number == 1:
            hosted.call(hosted.channel.objects.share, second, file)
        if number:
            assert peer.frontend.serve(lambda directory=directory: second in directory.owners)
        fd = peer.frontend.get_shared_object(first)
        assert fd is not None
        os.close(fd)
        peer.close()
    for uuid, match in ((UUID(int=0), "nil"), (first, "already")):
        with pytest.raises(UsageError, match=match):
            hosted.call(hosted.channel.objects.share, uuid, file)
    with pytest.raises(UsageError, match="not shared"):
        hosted.call(hosted.channel.objects.withdraw, uuid4())
    with pytest.raises(ResourceError):
        hosted.call(hosted.channel.objects.look_up, first, Outcome())


def test_a_back_end_shares_so_many_objects_and_no_more(peer: Peer) -> None:
    directory = ObjectDirectory()
    handler = directory.handlers(peer.frontend)[B.SHARED_OBJECT_ADD]
    raw = RawBackend(peer.frontend, SHARED_OBJECT_ADD=handler)
    for number in range(1, OBJECTS_MAX + 3):
        raw.say(B.SHARED_OBJECT_ADD, UUID(int=number).bytes)
        assert raw.answer()[3] == (number > OBJECTS_MAX)
    assert len(directory.owners) == OBJECTS_MAX
    directory.owners[UUID(int=1 << 99)] = peer.frontend  # of another device there is room for as many
    raw.sock.close()


def test_a_back_end_that_asks_instead_of_answering_gets_no_further(no_fd_is_left: None) -> None:
    """It looks up an object of its own again and again while it is asked for that."""
    ours, theirs = socket.socketpair()
    with theirs:
        frontend = Frontend.adopt(ours, timeout=0.3)
        frontend.protocol_features = ALL
        directory = ObjectDirectory()
        uuid = uuid4()
        directory.owners[uuid] = frontend
        raw = RawBackend(frontend, SHARED_OBJECT_LOOKUP=directory.handlers(frontend)[B.SHARED_OBJECT_LOOKUP])
        count = 1500
        raw.sock.sendall((struct.pack("=III", B.SHARED_OBJECT_LOOKUP, 1, 16) + uuid.bytes) * count)
        while raw.server.refused < count:
            assert raw.server.dispatch()
        assert not raw.server.closed
        raw.sock.close()
        frontend.close()


@pytest.mark.parametrize(("value", "fds"), [(0, 0), (0, 2), (1, 1), (7, 1)])
def test_answer_to_a_lookup_must_make_sense(hosted: Hosted, peer: Peer, file: int, value: int, fds: int) -> None:
    raw = RawChannel(peer)
    peer.start()
    outcome = Outcome()
    hosted.call(hosted.channel.objects.look_up, uuid4(), outcome)
    assert raw.take()[0] == B.SHARED_OBJECT_LOOKUP
    raw.answer(B.SHARED_OBJECT_LOOKUP, value, fds=(file,) * fds)
    assert raw.ended()
    assert peer.frontend.queue_num() == 2
    assert "channel is broken" in str(outcome.failure)
    raw.close()


def test_what_nobody_shares(peer: Peer) -> None:
    for uuid in (uuid4(), UUID(int=0)):
        assert peer.frontend.get_shared_object(uuid) is None


def test_without_the_features_nothing_is_asked(hosted: Hosted, path: str, file: int) -> None:
    bits = v.mask(
        v.VHOST_USER_PROTOCOL_F_SHARED_OBJECT, v.VHOST_USER_PROTOCOL_F_SHMEM, v.VHOST_USER_PROTOCOL_F_HOST_NOTIFIER
    )
    peer = Peer(path, protocol=ALL & ~bits)
    raw = RawChannel(peer)
    peer.start()
    hosted.call(hosted.channel.objects.share, uuid4(), file)
    assert raw.silent()
    with pytest.raises(UsageError, match="HOST_NOTIFIER not negotiated"):
        hosted.call(hosted.channel.set_host_notifier, 0, file)
    with pytest.raises(UsageError, match="SHMEM not negotiated"):
        hosted.call(hosted.channel.map_shmem, 0, file, shm_offset=0, length=PAGE)
    peer.frontend.send(Request.GET_SHARED_OBJECT, uuid4().bytes)
    assert peer.frontend.wait_closed()
    raw.close()
    peer.close()


def test_vq_check_knows_these_messages(hosted: Hosted, path: str) -> None:
    """Against a device that offers them; and one that loads whatever comes fails."""
    only = ["sharing.*", "state.garbage", "state.check-without-transfer"]
    found = {result.name: result.outcome for result in check.run(path, device="any", only=only)}
    assert found == {
        "sharing.unknown-object": CheckOutcome.PASS,
        "sharing.shmem-config": CheckOutcome.PASS,
        "state.garbage": CheckOutcome.FAIL,
        "state.check-without-transfer": CheckOutcome.PASS,
    }
