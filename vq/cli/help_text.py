"""Long text for ``--help``, fit for the terminal: paragraphs that it wraps, and lists whose items hang."""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Mapping
from typing import Final

__all__ = ["hanging", "listing", "paragraphs", "terminal_width"]

WIDTH_MIN: Final = 40


def terminal_width() -> int:
    """Columns that help may take."""
    return max(shutil.get_terminal_size().columns, WIDTH_MIN)


def paragraphs(text: str | None) -> str:
    """A docstring with each paragraph as one line, which the terminal wraps by itself."""
    parts = (text or "").split("\n\n")
    return "\n\n".join(" ".join(part.split()) for part in parts if part.strip())


def hanging(text: str, indent: int) -> list[str]:
    """Wrap one item; all its lines but the first begin with blanks."""
    return textwrap.wrap(text, terminal_width(), subsequent_indent=" " * indent, break_on_hyphens=False)


def listing(items: Mapping[str, str]) -> str:
    """Words and what they mean, in two columns."""
    column = 2 + max(map(len, items)) + 2
    lines = [line for word, text in items.items() for line in hanging(f"{'  ' + word:<{column}}{text}", column)]
    return "\n".join(lines)
