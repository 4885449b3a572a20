"""MAC addresses of a machine's cards. A machine without cards needs no more of cards than this."""

from __future__ import annotations

import os
from binascii import crc32

from pyvmm.errors import UsageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping

    from pyvmm.netopt import Net

MAC_PREFIX = bytes((0x52, 0x54, 0))  # the customary one of virtual machines: administered locally


def mac_text(mac: bytes) -> str:
    """The address as text: ``52:54:00:12:34:56``."""
    return mac.hex(":")


class MacAddresses:
    """Chooses the MAC addresses of a machine's cards. A card without ``mac`` gets one that follows
    from the machine's name, the number of the card, and this boot of this host: it is the same each
    time that a machine of this name starts, and other machines have others.

    :param name: of the machine; empty for a machine without a name, whose addresses are random.
    """

    def __init__(self, name: str) -> None:
        if name:
            with open("/proc/sys/kernel/random/boot_id", "rb") as f:
                seed = f.read() + f"{os.uname().nodename}/{os.getuid()}/{name}".encode()
        else:
            seed = os.urandom(16)
        self._first = crc32(seed)

    def choose(
        self, nets: Mapping[int, Net], taken: Mapping[int, bytes] | None = None
    ) -> dict[int, bytes]:
        """The address of each new card.

        :param nets: the new cards by their numbers. :param taken: the addresses of the cards that
            are there, likewise.
        :raises UsageError: two cards have the same ``mac``.
        """
        used = {mac: index for index, mac in (taken or {}).items()}
        out: dict[int, bytes] = {}
        for index, net in nets.items():
            if net.mac is None:
                continue
            if net.mac in used:
                raise UsageError(
                    f"--net: mac={mac_text(net.mac)} is the address of cards {used[net.mac]} and "
                    f"{index}: the guest's network would mix up their packets",
                    "give each card its own, or leave mac= out",
                )
            used[net.mac] = index
            out[index] = net.mac
        for index in nets:
            number = self._first + index
            while index not in out:
                mac = MAC_PREFIX + (number & 0xFFFFFF).to_bytes(3, "big")
                number += 1
                if mac not in used:
                    out[index] = mac
                    used[mac] = index
        return out
