"""What a driver does not want to receive, as a classic BPF program for a tap (TUNATTACHFILTER):
VLANs (virtio 1.2, 5.1.6.5.3) and whole kinds of destinations (5.1.6.5.1). For addresses, the tap
has a filter of its own (TUNSETTXFILTER).

The kernel runs the program for each frame that the host sends to the tap, whatever data path takes
the frame from there.
"""

from __future__ import annotations

import struct

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pyvmm.datapath.base import RxFilter

#: linux/bpf_common.h and linux/filter.h: opcodes, and where the tag of a frame is that the kernel
#: keeps beside the frame.
LD_WORD, LD_HALF, LD_BYTE = 0x20, 0x28, 0x30  # BPF_LD | BPF_ABS
AND, JUMP, IF_EQUAL, IF_BITS, RETURN = 0x54, 0x05, 0x15, 0x45, 0x06
AUX = 0xFFFFF000  # SKF_AD_OFF
VLAN_TAG, VLAN_PRESENT = AUX + 44, AUX + 48
PASS, DROP = 0x40000, 0
ETH_P_8021Q = 0x8100
#: More VLANs than these are not told apart: the kernel limits a program's size.
VLANS_MAX = 256


def frame_filter(rx: RxFilter) -> bytes:
    """An array of struct sock_filter; empty if every frame passes."""
    if "promisc" in rx.flags:
        return b""
    kinds = _kinds(rx)
    code = (_vlans(rx) if rx.filters_vlans and len(rx.vlans) <= VLANS_MAX else []) + kinds
    if not code:
        return b""
    code.append((RETURN, 0, 0, PASS))
    return b"".join(struct.pack("=HBBI", *each) for each in code)


Code = list[tuple[int, int, int, int]]


def _vlans(rx: RxFilter) -> Code:
    """Drops frames with the tag of another VLAN; goes on behind its end with all others."""
    known: Code = []
    for vlan in sorted(rx.vlans):
        known += [(IF_EQUAL, 0, 1, vlan), (JUMP, 0, 0, 0)]
    end = 9 + len(known) + 1
    for i in range(1, len(known), 2):
        known[i] = (JUMP, 0, 0, end - (9 + i) - 1)
    return [
        (LD_WORD, 0, 0, VLAN_PRESENT),
        (IF_EQUAL, 2, 0, 0),  # to the tag within the frame
        (LD_WORD, 0, 0, VLAN_TAG),
        (JUMP, 0, 0, 4),
        (LD_HALF, 0, 0, 12),
        (IF_EQUAL, 1, 0, ETH_P_8021Q),
        (JUMP, 0, 0, end - 7),
        (LD_HALF, 0, 0, 14),
        (AND, 0, 0, 0xFFF),
        *known,
        (RETURN, 0, 0, DROP),
    ]


def _kinds(rx: RxFilter) -> Code:
    """Drops broadcast, multicast or unicast frames; passes all others if it drops any."""
    drop = {kind: DROP if f"no{kind}" in rx.flags else PASS for kind in ("bcast", "multi", "uni")}
    if DROP not in drop.values():
        return []
    return [
        (LD_BYTE, 0, 0, 0),
        (IF_BITS, 1, 0, 1),
        (RETURN, 0, 0, drop["uni"]),
        (LD_WORD, 0, 0, 0),
        (IF_EQUAL, 0, 3, 0xFFFFFFFF),
        (LD_HALF, 0, 0, 4),
        (IF_EQUAL, 0, 1, 0xFFFF),
        (RETURN, 0, 0, drop["bcast"]),
        (RETURN, 0, 0, drop["multi"]),
    ]
