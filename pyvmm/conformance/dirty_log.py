"""The log of a migration (vhost-user, LOG_SHMFD), as a front-end has it: which pages of the guest's
memory the back-end says it has written.
"""

from __future__ import annotations

import mmap
import struct

from pyvmm.fd import Closing, memfd
from pyvmm.spec import vhost_user as spec

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from pyvmm.memory import GuestMemory
    from pyvmm.vhostuser.session import Session, Virtqueue


def page(gpa: int) -> int:
    """The address of the page in which ``gpa`` lies."""
    return gpa & -spec.VHOST_LOG_PAGE


class FrontendLog(Closing):
    """A bitmap for all pages of ``memory``, in a file that can be shared."""

    def __init__(self, memory: GuestMemory) -> None:
        self._memory = memory
        end = max(r.gpa + r.size for r in memory.regions)
        pages = -(-end // (8 * spec.VHOST_LOG_PAGE * mmap.PAGESIZE))
        self.size = pages * mmap.PAGESIZE
        self._file = memfd("pyvmm-log", self.size)
        self._map = mmap.mmap(self._file.fileno(), self.size)

    def start(self, s: Session, acked: int, rings: Sequence[Virtqueue]) -> None:
        """Called in a conversation, while the back-end serves ``rings``: have it mark the pages
        that it writes from now on, the used rings' included. The messages are QEMU's, in its order.

        :param acked: the driver's features. :raises VhostUserError: the back-end fails or refuses.
        """
        log = struct.pack(spec.LOG, self.size, 0)
        s.ask(spec.VHOST_USER_SET_LOG_BASE, log, [self._file.fileno()]).close()
        s.choose_features(acked | 1 << spec.VHOST_F_LOG_ALL)
        for ring in rings:
            s.place_ring(ring, self._memory, log=ring.used)
        s.settle()

    def pages(self) -> set[int]:
        """The addresses of the pages that are marked."""
        marks = int.from_bytes(self._map[:], "little")
        size = spec.VHOST_LOG_PAGE
        return {i * size for i in range(marks.bit_length()) if marks >> i & 1}

    def close(self) -> None:
        """Release the file. A back-end may still have it."""
        self._map.close()
        self._file.close()
