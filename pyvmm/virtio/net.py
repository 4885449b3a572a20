"""The virtio network device (virtio 1.2, 5.1): configuration space and features.

It does not know which data path moves its packets.
"""

from __future__ import annotations

from pyvmm.spec.virtio import VIRTIO_F_VERSION_1, VIRTIO_ID_NET
from pyvmm.spec.virtio_net import (
    VIRTIO_NET_F_MAC,
    VIRTIO_NET_F_MTU,
    VIRTIO_NET_F_STATUS,
    VIRTIO_NET_S_LINK_UP,
)
from pyvmm.virtio.device import VirtioDevice

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pyvmm.datapath.base import DataPath, Vring
    from pyvmm.memory import GuestMemory

PCI_CLASS_NETWORK_ETHERNET = 0x020000
#: Entries a queue, as QEMU's default.
QUEUE_SIZE = 256


class NetDevice(VirtioDevice):
    """A network card with one queue pair.

    :param datapath: moves the packets; owned from here on.
    :param mac: 6 bytes. :param mtu: bytes, offered to the guest, or None.
    :param without: feature bits (a mask) not to offer although the data path could.
    :ivar link_up: what the guest is told of the link.
    """

    device_id = VIRTIO_ID_NET

    def __init__(
        self,
        name: str,
        memory: GuestMemory,
        datapath: DataPath,
        mac: bytes,
        *,
        mtu: int | None = None,
        queue_size: int = QUEUE_SIZE,
        without: int = 0,
    ) -> None:
        super().__init__(name, memory, [queue_size, queue_size])
        self.datapath = datapath
        self.mac = mac
        self.mtu = mtu
        self.link_up = True
        own = 1 << VIRTIO_F_VERSION_1 | 1 << VIRTIO_NET_F_MAC | 1 << VIRTIO_NET_F_STATUS
        if mtu is not None:
            own |= 1 << VIRTIO_NET_F_MTU
        self._offered = own | datapath.features() & ~without
        #: What was negotiated last, kept over a reset for the report.
        self.negotiated = 0
        datapath.on_fault = self.fault
        datapath.on_link = self.set_link

    def offered(self) -> int:
        """The device's own features and what the data path can honour."""
        return self._offered

    def config_space(self) -> bytes:
        """struct virtio_net_config as far as its features go (5.1.4)."""
        status = VIRTIO_NET_S_LINK_UP if self.link_up else 0
        mtu = self.mtu or 0
        return self.mac + status.to_bytes(2, "little") + (1).to_bytes(2, "little") + mtu.to_bytes(2, "little")

    def set_link(self, up: bool) -> None:
        """Tell the guest that the cable was plugged or pulled. Any thread."""
        if up != self.link_up:
            self.link_up = up
            self.config_changed()

    def activate(self, rings: list[Vring]) -> None:
        """Hand the rings to the data path."""
        self.negotiated = self.driver_features
        self.datapath.start(self.driver_features, self.memory, rings)

    def deactivate(self) -> None:
        """Take them back."""
        self.datapath.stop()

    def close(self) -> None:
        """Stop and release the data path, too."""
        super().close()
        self.datapath.close()
