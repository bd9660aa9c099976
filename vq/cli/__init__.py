"""The program ``vq``: one file a command, one place that turns exceptions into exit codes.

=====  ==========================================================================
code   meaning
=====  ==========================================================================
0      done; also when SIGINT, SIGTERM or SIGHUP ended a pump
1      a verification failed: the demo lost, doubled or changed a packet, a check of a back-end failed
2      usage: a wrong argument
3      peer: the other end of a socket broke the protocol
4      resource: the machine refused (path, permission, limit, missing build)
129    SIGHUP ended the demo, a benchmark or a check, which reports what was verified so far
130    SIGINT did so; or it came before a command had begun
143    SIGTERM ended one of them
141    nobody reads standard output any more (``vq pump ... | head -1``); nothing is said
=====  ==========================================================================
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Final

from vq.cli.conventions import print_capabilities
from vq.cli.output import OutputError, check_output, discard_output, open_closed_streams
from vq.cli.signals import AskedTwice
from vq.errors import ConnectionClosed, GuestError, PeerError, UsageError, VqError

if TYPE_CHECKING:
    from cyclopts import App, CycloptsError

__all__ = ["main", "main_blk", "main_net", "make_app"]

OK: Final = 0
FAILED: Final = 1
USAGE: Final = 2
PEER: Final = 3
RESOURCE: Final = 4
INTERRUPTED: Final = 128 + 2  # what shells expect of a program that SIGINT ended
COMMANDS: Final = ("pump", "blk", "demo", "bench", "check", "qemu", "libvirt")
UNREAD: Final = 128 + 13  # and SIGPIPE

# One line a paragraph: the terminal wraps them.
EPILOGUE = """\
Exit codes: 0 done, 1 a verification failed, 2 wrong usage, 3 the peer broke the protocol, 4 the machine refused, \
129, 130 and 143 SIGHUP, SIGINT and SIGTERM ended the demo, a benchmark or a check, 141 nobody reads \
standard output any more.

"vq COMMAND --help" tells the options of a command; "vq pump --help" also the kinds of PORT.
"""


def make_app() -> App:
    """Build the command line; every command is registered here."""
    from cyclopts import App

    from vq import __version__
    from vq.cli.bench import bench_app
    from vq.cli.blk import blk
    from vq.cli.check import HELP as CHECK_HELP
    from vq.cli.check import check
    from vq.cli.demo import HELP, demo
    from vq.cli.libvirt import HELP as LIBVIRT_HELP
    from vq.cli.libvirt import libvirt
    from vq.cli.pump import epilogue, pump
    from vq.cli.qemu import HELP as QEMU_HELP
    from vq.cli.qemu import qemu

    app = App(
        name="vq",
        help="vhost-user back-ends: network ports and disks for virtual machines in user space.",
        help_epilogue=EPILOGUE,
        help_format="plaintext",
        version=__version__,
    )
    app.command(pump, usage="Usage: vq pump PORT... [OPTIONS]", help_epilogue=epilogue())
    app.command(blk, usage="Usage: vq blk [OPTIONS]", help_epilogue="")
    app.command(demo, usage="Usage: vq demo [OPTIONS]", help=HELP, help_epilogue="")
    app.command(bench_app())
    app.command(check, usage="Usage: vq check SOCKET [OPTIONS]", help=CHECK_HELP, help_epilogue="")
    app.command(qemu, usage="Usage: vq qemu PORT... [OPTIONS]", help=QEMU_HELP, help_epilogue="")
    app.command(libvirt, usage="Usage: vq libvirt PORT... [OPTIONS]", help=LIBVIRT_HELP, help_epilogue="")
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
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return " ".join(str(error).split())


def _misuse(error: CycloptsError) -> str:
    """What was wrong with the words of a command line."""
    from cyclopts.exceptions import UnusedCliTokensError

    if isinstance(error, UnusedCliTokensError) and error.unused_tokens:
        command = " ".join(["vq", *(error.command_chain or ())])
        return f"{command} takes no argument: {' '.join(error.unused_tokens)}"
    return " ".join(str(error).split())


def _see(words: Sequence[str], text: str) -> str:
    """A message about wrong usage, and the help that tells more; a message that names it already stays as it is."""
    if "--help" in text:
        return text
    from vq.cli.bench import PARTS

    path = ["vq", *(words[:1] if words and words[0] in COMMANDS else ())]
    path += words[1:2] if path[-1] == "bench" and len(words) > 1 and words[1] in PARTS else []
    return f"{text}{'' if text.endswith(('.', '?')) else '.'} See {' '.join(path)} --help."


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
    open_closed_streams()
    from cyclopts import CycloptsError

    words = sys.argv[1:] if arguments is None else list(arguments)
    try:
        if print_capabilities(words):
            return OK
        result = make_app()(
            words,
            exit_on_error=False,
            print_error=False,
            result_action="return_value",
        )
        with check_output():
            sys.stdout.flush()
    except CycloptsError as error:
        print(f"vq: error: {_see(words, _misuse(error))}", file=sys.stderr)
        return USAGE
    except OutputError as error:
        discard_output()
        if isinstance(error.__cause__, BrokenPipeError):
            return UNREAD
        with suppress(OSError):
            print(f"vq: error: standard output: {error}", file=sys.stderr)
        return RESOURCE
    except AskedTwice as error:
        return 128 + error.number
    except KeyboardInterrupt:
        return INTERRUPTED
    except SystemExit as end:
        # So rich ends when nobody reads the help any more.
        if isinstance(end.__context__, BrokenPipeError):
            return UNREAD
        raise
    except (VqError, OSError, ImportError) as error:
        if isinstance(error, ImportError) and not (error.name or "").startswith("vq_core"):
            raise
        text = _explain(error)
        print(f"vq: error: {_see(words, text) if isinstance(error, UsageError) else text}", file=sys.stderr)
        return exit_code(error)
    except BaseException as error:
        if type(error).__name__ == "StuckWorkerError":
            # Nothing may be released any more, and a thread that cannot be joined is left: end at once.
            print(f"vq: error: {error}", file=sys.stderr, flush=True)
            os._exit(RESOURCE)
        raise
    return result if isinstance(result, int) else OK


def main_net() -> int:
    """Run ``vq-net``: ``vq pump`` as a program of its own, which management software starts with options only."""
    return main(["pump", *sys.argv[1:]])


def main_blk() -> int:
    """Run ``vq-blk``: ``vq blk`` as a program of its own, which management software starts with options only."""
    return main(["blk", *sys.argv[1:]])
