"""The program under attack: `vq pump` with an echo behind each socket, so that no guest sees another's packets.

Run with socket paths as arguments. All ports share one worker, as far as the data plane goes the worst case. A line on
standard input is answered by the pump's snapshot in one line of JSON.
"""

from __future__ import annotations

import json
import sys
import threading

from vq.cli import logs
from vq.plan import make_flows, spread
from vq.pump import Pump


class Echoes(Pump):
    """A pump that only differs in where packets go: back to where they came from."""

    def _plan(self) -> None:
        self._replan = False
        flows = [flow for port in self.ports for flow in make_flows([port.port], None)]
        self._publish(spread(flows, len(self.workers)))


def answer(pump: Pump) -> None:
    """Give snapshots until the standard input ends, then stop the pump."""
    for _ in sys.stdin:
        print(json.dumps(pump.snapshot()), flush=True)
    pump.request_stop()


def main() -> None:
    logs.configure(1)
    with Echoes([f"vhost:{path},queues=2" for path in sys.argv[1:]]) as pump:
        threading.Thread(target=answer, args=[pump], daemon=True).start()
        pump.run()


if __name__ == "__main__":
    main()
