"""In the place of a disk whose back-end has gone: every request of the guest fails."""

from __future__ import annotations

from pyvmm.virtio.dead import DeadDevice

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pyvmm.virtio.queue import Chain

VIRTIO_BLK_S_IOERR = 1  # virtio 1.2, 5.2.6


class DeadDisk(DeadDevice):
    """See ``DeadDevice``."""

    kind = "a disk"

    def refuse(self, chain: Chain) -> int:
        """The status is the last byte; what comes before it stays as it is."""
        chain.reply_last(VIRTIO_BLK_S_IOERR)
        return chain.room if chain.room == 1 else 0
