"""``python -m vq``: the same as the program ``vq``."""

from __future__ import annotations

import sys

from vq.cli import main

if __name__ == "__main__":
    sys.exit(main())
