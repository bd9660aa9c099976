"""``vq pump``: move packets between ports."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from cyclopts import Parameter

from vq.cli import logs
from vq.cli.arguments import Whole, parse_cpus, positive_seconds
from vq.cli.conventions import CAPABILITIES_OPTION, conventional_ports
from vq.cli.help_text import hanging
from vq.cli.hints import describe
from vq.cli.output import check_output
from vq.cli.report import reports
from vq.cli.service import Service, guests
from vq.cli.signals import ending_signals
from vq.groups import parse_groups
from vq.port_kinds import KINDS
from vq.stopping import Stop
from vq.sub_burst import SUB_BURST, check_sub_burst

__all__ = ["epilogue", "pump"]


def epilogue() -> str:
    """The kinds of PORT and their options for ``--help``, wrapped for the terminal with hanging indents."""
    lines = ["PORT is KIND:TARGET[,key=value...]:", ""]
    for kind in KINDS.values():
        lines += hanging(f"{kind.usage:<12} {kind.help}", 13)
        for option in kind.options:
            default = f" [default: {option.shown_default}]" if option.shown_default else ""
            text = f"    {option.usage}: {option.help}{default}"
            lines += hanging(text, 8)
    return "\n".join(lines)


def pump(
    *ports: Annotated[
        str,
        Parameter(
            name="PORT",
            help="What to join; see below. One: echo, two: patch, more: switch. The word + begins another group.",
        ),
    ],
    duration: Annotated[float | None, Parameter(help="End after this many seconds. Default: at a signal.")] = None,
    interval: Annotated[float, Parameter(help="Seconds between two reports.")] = 1.0,
    json: Annotated[
        bool, Parameter(negative="", show_default=False, help="Report as JSON, one object a line.")
    ] = False,
    cpu: Annotated[
        str | None, Parameter(help="Processors, such as 0,2-3; a worker for each. Default: one worker.")
    ] = None,
    poll: Annotated[
        Literal["adaptive", "busy"], Parameter(help="Sleep when there is nothing to do, or never.")
    ] = "adaptive",
    sub_burst: Annotated[
        Whole, Parameter(help="Packets, 1 to 32, published at once between rings of guests.")
    ] = SUB_BURST,
    program: Annotated[
        str | None,
        Parameter(
            help="Function that looks at each burst on its way, module:name or path/to/file.py:name; docs/programs.md."
        ),
    ] = None,
    socket_path: Annotated[str | None, Parameter(help="The same as a first PORT vhost:PATH.")] = None,
    fd: Annotated[str | None, Parameter(help="The same as a first PORT vhost:fd=N.")] = None,
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
    """Move packets between ports: echo on one, patch of two, learning switch of three and more."""
    # print_capabilities was served before anything else was looked at; it stands here for the help.
    groups = parse_groups((*conventional_ports(socket_path, fd), *ports))
    positive_seconds("--duration", duration)
    positive_seconds("--interval", interval)
    cpus = parse_cpus(cpu)
    check_sub_burst(sub_burst, "--sub-burst")
    logs.configure(verbose)
    from vq.program import load_program
    from vq.pump import Pump

    between = None if program is None else load_program(program)
    stop = Stop()
    with ending_signals(stop), Pump(groups, cpus=cpus, poll=poll, sub_burst=sub_burst, program=between) as running:
        stop.attach(running)
        if not json:
            with check_output():
                print("\n".join(describe([spec for group in groups for spec in group])), flush=True)
        service = Service()
        with reports(json) as report:

            def each(now: dict[str, Any]) -> None:
                service.status(guests(now))
                report.interval(now)

            service.ready(guests(running.snapshot()))
            final = running.run(duration, interval, each, service.alive)
            service.stopping()
            report.final(final)
    return 0
