"""What no file of the project may contain."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from quality.tree import ROOT, below, files, name

# Written in pieces, so that this file does not contain what it looks for.
HOSTS = ["py" + r"pi\.org", "python" + r"hosted\.org", "npm" + r"js\.", "crates" + r"\.io"]
REGISTRIES = re.compile("|".join([*HOSTS, r"(?:deb|security|ftp\.\w+)\.debian" + r"\.org"]))
# At the beginning of a word or a string: "$work"/root/boot is a part of a path.
PLACES = ["/root" + "/", "/home" + r"/\w", "/Users" + r"/\w"]
HOMES = re.compile(r"(?:^|[\s=(:,\[{]|[\s=(:,\[{][\"'])(?:" + "|".join(PLACES) + ")", re.M)
CHECKOUT = re.compile(re.escape(str(ROOT)) + r"\b")


def texts() -> list[tuple[Path, str]]:
    found = []
    for path in files():
        try:
            found.append((path, path.read_text()))
        except UnicodeDecodeError:
            continue  # captures and the like
    return found


@pytest.mark.parametrize("pattern", [REGISTRIES, HOMES, CHECKOUT], ids=["registry", "home", "checkout"])
def test_no_file_names_a_registry_or_a_place_of_this_machine(pattern: re.Pattern[str]) -> None:
    hits = [f"{name(path)}: {match[0]}" for path, text in texts() for match in pattern.finditer(text)]
    assert hits == []


def test_directions_have_names() -> None:
    """A bare rx or tx flips with the reader; the option names of QEMU and DPDK are theirs."""
    bare = re.compile(r"(?<![\w-])[rt]x(?![\w-])|(?<![\w-])[rt]x_(?!queue_size)", re.I)
    sources = below("vq", ".py") + below("vq_core", ".pyx", ".pxd", ".h", ".py", ".pyi")
    lines = [(path, line) for path in sources for line in path.read_text().splitlines()]
    hits = [f"{name(path)}: {line.strip()}" for path, line in lines if bare.search(line)]
    assert hits == []


def test_the_licence_is_complete() -> None:
    text = (ROOT / "LICENSE").read_text()
    assert "Apache License" in text
    assert "END OF TERMS AND CONDITIONS" in text
