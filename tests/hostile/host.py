"""The program under attack: `vq pump` with an echo behind each socket, so that no guest sees another's packets.

Run with socket paths as arguments. All ports share one worker, as far as the data plane goes the worst case. A line on
standard input is answered by the pump's snapshot in one line of JSON.
"""

from __future__ import annotations

import json
import sys
import threading

from vq.cli import logs
from vq.pump import Pump


def answer(pump: Pump) -> None:
    """Give snapshots until the standard input ends, then stop the pump."""
    for _ in sys.stdin:
        print(json.dumps(pump.snapshot()), flush=True)
    pump.request_stop()


def main() -> None:
    logs.configure(1)
    with Pump([[f"vhost:{path},queues=2"] for path in sys.argv[1:]]) as pump:
        threading.Thread(target=answer, args=[pump], daemon=True).start()
        pump.run()


if __name__ == "__main__":
    main()
