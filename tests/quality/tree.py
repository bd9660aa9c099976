"""The files of the checkout, for the tests beside this one."""

from __future__ import annotations

import re
import subprocess
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LITERAL = re.compile(
    r"""[rbf]{0,2}(\"{3}|'{3})(?:\\.|.)*?\1|[rbf]{0,2}"(?:\\.|[^"\\\n])*"|[rbf]{0,2}'(?:\\.|[^'\\\n])*'|\#[^\n]*""",
    re.S | re.I,
)
MADE = {"build", "dist", ".venv", "__pycache__", ".git"}


@cache
def files() -> tuple[Path, ...]:
    """Every file that belongs to the project; what git ignores does not."""
    try:
        listing = subprocess.run(
            ["git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
            capture_output=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        # An unpacked archive, or no git: everything that is not made.
        found = [path for path in ROOT.rglob("*") if not MADE & set(path.relative_to(ROOT).parts)]
    else:
        found = [ROOT / name for name in listing.stdout.decode().split("\0") if name]
    return tuple(sorted(path for path in found if path.is_file()))


def below(folder: str, *suffixes: str) -> list[Path]:
    """The project's files below a folder with one of these suffixes."""
    return [path for path in files() if path.is_relative_to(ROOT / folder) and path.suffix in suffixes]


def name(path: Path) -> str:
    """The path as people write it."""
    return path.relative_to(ROOT).as_posix()


def without_comments(text: str) -> str:
    """Cython or Python source without comments, docstrings and other literals; lines stay where they are."""
    return LITERAL.sub(lambda match: '""' + "\n" * match[0].count("\n"), text)
