"""What a data path is: the one interface behind which emulation, vhost-net and vhost-user are alike.

A data path borrows everything: the transport owns the kick and call eventfds, the machine owns guest memory, and ring positions
come in at ``start`` and go back at ``stop``. That is why it can be replaced under a running guest.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Protocol

    from pyvmm.fd import EventFd
    from pyvmm.memory import GuestMemory

    #: Called from a data path's own thread: (queue index or -1 for the whole device, what is wrong).
    FaultHandler = Callable[[int, str], None]
else:
    Protocol = object  # `typing` costs as much as all else that a run imports


class Vring:
    """One virtqueue as handed to a data path; immutable by convention.

    :ivar index: queue number in the device (net: 2k receive, 2k + 1 transmit).
    :ivar size: entries, a power of two up to 32768 (virtio 1.2, 2.7).
    :ivar desc, avail, used: guest-physical addresses.
    :ivar base: next available index, 0..65535 (split ring).
    :ivar kick: guest to device, lent. :ivar call: device to guest, lent.
    """

    __slots__ = ("avail", "base", "call", "desc", "index", "kick", "size", "used")

    def __init__(
        self, index: int, size: int, desc: int, avail: int, used: int, base: int, kick: EventFd, call: EventFd
    ) -> None:
        self.index, self.size, self.base = index, size, base
        self.desc, self.avail, self.used = desc, avail, used
        self.kick, self.call = kick, call


class DataPath(Protocol):
    """A way to move packets between the rings and the outside."""

    name: str
    #: Set by the device before start(): a malformed ring or a dead backend is reported here, once.
    on_fault: FaultHandler | None
    #: Likewise: the outside is gone (False) or back (True).
    on_link: Callable[[bool], None] | None

    def features(self) -> int:
        """The virtio feature bits that this data path can honour."""

    def start(self, acked: int, memory: GuestMemory, rings: Sequence[Vring]) -> None:
        """Take over the rings, all or nothing.

        :param acked: the negotiated feature bits.
        :raises PyvmmError: nothing was started and the rings are untouched.
        """

    def stop(self) -> list[int]:
        """Quiesce: finish what was taken from the rings; return each ring's base, in the order of ``start``.

        No access to guest memory happens after it returns. Idempotent: without a running path it returns [].
        """

    def set_offloads(self, acked: int) -> None:
        """Reprogram offloads from GUEST_* bits while running (VIRTIO_NET_CTRL_GUEST_OFFLOADS_SET)."""

    def counters(self) -> dict[str, int]:
        """Packets, bytes, kicks, calls and drops since creation; keys end in the unit where it is not a count."""

    def close(self) -> None:
        """Release everything; stops first. A second call does nothing."""
