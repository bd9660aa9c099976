"""The back-end under test: `vq pump`, or DPDK's testpmd in its place to try the rig itself."""

from __future__ import annotations

import itertools
import json
import os
import signal
import sys
import time
from collections.abc import Sequence, Set
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from interop.process import Child, wait_until
from interop.testpmd import Testpmd

STOP_SECONDS = 2.0
START_SECONDS = 20.0
INTERVAL = 0.25
_numbers = itertools.count(1)


class PortCounters(NamedTuple):
    """Packets of one port since the start."""

    from_guest: int
    to_guest: int
    dropped: dict[str, int]
    layouts: Set[str] | None = None  # of the rings that a guest runs; None: nobody can tell


class Port(NamedTuple):
    """One PORT argument of the command line, taken apart."""

    kind: str
    target: str
    options: dict[str, str]

    @classmethod
    def parse(cls, text: str) -> Port:
        kind, _, rest = text.partition(":")
        target, *words = rest.split(",")
        return cls(kind, target, dict((word + "=").split("=")[:2] for word in words))


class Backend:
    """A back-end that is started, stopped, killed and started again with the same ports.

    Parameters
    ----------
    ports : sequence of str
        PORT arguments as `vq pump` takes them.
    scratch : Path
    netns : str, optional
        Network namespace it runs in, so that its TAPs are born there.
    core : int, optional
        CPU of its worker.
    options : sequence of str
        Further arguments of `vq pump`.
    """

    lacks: frozenset[str] = frozenset()  # what this back-end cannot do, so that a test of it is not for this one

    def __init__(
        self,
        ports: Sequence[str],
        scratch: Path,
        *,
        netns: str | None = None,
        core: int | None = None,
        options: Sequence[str] = (),
    ) -> None:
        self.words = list(ports)
        self.ports = [Port.parse(word) for word in ports]
        self.scratch = scratch
        self.netns = netns
        self.core = core
        self.options = list(options)
        self.child: Child

    def requires(self, ability: str) -> None:
        """Skip the test if this back-end (never ours) cannot do what the test shows."""
        if ability in self.lacks:
            pytest.skip(f"{type(self).__name__} has no {ability}")

    def start(self) -> Backend:
        """Start it, and wait until it listens and its TAPs are there."""
        self.launch()
        try:
            self.wait_ready()
        except BaseException:
            self.kill()
            raise
        return self

    def launch(self) -> None:
        raise NotImplementedError

    def counters(self) -> list[PortCounters]:
        """Give fresh counters of each port, in the order of the command line."""
        raise NotImplementedError

    def stop(self) -> float:
        """End it in order; gives the seconds that took."""
        raise NotImplementedError

    def kill(self) -> None:
        """SIGKILL."""
        self.child.kill()

    def descriptors(self) -> list[str]:
        """Name the open file descriptors of the process."""
        return [str(entry.readlink()) for entry in Path(f"/proc/{self.child.pid}/fd").iterdir()]

    def cpu_seconds(self) -> float:
        """Read the processor time of the process, all its threads together."""
        fields = Path(f"/proc/{self.child.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def wait_ready(self) -> None:
        """Wait until the sockets listen and the interfaces exist, as the back-end's own namespace sees them."""
        # A path may stand there from a killed process; only the kernel's table tells whether somebody listens on it.
        listening = {p.target for p in self.ports if p.kind == "vhost" and "client" not in p.options}
        taps = {p.target for p in self.ports if p.kind == "tap"}
        wait_until(
            "back-end ready",
            lambda: listening <= self._listening() and taps <= self._interfaces(),
            START_SECONDS,
            [self.child],
        )

    def _proc(self, name: str) -> list[list[str]]:
        try:
            return [line.split() for line in Path(f"/proc/{self.child.pid}/net/{name}").read_text().splitlines()]
        except OSError:
            return []

    def _listening(self) -> set[str]:
        accepts = 0x10000  # __SO_ACCEPTCON
        return {row[7] for row in self._proc("unix")[1:] if len(row) == 8 and int(row[3], 16) & accepts}

    def _interfaces(self) -> set[str]:
        return {row[0].split(":")[0] for row in self._proc("dev")[2:]}


class Pump(Backend):
    """`vq pump` as a user starts it."""

    def launch(self) -> None:
        command = [sys.executable, "-m", "vq", "pump", *self.words, "--json", "--interval", str(INTERVAL)]
        if self.core is not None:
            command += ["--cpu", str(self.core)]
        self.child = Child(f"pump{next(_numbers)}", command + self.options, self.scratch, netns=self.netns)

    def records(self) -> list[dict[str, Any]]:
        """Give every JSON object printed so far; a line that is still being written is left out."""
        *lines, _ = self.child.output().split("\n")
        return [json.loads(line) for line in lines if line]

    def fresh_record(self) -> dict[str, Any]:
        """Wait for a record that was taken after this call."""
        # The first one that arrives may have been taken before the call, the second one cannot.
        count = len(self.records())
        wait_until("a fresh JSON record", lambda: len(self.records()) >= count + 2, 10 * INTERVAL + 5, [self.child])
        return self.records()[-1]

    def counters(self) -> list[PortCounters]:
        def packets(port: dict[str, Any], direction: str) -> int:
            return int(port.get(direction, {}).get("packets", 0))

        ports = self.fresh_record()["ports"]
        assert len(ports) == len(self.words), f"{len(self.words)} ports were started, the record has {list(ports)}"
        found = []
        for port in ports.values():
            dropped: dict[str, int] = {}
            for direction in port.values():
                if isinstance(direction, dict):
                    for cause, count in direction.get("dropped", {}).items():
                        dropped[cause] = dropped.get(cause, 0) + count
            layouts = {queue["layout"] for queue in port.get("queues", ())}
            found.append(PortCounters(packets(port, "from_guest"), packets(port, "to_guest"), dropped, layouts))
        return found

    def stop(self) -> float:
        """Send SIGTERM; the pump has to end promptly, with exit code 0 and without a traceback."""
        begin = time.monotonic()
        self.child.signal(signal.SIGTERM)
        story = self.child.story
        try:
            code = self.child.wait(STOP_SECONDS)
        except TimeoutError as error:
            raise AssertionError(f"the pump runs on {STOP_SECONDS} s after SIGTERM\n{story()}") from error
        seconds = time.monotonic() - begin
        assert code == 0, f"exit code {code} after SIGTERM\n{story()}"
        assert "Traceback" not in self.child.errors(), story()
        self.child.kill()
        return seconds


class DpdkBackend(Backend):
    """DPDK's net_vhost, with net_tap where a TAP is asked for, joined by testpmd's io forwarding."""

    # net_tap takes packets without a vnet header, so what a guest leaves to be completed never is; there is no switch.
    lacks = frozenset(
        {
            "TAP offloads", "switch", "software completion", "queues over a TAP", "queue steering", "host_mtu",
            "a choice of memory slots",
        }
    )  # fmt: skip
    testpmd: Testpmd

    def launch(self) -> None:
        vdevs = []
        for index, port in enumerate(self.ports):
            if port.kind == "vhost":
                if "client" not in port.options:
                    Path(port.target).unlink(missing_ok=True)  # it does not take over the socket of a dead process
                words = [f"net_vhost{index}", f"iface={port.target}", f"queues={port.options.get('queues', 1)}"]
                vdevs.append(",".join(words + (["client=1"] if "client" in port.options else [])))
            elif port.kind == "tap":
                vdevs.append(f"net_tap{index},iface={port.target}")
        kinds = [port.kind for port in self.ports]
        mode = "rxonly" if "null" in kinds else "txonly" if "gen" in kinds else "io"
        queues = max(int(port.options.get("queues", 1)) for port in self.ports)
        options = [f"--forward-mode={mode}", f"--rxq={queues}", f"--txq={queues}"]
        name = f"dpdk{next(_numbers)}"
        core = self.core if self.core is not None else 0
        self.testpmd = Testpmd(name, vdevs, self.scratch, core=core, options=options, netns=self.netns)
        self.child = self.testpmd.child

    def wait_ready(self) -> None:
        self.testpmd.wait_prompt(START_SECONDS)
        self.testpmd.command("start")
        super().wait_ready()

    def counters(self) -> list[PortCounters]:
        found = iter(self.testpmd.statistics())
        none = PortCounters(0, 0, {})
        counters = []
        for port in self.ports:
            if port.kind not in ("vhost", "tap"):
                counters.append(none)
                continue
            now = next(found)
            dropped = {"errors": now.transmit_errors} if now.transmit_errors else {}
            counters.append(PortCounters(now.received, now.transmitted, dropped))
        return counters

    def stop(self) -> float:
        begin = time.monotonic()
        self.child.signal(signal.SIGINT)
        self.child.wait(60)
        self.child.kill()
        return time.monotonic() - begin


BACKENDS = {"vq": Pump, "dpdk": DpdkBackend}
