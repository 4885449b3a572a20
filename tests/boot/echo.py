"""Asks for echoes (ICMP, RFC 792) and waits for all answers; runs in the testbed:
`python echo.py ADDRESS COUNT SIZE`.

ping(8) waits for its last answer twice as long as for the others, which a busy machine may exceed.
"""

from __future__ import annotations

import os
import socket
import struct
import sys
import time

#: Seconds for all answers.
PATIENCE = 60.0


def checksum(data: bytes) -> int:
    """Of RFC 1071, of an even number of bytes."""
    total: int = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


def main() -> int:
    address, count, size = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    ident, payload = os.getpid() & 0xFFFF, bytes(range(256)) * (size // 256 + 1)
    until, answered = time.monotonic() + PATIENCE, set()
    with socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP) as sock:
        for number in range(count):
            head = struct.pack("!BBHHH", 8, 0, 0, ident, number)
            rest = payload[: size & ~1]
            sock.sendto(head[:2] + struct.pack("!H", checksum(head + rest)) + head[4:] + rest,
                        (address, 0))  # fmt: skip
            while number not in answered and (left := until - time.monotonic()) > 0:
                sock.settimeout(left)
                try:
                    packet = sock.recv(65536)
                except TimeoutError:
                    break
                answer = packet[(packet[0] & 15) * 4 :]
                kind, _, _, whose, which = struct.unpack("!BBHHH", answer[:8])
                if (kind, whose) == (0, ident) and answer[8:] == rest:
                    answered.add(which)
    print(f"{count} packets transmitted, {len(answered)} received")
    return len(answered) != count


if __name__ == "__main__":
    sys.exit(main())
