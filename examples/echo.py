"""Echo a guest's packets for a while, from Python: python examples/echo.py [SECONDS [SOCKET]]."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import vq


def report(now: dict[str, Any]) -> None:
    for name, port in now["ports"].items():
        print(f"{now['uptime']:5.1f} s {name} {port['state']}: {port['from_guest']['packets']} packets came")


def main() -> None:
    try:
        seconds = float(sys.argv[1]) if len(sys.argv) > 1 else 10.0
    except ValueError:
        raise SystemExit("usage: python examples/echo.py [SECONDS [SOCKET]]") from None
    with tempfile.TemporaryDirectory() as folder:
        path = sys.argv[2] if len(sys.argv) > 2 else str(Path(folder, "echo.sock"))
        try:
            with vq.Pump([f"vhost:{path}"]) as pump:
                print(f"connect a guest to {path}")
                pump.run(duration=seconds, interval=1.0, on_interval=report)
        except KeyboardInterrupt:
            raise SystemExit(130) from None
        except (vq.VqError, OSError) as error:
            raise SystemExit(f"echo.py: {error}") from None


if __name__ == "__main__":
    main()
