"""Feature bits by name."""

from __future__ import annotations

from pyvmm.spec import virtio, virtio_net


def names(bits: int, *, net: bool = True) -> list[str]:
    """The names of feature bits, kernel spellings without their prefixes, lowest bit first.

    :param net: of a network card; else only those have names that all devices share.
    """
    table = {
        getattr(module, name): name.partition("_F_")[2]
        for module in ((virtio, virtio_net) if net else (virtio,))
        for name in dir(module)
        if name.startswith(("VIRTIO_NET_F_", "VIRTIO_RING_F_", "VIRTIO_F_"))
    }
    return [table.get(i, f"bit-{i}") for i in range(bits.bit_length()) if bits >> i & 1]
