"""Misbehaves as a vhost-user back-end to a pyvmm that looks for one; runs in the testbed: `python
-m tests.boot.hostile SOCKET`.

One connection for each kind of malice, then it ends. Prints the names of those that were met.
"""

from __future__ import annotations

import socket
import struct
import sys
import time
from typing import TYPE_CHECKING

from pyvmm.spec import vhost_user as spec
from pyvmm.vhostuser.wire import Listener
from tests.vu_fake import HOSTILE, REPLY_ACK, Fake, raw

if TYPE_CHECKING:
    from pyvmm.vhostuser.wire import Message
    from tests.vu_fake import Answer

PATIENCE = 120.0


def drip(sock: socket.socket, m: Message) -> None:
    """One byte per second, until the back-end has had enough."""
    for byte in raw(m.request, struct.pack("<Q", Fake.FEATURES)):
        time.sleep(1)
        sock.send(bytes([byte]))


#: name -> request and what is answered to it.
MALICE: dict[str, tuple[int, Answer]] = {
    **{name: (spec.VHOST_USER_GET_FEATURES, answer) for name, answer in HOSTILE.items()},
    "refuses memory": (
        spec.VHOST_USER_SET_MEM_TABLE,
        raw(spec.VHOST_USER_SET_MEM_TABLE, struct.pack("<Q", 1)),
    ),
    "garbage late": (spec.VHOST_USER_SET_VRING_ENABLE, b"\xff" * 64),
    "silence": (spec.VHOST_USER_GET_FEATURES, lambda sock, m: None),
    "a byte a second": (spec.VHOST_USER_GET_FEATURES, drip),
}


class Able(Fake):
    """Offers whatever a guest may use, so that no front-end leaves before it has met the malice."""

    FEATURES = (1 << 64) - 1
    PROTOCOL = REPLY_ACK | 1 << spec.VHOST_USER_PROTOCOL_F_MTU


def comes(fake: Fake, name: str) -> bool:
    """Wait for a connection, which must meet ``name``, and for its end."""
    before, until = fake.connections, time.monotonic() + PATIENCE
    while fake.connections == before or not fake.idle:
        time.sleep(0.01)
        if time.monotonic() > until:
            print(f"no connection for {name}", flush=True)
            return False
    met = MALICE[name][0] in fake.seen
    print(name if met else f"{name} was not met: {fake.seen}", flush=True)
    return met


def main() -> int:
    listener = Listener(sys.argv[1])
    with Able(listener, Able.PROTOCOL) as fake:
        for name, (request, answer) in MALICE.items():
            fake.answers = {request: answer}
            fake.seen.clear()
            if not comes(fake, name):
                return 1
    listener.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
