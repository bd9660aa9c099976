"""How fast is the engine by itself? Move generated packets to a sink: python examples/generate.py [SECONDS]."""

from __future__ import annotations

import sys

import vq
from vq.stats import flows


def main() -> None:
    try:
        seconds = float(sys.argv[1]) if len(sys.argv) > 1 else 1.0
    except ValueError:
        raise SystemExit("usage: python examples/generate.py [SECONDS]") from None
    try:
        for size in (64, 512, 1518):
            with vq.Pump([f"gen:size={size}", "null:copy"], poll="busy") as pump:
                final = pump.run(duration=seconds)
            for flow in flows(None, final):
                if flow.direction == "to_null":
                    print(f"{size:5} bytes {flow.packet_rate / 1e6:8.2f} Mpps {flow.bit_rate / 1e9:8.2f} Gbit/s")
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    except vq.VqError as error:
        raise SystemExit(f"generate.py: {error}") from None


if __name__ == "__main__":
    main()
