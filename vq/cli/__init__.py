"""The program ``vq``: one file a command, one place that turns exceptions into exit codes.

=====  ==========================================================================
code   meaning
=====  ==========================================================================
0      done; also when SIGINT or SIGTERM ended a pump
1      a verification failed: the demo lost, doubled or changed a packet
2      usage: a wrong argument
3      peer: the other end of a socket broke the protocol
4      resource: the machine refused (path, permission, limit, missing build)
=====  ==========================================================================
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

from vq.errors import ConnectionClosed, GuestError, PeerError, UsageError, VqError

if TYPE_CHECKING:
    from cyclopts import App

__all__ = ["main", "make_app"]

OK: Final = 0
FAILED: Final = 1
USAGE: Final = 2
PEER: Final = 3
RESOURCE: Final = 4
INTERRUPTED: Final = 128 + 2  # what shells expect of a program that SIGINT ended

EPILOGUE = """\
Exit codes: 0 done, 1 a verification failed, 2 wrong usage, 3 the peer broke the protocol, 4 the machine refused.

"vq COMMAND --help" tells the options of a command; "vq pump --help" also the kinds of PORT.
"""


def make_app() -> App:
    """Build the command line; every command is registered here."""
    from cyclopts import App

    from vq import __version__
    from vq.cli.demo import demo
    from vq.cli.pump import EPILOGUE as PORTS
    from vq.cli.pump import pump

    app = App(
        name="vq",
        help="vhost-user back-ends: network ports for virtual machines in user space.",
        help_epilogue=EPILOGUE,
        help_format="plaintext",
        version=__version__,
    )
    app.command(pump, usage="Usage: vq pump PORT... [OPTIONS]", help_epilogue=PORTS)
    app.command(demo, usage="Usage: vq demo [OPTIONS]", help_epilogue="")
    app.register_install_completion_command()
    return app


def exit_code(error: Exception) -> int:
    """The exit code for an error of ours or of the system."""
    if isinstance(error, UsageError):
        return USAGE
    return PEER if isinstance(error, PeerError | GuestError | ConnectionClosed) else RESOURCE


def _explain(error: Exception) -> str:
    if isinstance(error, ImportError):
        return f"{error}; the compiled part is missing: run pip install . (in a checkout: make build)"
    if isinstance(error, BrokenPipeError):
        return "standard output: the reader went away"
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return " ".join(str(error).split())


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program.

    Parameters
    ----------
    arguments
        Without the program's name; None: those of the process.

    Returns
    -------
    int
        Exit code.
    """
    from cyclopts import CycloptsError

    try:
        result = make_app()(
            sys.argv[1:] if arguments is None else list(arguments),
            exit_on_error=False,
            print_error=False,
            result_action="return_value",
        )
        sys.stdout.flush()
    except CycloptsError as error:
        print(f"vq: error: {' '.join(str(error).split())} See vq --help.", file=sys.stderr)
        return USAGE
    except KeyboardInterrupt:
        return INTERRUPTED
    except (VqError, OSError, ImportError) as error:
        if isinstance(error, ImportError) and not (error.name or "").startswith("vq_core"):
            raise
        print(f"vq: error: {_explain(error)}", file=sys.stderr)
        if isinstance(error, BrokenPipeError):
            # The interpreter flushes standard output once more at its end, and would complain.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return exit_code(error)
    except BaseException as error:
        if type(error).__name__ == "StuckWorkerError":
            # Nothing may be released any more, and a thread that cannot be joined is left: end at once.
            print(f"vq: error: {error}", file=sys.stderr, flush=True)
            os._exit(RESOURCE)
        raise
    return result if isinstance(result, int) else OK
