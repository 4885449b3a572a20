"""seqnet.c and xsk.c: numbered datagrams from one place, accounted for at another."""

from __future__ import annotations

import json
import struct
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tests.boot.guest import Guest, Host

#: In the guest.
PROGRAM = "/tmp/seqnet"
LENGTH = 256  # bytes of a frame


def build(directory: Path, name: str = "seqnet") -> Path:
    """Compile it into ``directory``: a static program, which runs in any Linux."""
    program = directory / name
    source = Path(__file__).with_name(f"{name}.c")
    argv = [
        "gcc",
        "-std=gnu11",
        "-O2",
        "-static",
        "-Wall",
        "-Werror",
        "-o",
        str(program),
        str(source),
    ]
    subprocess.run(argv, check=True)
    return program


def datagram(number: int) -> bytes:
    """The frame that it would send under this number."""
    ip = struct.pack("!BBHHHBBHII", 0x45, 0, LENGTH - 14, 0, 0, 1, 17, 0, 0xC0A86402, 0xFFFFFFFF)
    total = sum(struct.unpack("!10H", ip))
    total = (total & 0xFFFF) + (total >> 16)
    ip = ip[:10] + struct.pack("!H", ~total & 0xFFFF) + ip[12:]
    head = (
        b"\xff" * 6
        + b"\x02\0\0\0\0\x09\x08\0"
        + ip
        + struct.pack("!HHHH", 7099, 7099, LENGTH - 34, 0)
    )
    return (head + struct.pack("<IQ", 0x7365716E, number)).ljust(LENGTH, b"\0")


def install(guest: Guest, program: Path, nic: int = 0) -> None:
    """Copy it into the guest, over its network."""
    from tests.boot.guest import nic_address

    guest.start(f"busybox nc -l -p 7009 -e sh -c 'cat >{PROGRAM}'")
    send = f"until busybox nc {nic_address(nic, 'guest')} 7009 <{program}; do sleep 0.2; done"
    result = guest.host_run(nic, "sh", "-c", send)
    assert result.status == 0, result
    size = program.stat().st_size
    guest.do(f"until [ $(wc -c <{PROGRAM}) = {size} ]; do sleep 0.1; done; chmod +x {PROGRAM}")


class HostCounter:
    """seqnet counting at an interface in the testbed, ``inside`` a namespace. ``account``
    ends it.
    """

    def __init__(
        self,
        host: Host,
        program: Path,
        interface: str,
        inside: Sequence[str],
        out: str = "/run/vu-test.count",
    ) -> None:
        self.host, self._out = host, out
        argv = " ".join([*inside, str(program), "count", interface])
        host.sh(
            f"setsid {argv} >{out} 2>&1 & echo $! >{out}.pid; "
            f"until grep -q ready {out}; do sleep 0.1; done"
        )

    def account(self) -> dict[str, Any]:
        """What came."""
        out = self._out
        text = self.host.sh(
            f"kill $(cat {out}.pid); until grep -q received {out}; do sleep 0.1; done; "
            f"tail -n 1 {out}; rm {out} {out}.pid"
        )
        answer: dict[str, Any] = json.loads(text)
        return answer


class GuestSender:
    """seqnet sending in a guest, by default until ``stop``."""

    def __init__(
        self, guest: Guest, interface: str = "eth0", *, count: int = 0, pause_us: int = 0
    ) -> None:
        self.guest = guest
        guest.do(f"{PROGRAM} send {interface} {count} {pause_us} >/tmp/sent & echo $! >/tmp/sender")

    def stop(self) -> int:
        """End it where it does not end by itself; how many it has sent."""
        return self._sent("kill $(cat /tmp/sender); ")

    def wait(self) -> int:
        """Until all are sent; how many."""
        return self._sent("")

    def _sent(self, first: str) -> int:
        text = self.guest.do(
            f"{first}until grep -q sent /tmp/sent; do sleep 0.1; done; cat /tmp/sent"
        )
        return int(json.loads(text)["sent"])
