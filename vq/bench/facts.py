"""What belongs to each result, so that it can be judged later: machine, build, date, command."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

__all__ = ["Facts", "gather"]


@dataclass(frozen=True, slots=True)
class Facts:
    """Where, with what and when something was measured.

    Parameters
    ----------
    cpu_model, cpus, kernel
        The machine: name of its processor, how many of them this process may use, version of the kernel.
    hypervisor
        Whether the machine is a virtual one, whose processors may move.
    python, vq, commit
        Versions; `commit` of git when vq runs from a checkout, with "+" when files were changed, else empty.
    compiler, flags, baseline
        What the engine was compiled by and with; `flags` is empty if the build did not record them.
    date
        ISO 8601, UTC.
    command
        The command line.
    """

    cpu_model: str
    cpus: int
    kernel: str
    hypervisor: bool
    python: str
    vq: str
    commit: str
    compiler: str
    flags: str
    baseline: str
    date: str
    command: str

    def lines(self) -> list[str]:
        """The facts for people, below a table or a plot."""
        machine = f"{self.cpu_model}, {self.cpus} CPUs{' of a virtual machine' if self.hypervisor else ''}"
        version = f"vq {self.vq}" + (f" at {self.commit}" if self.commit else "")
        return [
            f"{machine}, Linux {self.kernel}",
            f"{version}, {self.compiler} for {self.baseline}: {self.flags or 'flags not recorded'}",
            f"{self.date}: {self.command}",
        ]


def gather(command: str) -> Facts:
    """Look at this machine and this build.

    Parameters
    ----------
    command
        The command line to note.
    """
    from vq import __version__
    from vq_core.compiled import compiled

    build = compiled()
    model, hypervisor = _processor()
    return Facts(
        cpu_model=model,
        cpus=len(os.sched_getaffinity(0)),
        kernel=platform.release(),
        hypervisor=hypervisor,
        python=platform.python_version(),
        vq=__version__,
        commit=_commit(),
        compiler=build["compiler"],
        flags=_brief(build["flags"]),
        baseline=build["baseline"],
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        command=command,
    )


def _processor() -> tuple[str, bool]:
    """The name of the processor, and whether a hypervisor stands in between."""
    fields: dict[str, str] = {}
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        key, _, value = line.partition(":")
        fields.setdefault(key.strip(), value.strip())
    model = fields.get("model name") or platform.processor() or platform.machine()
    return model, "hypervisor" in fields.get("flags", "").split()


def _brief(flags: str) -> str:
    """Flags that change the code: no warnings, each once, the last of several levels."""
    words = [word for word in flags.split() if word.startswith(("-O", "-f", "-m", "-g", "-flto"))]
    levels = [word for word in words if word.startswith("-O")]
    return " ".join(dict.fromkeys(w for w in words if not w.startswith("-O") or w == levels[-1]))


def _commit() -> str:
    """The commit of the checkout that this file lies in; empty outside of one."""
    folder = Path(__file__).resolve().parents[2]
    if not (folder / ".git").exists():
        return ""
    words = ["git", "-C", str(folder), "describe", "--always", "--abbrev=12", "--exclude=*", "--dirty=+"]
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=10, env={**os.environ, "LC_ALL": "C"})
    except (OSError, subprocess.SubprocessError):
        return ""  # no git, or one that does not answer: the version has to do
    return done.stdout.strip() if done.returncode == 0 else ""


def command_line() -> str:
    """The command line of this process, as one would type it."""
    import shlex

    return shlex.join([Path(sys.argv[0]).name.replace("__main__.py", "vq"), *sys.argv[1:]])
