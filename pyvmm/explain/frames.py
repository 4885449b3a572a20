"""The first bytes of a packet in words. They come from a guest or a network: all is checked."""

from __future__ import annotations

import struct
from ipaddress import IPv4Address, IPv6Address

#: struct virtio_net_hdr (virtio 1.2, 5.1.6).
GSO = {0: "none", 1: "TCPv4", 3: "UDP", 4: "TCPv6", 5: "UDP_L4"}
ICMP = {0: "echo reply", 3: "unreachable", 8: "echo request", 11: "time exceeded"}
ICMP6 = {
    128: "echo request",
    129: "echo reply",
    133: "router solicitation",
    135: "neighbour solicitation",
    136: "neighbour advertisement",
    143: "multicast listener report",
}
ETHERTYPES = {0x0800: "IPv4", 0x0806: "ARP", 0x86DD: "IPv6", 0x8100: "VLAN"}
Fields = list[tuple[str, str]]


def explain(data: bytes, header: int) -> tuple[str, Fields]:
    """What a packet is, in a few words, and its fields.

    :param data: virtio_net_hdr and the beginning of the frame.
    :param header: bytes of the virtio_net_hdr.
    """
    fields: Fields = []
    if header >= 10 and len(data) >= 10:
        flags, gso, _, size, start, offset = struct.unpack_from("<BBHHHH", data)
        text = f"flags {flags:#x}, gso_type {GSO.get(gso & 0x7F, hex(gso))}"
        text += f", gso_size {size}" if gso else ""
        text += f", csum_start {start}, csum_offset {offset}" if flags & 1 else ""
        if header >= 12 and len(data) >= 12:
            text += f", num_buffers {struct.unpack_from('<H', data, 10)[0]}"
        fields.append(("virtio_net_hdr", text))
    frame = data[header:]
    if len(frame) < 14:
        return "frame", fields
    kind = int.from_bytes(frame[12:14], "big")
    fields.append(
        ("Ethernet", f"{_mac(frame[6:12])} to {_mac(frame[:6])}, {ETHERTYPES.get(kind, hex(kind))}")
    )
    words = {0x0800: _ipv4, 0x0806: _arp, 0x86DD: _ipv6}.get(kind)
    said = words(frame[14:], fields) if words else ""
    return said or f"{ETHERTYPES.get(kind, f'Ethernet type {kind:#06x}')} frame", fields


def _mac(data: bytes) -> str:
    return data.hex(":")


def _arp(data: bytes, fields: Fields) -> str:
    if len(data) < 28:
        return ""
    asks = int.from_bytes(data[6:8], "big") == 1
    source, target = IPv4Address(data[14:18]), IPv4Address(data[24:28])
    said = f"ARP who has {target}?" if asks else f"ARP {source} is at {_mac(data[8:14])}"
    fields.append(("ARP", f"{said} told by {source}" if asks else said))
    return said


def _ipv4(data: bytes, fields: Fields) -> str:
    if len(data) < 20:
        return ""
    own, length, protocol = (data[0] & 15) * 4, int.from_bytes(data[2:4], "big"), data[9]
    way = f"{IPv4Address(data[12:16])} to {IPv4Address(data[16:20])}"
    fields.append(("IPv4", f"{way}, protocol {protocol}, {length} bytes"))
    return f"{_above(protocol, data[own:], fields, ICMP, 1)} {way}"


def _ipv6(data: bytes, fields: Fields) -> str:
    if len(data) < 40:
        return ""
    protocol, rest = data[6], data[40:]
    way = f"{IPv6Address(data[8:24])} to {IPv6Address(data[24:40])}"
    fields.append(("IPv6", f"{way}, next header {protocol}"))
    if protocol == 0 and len(rest) >= 8:  # hop-by-hop options
        protocol, rest = rest[0], rest[8 * (rest[1] + 1) :]
    return f"{_above(protocol, rest, fields, ICMP6, 58)} {way}"


def _above(protocol: int, data: bytes, fields: Fields, icmp: dict[int, str], number: int) -> str:
    """The protocol above IP."""
    if protocol == number:
        name = "ICMP" if number == 1 else "ICMPv6"
        if not data:
            return name
        kind = icmp.get(data[0], f"type {data[0]}")
        if kind.startswith("echo") and len(data) >= 8:
            ident, sequence = struct.unpack_from("!HH", data, 4)
            fields.append((name, f"{kind}, identifier {ident}, sequence {sequence}"))
            return f"{name} {kind} {sequence}"
        fields.append((name, kind))
        return f"{name} {kind}"
    if protocol in (6, 17) and len(data) >= 4:
        name = {6: "TCP", 17: "UDP"}[protocol]
        source, target = struct.unpack_from("!HH", data)
        more = ""
        if protocol == 6 and len(data) >= 14:
            names = ("FIN", "SYN", "RST", "PSH", "ACK", "URG")
            more = " ".join(n for i, n in enumerate(names) if data[13] >> i & 1)
        fields.append((name, f"port {source} to {target}" + (f", {more}" if more else "")))
        return f"{name}{f' {more}' if more else ''}"
    return f"IP protocol {protocol}"
