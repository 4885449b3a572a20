"""Frames that pyvmm itself makes."""

from __future__ import annotations

from pyvmm.spec.virtio_net import VIRTIO_NET_HDR_V1_SIZE

#: An empty virtio-net header.
HEADER = bytes(VIRTIO_NET_HDR_V1_SIZE)


def announcement(mac: bytes, address: bytes) -> bytes:
    """The frame by which hosts learn that the IPv4 address is that of ``mac``: an ARP request of
    the address for itself (RFC 5227).
    """
    return (
        b"\xff" * 6
        + mac
        + b"\x08\x06\x00\x01\x08\x00\x06\x04\x00\x01"
        + mac
        + address
        + bytes(6)
        + address
        + bytes(18)
    )


def rarp(mac: bytes) -> bytes:
    """The frame by which switches learn where ``mac`` is: a reverse ARP request of ``mac`` for
    itself.
    """
    return (
        b"\xff" * 6
        + mac
        + b"\x80\x35\x00\x01\x08\x00\x06\x04\x00\x03"
        + mac
        + bytes(4)
        + mac
        + bytes(4)
        + bytes(18)
    )
