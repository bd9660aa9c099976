"""A program in the host's namespace: prints each ARP and RARP frame that comes in at an interface, in hexadecimal."""

from __future__ import annotations

import socket
import sys

ETH_P_ALL = 3
WANTED = (b"\x08\x06", b"\x80\x35")

with socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ETH_P_ALL)) as tap:
    tap.bind((sys.argv[1], 0))
    print("ready", flush=True)
    while True:
        frame, origin = tap.recvfrom(65536)
        if frame[12:14] in WANTED and origin[2] != socket.PACKET_OUTGOING:
            print(frame.hex(), flush=True)
