"""The options that every part of ``vq bench`` takes, and what they mean."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

from vq.cli.arguments import Whole, parse_cpus, positive_seconds
from vq.errors import UsageError

__all__ = ["BlkOptions", "Options", "Output", "check_repeat"]

REPEAT_MAX = 1000


@Parameter(name="*")
@dataclass(frozen=True)
class Output:
    """Where results go, besides a table in the terminal."""

    json: Annotated[
        bool, Parameter(negative="", show_default=False, help="JSON, one object a line; the last one has everything.")
    ] = False
    csv: Annotated[Path | None, Parameter(help="Also write the rows as CSV into this file.")] = None

    def check(self) -> None:
        """Refuse, before anything is measured, what could not be written afterwards."""
        if self.csv is not None:
            from vq.bench.files import check_writable

            check_writable(self.csv)


@Parameter(name="*")
@dataclass(frozen=True)
class Options(Output):
    """How our own driver measures."""

    socket: Annotated[
        str | None,
        Parameter(help="Measure the back-end that listens on this socket and echoes (DPDK's testpmd in io mode, ...)."),
    ] = None
    cpu: Annotated[
        str | None,
        Parameter(help="Processors of the back-end's workers, and last the driver's, such as 0,1. Default: first two."),
    ] = None
    seconds: Annotated[float, Parameter(help="Counted seconds of a run.")] = 0.4
    repeat: Annotated[Whole, Parameter(help="Runs of each point, in alternation.")] = 3
    plot: Annotated[
        str | None, Parameter(help="Draw into a FILE.png or FILE.svg, or 'terminal'; needs pip install 'vq[plots]'.")
    ] = None

    def check(self) -> None:
        """Refuse, before anything is measured, what could not be done."""
        super().check()
        positive_seconds("--seconds", self.seconds)
        check_repeat(self.repeat)
        if self.plot is not None:
            from vq.bench.plot import TERMINAL, check_plot

            check_plot(self.plot)
            if self.json and self.plot == TERMINAL:
                raise UsageError("--json and --plot terminal would both write to standard output; plot into a file")

    def cpus(self) -> Sequence[int] | None:
        """The processors; None: not given."""
        return parse_cpus(self.cpu)


@Parameter(name="*")
@dataclass(frozen=True)
class BlkOptions(Options):
    """How block back-ends are measured."""

    socket: Annotated[str | None, Parameter(help="Measure the back-end that listens on this socket.")] = None
    peer: Annotated[
        Literal["qemu-storage-daemon"] | None, Parameter(help="Also measure this back-end, in alternated pairs.")
    ] = None
    peer_options: Annotated[
        str, Parameter(help="More options of the peer's file, such as aio=io_uring.", show_default=False)
    ] = ""

    def check(self) -> None:
        super().check()
        if self.socket is not None and self.peer is not None:
            raise UsageError("--socket and --peer exclude each other: a peer is started beside vq blk")
        if self.peer_options and self.peer is None:
            raise UsageError("--peer-options is for a --peer")


def check_repeat(repeat: int) -> None:
    """Check how often something is to be measured."""
    if not 1 <= repeat <= REPEAT_MAX:
        raise UsageError(f"--repeat {repeat}: write a number from 1 to {REPEAT_MAX}")
