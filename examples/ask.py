"""Ask a vhost-user back-end what it offers, in the role of a front-end: python examples/ask.py SOCKET."""

from __future__ import annotations

import sys

import vq
from vq import virtio


def main() -> None:
    if len(sys.argv) != 2:
        raise SystemExit("usage: python examples/ask.py SOCKET")
    try:
        with vq.Frontend.connect(sys.argv[1]) as frontend:
            frontend.negotiate(0)
            print("\n".join(virtio.feature_names(frontend.offered_features, virtio.DeviceId.NET)))
    except (vq.VqError, OSError) as error:
        raise SystemExit(f"ask.py: {error}") from None


if __name__ == "__main__":
    main()
