"""In the place of a file system whose back-end has gone: every request of the guest fails with
EIO.
"""

from __future__ import annotations

import errno
import struct

from pyvmm.virtio.dead import DeadDevice

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pyvmm.virtio.queue import Chain

# linux/fuse.h: struct fuse_in_header (len, opcode, unique, and more), struct fuse_out_header
IN_HEAD, OUT_HEAD = "<IIQ", "<IiQ"


class DeadFs(DeadDevice):
    """See ``DeadDevice``."""

    kind = "a file system"
    #: 256 pages (FUSE_MAX_MAX_PAGES) and headers.
    request_max = (1 << 20) + 4096

    def refuse(self, chain: Chain) -> int:
        """An error, if the request takes an answer."""
        if not chain.room or len(chain.request) < struct.calcsize(IN_HEAD):
            return 0
        unique = struct.unpack_from(IN_HEAD, chain.request)[2]
        size = struct.calcsize(OUT_HEAD)
        return chain.reply(struct.pack(OUT_HEAD, size, -errno.EIO, unique))
