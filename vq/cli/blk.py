"""``vq blk``: a file or block device as a guest's disk."""

from __future__ import annotations

import errno
import os
import signal
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Final, Literal

from cyclopts import Parameter

from vq.cli import logs
from vq.cli.arguments import Whole, parse_bytes, parse_cpus
from vq.cli.conventions import CAPABILITIES_OPTION
from vq.cli.hints import qemu_blk_options
from vq.cli.output import check_output, write_json
from vq.cli.service import Service
from vq.cli.signals import Ending, ending_signals, handling
from vq.errors import ResourceError, UsageError
from vq.inherited import find_fd
from vq.stats import encode
from vq.stopping import Stop

if TYPE_CHECKING:
    from vq.server import Server
    from vq_core.disk import Disk

__all__ = ["blk"]

SERIAL_MAX: Final = 20  # bytes: VIRTIO_BLK_ID_BYTES


def blk(
    *,
    socket_path: Annotated[str | None, Parameter(help="Listen on this socket.")] = None,
    fd: Annotated[
        str | None, Parameter(help="Use this socket that was passed: its number, or its name.")
    ] = None,
    blk_file: Annotated[str | None, Parameter(help="File or block device with the disk's data.")] = None,
    null: Annotated[
        str | None,
        Parameter(help="Instead of a file: a disk of this size (such as 16G) that reads as zeroes and keeps nothing."),
    ] = None,
    read_only: Annotated[bool, Parameter(negative="", show_default=False, help="Nothing is ever written.")] = False,
    direct: Annotated[
        bool, Parameter(negative="", show_default=False, help="Pass by the host's page cache (O_DIRECT).")
    ] = False,
    no_lock: Annotated[
        bool,
        Parameter(negative="", show_default=False, help="Do not look whether another process writes to the file."),
    ] = False,
    serial: Annotated[str | None, Parameter(help="Serial number, up to 20 bytes. Default: the file's name.")] = None,
    queues: Annotated[Whole, Parameter(help="Request queues, 1 to 256; give a guest one for each processor.")] = 4,
    cpu: Annotated[
        str | None, Parameter(help="Processors, such as 0,2-3; a worker for each. Default: one worker.")
    ] = None,
    poll: Annotated[
        Literal["adaptive", "busy"], Parameter(help="Sleep when there is nothing to do, or never.")
    ] = "adaptive",
    postcopy: Annotated[
        bool,
        Parameter(
            negative="", show_default=False,
            help="Let guests come here by postcopy migration, from front-ends that you trust; needs userfaultfd.",
        ),
    ] = False,
    json: Annotated[
        bool, Parameter(negative="", show_default=False, help="Print counters as JSON at the end.")
    ] = False,
    print_capabilities: Annotated[
        bool,
        Parameter(
            name=CAPABILITIES_OPTION, negative="", show_default=False,
            help="Print what the back-end is, as JSON, and do nothing else.",
        ),
    ] = False,
    verbose: Annotated[
        int,
        Parameter(
            name=["--verbose", "-v"], count=True, show_default=False, help="Log connections; twice: messages."
        ),
    ] = 0,
) -> int:
    """Give a file or block device to a guest as its disk, over vhost-user-blk.

    On SIGHUP the length of the file is looked at again, and a running guest is told if it has changed.
    """
    # print_capabilities was served before anything else was looked at; it stands here for the help.
    if (socket_path is None) == (fd is None):
        raise UsageError("name one of --socket-path PATH and --fd N")
    if serial is not None and len(os.fsencode(serial)) > SERIAL_MAX:
        raise UsageError(f"--serial {serial}: {len(os.fsencode(serial))} bytes; write at most {SERIAL_MAX}")
    inherited = None if fd is None else find_fd(fd)
    cpus = parse_cpus(cpu)
    logs.configure(verbose)
    if postcopy:
        from vq.postcopy import check_userfault

        check_userfault()
    disk = _open(blk_file, null, read_only, direct)
    if serial is not None:
        disk.set_id(serial)
    from vq.devices.blk import BlkDevice
    from vq.server import Server

    try:
        device = BlkDevice(
            disk, queues=queues, cpus=cpus, poll=poll, postcopy=postcopy, lock=not no_lock
        )
    except BaseException:
        disk.close()
        raise
    ending, stop = Ending(), Stop()

    def end(number: int, frame: FrameType | None) -> None:
        ending(number, frame)
        stop(number, frame)

    with ending_signals(end), Server(device, path=socket_path, fd=inherited) as server:
        stop.attach(server)

        def look_again(number: int, frame: FrameType | None) -> None:
            server.call(device.resize)

        with handling(signal.SIGHUP, look_again):
            if not json:
                with check_output():
                    where = f"listens on {socket_path}" if socket_path is not None else f"uses the socket {fd}"
                    size = disk.capacity * 512
                    print(f"blk: {where}, {disk.path}, {size} bytes, {queues} queues", flush=True)
                    if socket_path is not None:
                        print(f"  QEMU: {qemu_blk_options(socket_path, queues)}", flush=True)
            service = Service()
            service.ready(_status(server))
            server.run(changed=lambda: service.status(_status(server)), alive=service.alive)
            service.stopping()
        server.disconnect()  # no request is under way any more when the counters are read
        snapshot = device.snapshot()
    if json:
        write_json(encode(snapshot))
    return 0


def _status(server: Server) -> str:
    """What a service manager shows of us."""
    return f"{server.device.name}: {server.backend.state if server.backend is not None else 'closed'}"


def _open(path: str | None, null: str | None, read_only: bool, direct: bool) -> Disk:
    """Open the disk that was named."""
    from vq_core.disk import Disk

    if (path is None) == (null is None):
        raise UsageError("name one of --blk-file PATH and --null SIZE")
    if null is not None:
        if direct:
            raise UsageError("--direct is for a --blk-file; a null disk has no page cache")
        size = parse_bytes("--null", null)
        return Disk(None, read_only, size=size)
    assert path is not None
    try:
        disk = Disk(path, read_only, direct=direct)
    except ValueError as error:
        raise UsageError(str(error)) from error
    except OSError as error:
        refused = error.errno in (errno.EACCES, errno.EPERM, errno.EROFS)
        remedy = "with --read-only it need not be writable" if refused and not read_only else ""
        if error.errno == errno.ENOENT:
            remedy = f"check the path, or make a disk, as with truncate -s 1G {path}"
        raise ResourceError("cannot open", errno=error.errno or 0, path=path, remedy=remedy) from error
    if disk.capacity == 0:
        disk.close()
        raise UsageError(f"{path}: shorter than a sector of 512 bytes; make it longer, as with truncate -s 1G {path}")
    return disk
