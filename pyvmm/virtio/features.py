"""Feature bits by name."""

from __future__ import annotations

from pyvmm.spec import virtio, virtio_net


def names(bits: int) -> list[str]:
    """The names of virtio-net feature bits, kernel spellings without their prefixes, lowest bit
    first.
    """
    table = {
        getattr(module, name): name.partition("_F_")[2]
        for module in (virtio, virtio_net)
        for name in dir(module)
        if name.startswith(("VIRTIO_NET_F_", "VIRTIO_RING_F_", "VIRTIO_F_"))
    }
    return [table.get(i, f"bit-{i}") for i in range(bits.bit_length()) if bits >> i & 1]
