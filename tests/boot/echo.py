"""Asks for echoes (ICMP, RFC 792) and waits for all answers; runs in the testbed:
`python echo.py ADDRESS COUNT SIZE`. With a count of 0 it asks 50 times per second until SIGINT.

ping(8) waits for its last answer twice as long as for the others, which a busy machine may exceed,
and at SIGINT it does not wait.
"""

from __future__ import annotations

import os
import signal
import socket
import struct
import sys
import time

#: Seconds for all answers; for those that are missing at SIGINT.
PATIENCE = 60.0
PERIOD = 0.02
#: Linux's numbers (include/uapi/linux/in.h), which Python does not have.
IP_MTU_DISCOVER, IP_PMTUDISC_DO = 10, 2
SO_RCVBUFFORCE = 33


def checksum(data: bytes) -> int:
    """Of RFC 1071, of an even number of bytes."""
    total: int = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


class Echoes:
    """The questions of one process, and the numbers of those that have been answered."""

    def __init__(self, sock: socket.socket, address: str, size: int) -> None:
        self._sock, self._address = sock, address
        self._ident = os.getpid() & 0xFFFF
        self._payload = (bytes(range(256)) * (size // 256 + 1))[: size & ~1]
        self.answered: set[int] = set()

    def ask(self, number: int) -> None:
        """Send a question."""
        head = struct.pack("!BBHHH", 8, 0, 0, self._ident, number)
        total = struct.pack("!H", checksum(head + self._payload))
        self._sock.sendto(head[:2] + total + head[4:] + self._payload, (self._address, 0))

    def listen(self, seconds: float) -> None:
        """Take one packet, if it comes in time."""
        self._sock.settimeout(max(seconds, 0.001))
        try:
            packet = self._sock.recv(65536)
        except TimeoutError:
            return
        answer = packet[(packet[0] & 15) * 4 :]
        kind, _, _, whose, which = struct.unpack("!BBHHH", answer[:8])
        if (kind, whose) == (0, self._ident) and answer[8:] == self._payload:
            self.answered.add(which)


def some(echoes: Echoes, count: int) -> int:
    """Ask so often, each time after the answer to the last question; how often."""
    until = time.monotonic() + PATIENCE
    for number in range(count):
        echoes.ask(number)
        while number not in echoes.answered and (left := until - time.monotonic()) > 0:
            echoes.listen(left)
    return count


def many(echoes: Echoes) -> int:
    """Ask until SIGINT, whether the answers have come or not; how often."""
    ended: list[int] = []
    signal.signal(signal.SIGINT, lambda *_: ended.append(1))
    sent = 0
    while not ended:
        echoes.ask(sent)
        sent += 1
        until = time.monotonic() + PERIOD
        while (left := until - time.monotonic()) > 0:
            echoes.listen(left)
    until = time.monotonic() + PATIENCE
    while len(echoes.answered) < sent and (left := until - time.monotonic()) > 0:
        echoes.listen(left)
    return sent


def main() -> int:
    address, count, size = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    with socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP) as sock:
        sock.setsockopt(socket.IPPROTO_IP, IP_MTU_DISCOVER, IP_PMTUDISC_DO)  # no fragments
        # Answers to other processes come, too, also while this one gets no processor.
        sock.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, 8 << 20)
        echoes = Echoes(sock, address, size)
        sent = some(echoes, count) if count else many(echoes)
    print(f"{sent} packets transmitted, {len(echoes.answered)} received")
    return len(echoes.answered) != sent


if __name__ == "__main__":
    sys.exit(main())
