"""The kinds of PORT and their options, as data: parsing, ``vq pump --help`` and docs/pump.md are made from it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final, Literal

from vq.errors import UsageError

__all__ = ["KINDS", "Kind", "Option", "Value"]

Value = int | float | bool | str

MAC: Final = re.compile("[0-9a-fA-F]{2}(:[0-9a-fA-F]{2}){5}", re.ASCII)
MAC_EXAMPLE: Final = "52:54:00:12:34:56"
UNLIMITED: Final = 2**31 - 1  # who reaches it wants no end, and need not be told the number


@dataclass(frozen=True, slots=True)
class Option:
    """One key of a PORT.

    Parameters
    ----------
    key
        As it is written.
    form
        "flag" (written without a value), "integer", "octal", "real", "choice" or "mac".
    help
        For people; starts with what it is, unit included.
    low, high
        Range of a number, both ends included.
    default
        What holds when the key is not written; None: nothing is set. A flag is False.
    choices
        Values of a choice.
    """

    key: str
    form: Literal["flag", "integer", "octal", "real", "choice", "mac"]
    help: str
    low: float = 0
    high: float = 0
    default: Value | None = None
    choices: tuple[str, ...] = ()

    @property
    def usage(self) -> str:
        """How it is written, range included unless that has no end: ``queues=1..128``, ``count=N``, ``client``."""
        if self.form == "flag":
            return self.key
        if self.form == "choice":
            return f"{self.key}={'|'.join(self.choices)}"
        if self.form == "mac":
            return f"{self.key}=ADDRESS"
        if self.high >= UNLIMITED:
            return f"{self.key}=N"
        return f"{self.key}={self._show(self.low)}..{self._show(self.high)}"

    def _show(self, value: float) -> str:
        if self.form == "real":
            return f"{value:.15g}"
        return f"{int(value):04o}" if self.form == "octal" else str(int(value))

    @property
    def shown_default(self) -> str:
        """The default for people; empty if there is none."""
        if self.default is None or self.form == "flag":
            return ""
        return self.default if isinstance(self.default, str) else self._show(self.default)

    def parse(self, text: str, where: str) -> Value:
        """Read the value after ``key=``; `where` begins the message of a `UsageError`."""
        if self.form == "choice":
            if text not in self.choices:
                raise UsageError(f"{where}: {self.key} is {text!r}; possible: {', '.join(self.choices)}")
            return text
        if self.form == "mac":
            if MAC.fullmatch(text) is None or int(text[:2], 16) & 1 or text == "00:00:00:00:00:00":
                raise UsageError(f"{where}: {self.key} is {text!r}; write an address of one station, as {MAC_EXAMPLE}")
            return text.lower()
        what = {"integer": "a whole number", "octal": "an octal number", "real": "a number"}[self.form]
        limits = f"write {what} from {self._show(self.low)} to {self._show(self.high)}"
        try:
            # int() alone would take blanks, signs, underscores and digits of other scripts.
            if not text.isascii() or not text[:1].isdigit() or "_" in text:
                raise ValueError(text)
            value = float(text) if self.form == "real" else int(text, 8 if self.form == "octal" else 10)
        except ValueError:
            raise UsageError(f"{where}: {self.key} is {text!r}; {limits}") from None
        if not self.low <= value <= self.high:
            raise UsageError(f"{where}: {self.key} is {text}, out of range; {limits}")
        return value


@dataclass(frozen=True, slots=True)
class Kind:
    """One kind of port.

    Parameters
    ----------
    name
        Before the colon.
    target
        What stands after the colon, in capitals; empty if the kind has none.
    help
        One line for people.
    options
        Its keys.
    """

    name: str
    target: str
    help: str
    options: tuple[Option, ...] = ()

    @property
    def usage(self) -> str:
        """``vhost:PATH``, ``null:``."""
        return f"{self.name}:{self.target}"

    def option(self, key: str) -> Option | None:
        """Look an option up."""
        return next((option for option in self.options if option.key == key), None)


KINDS: Final[Mapping[str, Kind]] = MappingProxyType(
    {
        kind.name: kind
        for kind in (
            Kind(
                "vhost",
                "PATH",
                "a guest: the vhost-user back-end of its network device, listening on the Unix socket PATH; "
                "in place of PATH, fd=N or fd=NAME is a socket that was passed, listening or connected",
                (
                    Option("client", "flag", "connect to PATH, and again when it ends, instead of listening"),
                    Option("queues", "integer", "queue pairs to offer", 1, 128, 8),
                    Option(
                        "layout",
                        "choice",
                        "ring layouts to offer: packed beside split, or split alone",
                        default="packed",
                        choices=("packed", "split"),
                    ),
                    Option(
                        "slots",
                        "choice",
                        "how memory is plugged and unplugged: region by region, or off: by the whole table anew, "
                        "for front-ends that have trouble with memory slots",
                        default="on",
                        choices=("on", "off"),
                    ),
                    Option(
                        "queue-num",
                        "choice",
                        "what the number of queues means when a front-end asks: pairs for QEMU and DPDK, "
                        "single queues for cloud-hypervisor",
                        default="pairs",
                        choices=("pairs", "queues"),
                    ),
                    Option(
                        "postcopy",
                        "flag",
                        "let guests come here by postcopy migration, from front-ends that you trust; needs userfaultfd",
                    ),
                    Option("mode", "octal", "permission bits of the socket; without it the umask decides", 0, 0o777),
                    Option(
                        "mtu", "integer", "bytes of the longest packet to the guest, without Ethernet header", 68, 65535
                    ),
                    Option(
                        "control",
                        "flag",
                        "offer a control queue and a configuration space, for front-ends that know nothing of network "
                        "devices and pass these on (crosvm, user-mode Linux); QEMU and cloud-hypervisor keep them",
                    ),
                    Option("mac", "mac", "with control: the guest's address; without it one that is made of the name"),
                    Option("speed", "integer", "with control: Mb/s of the link, for people", 1, 2**31 - 1),
                ),
            ),
            Kind(
                "tap",
                "NAME",
                "the host: the TAP interface NAME, made when it is not there",
                (
                    Option("queues", "integer", "queues of the interface", 1, 128, 1),
                    Option("mtu", "integer", "bytes; sets the MTU of the interface", 68, 65521),
                ),
            ),
            Kind(
                "gen",
                "",
                "a source of equal UDP packets; takes and forgets what is sent to it",
                (
                    Option("size", "integer", "bytes of a packet, without frame check sequence", 60, 9216, 64),
                    Option("count", "integer", "packets, then it is finished; without it endless", 1, 2**63 - 1),
                    Option(
                        "rate", "integer", "packets a second; without it as fast as the target takes them", 1, 10**9
                    ),
                ),
            ),
            Kind(
                "null",
                "",
                "a sink",
                (Option("copy", "flag", "copy each payload to host memory first, as a DPDK back-end does"),),
            ),
            Kind(
                "pcap",
                "FILE",
                "a capture file: replayed, or written",
                (
                    Option(
                        "write",
                        "flag",
                        "write what comes to the port into FILE, not replay it; an existing FILE is overwritten",
                    ),
                    Option("speed", "real", "times the recorded speed; 0: as fast as the target takes it", 0, 1e6, 1.0),
                    Option("loop", "integer", "how often the file is replayed; 0: endless", 0, 2**31 - 1, 1),
                    Option("snaplen", "integer", "bytes kept of a packet that is written", 64, 262144, 262144),
                ),
            ),
            Kind("echo", "", "reflects the other port; vq pump X echo: is the same as vq pump X"),
        )
    }
)


def markdown() -> str:
    """The kinds and options as the tables of docs/pump.md."""
    lines = []
    for kind in KINDS.values():
        lines += [f"### `{kind.usage}`", "", f"{kind.help[0].upper()}{kind.help[1:]}.", ""]
        if kind.options:
            lines += ["| option | means | default |", "|---|---|---|"]
            for option in kind.options:
                usage = option.usage.replace("|", "\\|")
                lines.append(f"| `{usage}` | {option.help} | {option.shown_default} |")
            lines.append("")
    return "\n".join(lines).rstrip() + "\n"


if __name__ == "__main__":
    print(markdown(), end="")
