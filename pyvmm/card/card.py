"""A card of the machine, of any kind: a virtio device, its transport, and the thread of its
transitions.
"""

from __future__ import annotations

from pyvmm.errors import HostError
from pyvmm.pci import PciFunction

TYPE_CHECKING = False
if TYPE_CHECKING:
    import threading
    from collections.abc import Callable

    from pyvmm.card.thread import CardThread
    from pyvmm.virtio.mmio import VirtioMmio
    from pyvmm.virtio.pci.transport import VirtioPci
    from pyvmm.virtio.served import ServedDevice


class Card:
    """A virtio device on the bus.

    :param index: its place on the bus: its PCI slot less one.
    :param thread: runs the transitions of ``device``; owned from here on.
    :param lock: the machine's I/O lock.
    :ivar leaving: the card is off the bus and on its way out.
    """

    device: ServedDevice

    def __init__(
        self,
        index: int,
        device: ServedDevice,
        transport: VirtioPci | VirtioMmio,
        thread: CardThread,
        lock: threading.RLock,
    ) -> None:
        self.index, self.device, self.transport = index, device, transport
        self._thread = thread
        self._lock = lock
        self._over = self._stuck = False
        self.leaving = False

    @property
    def name(self) -> str:
        """The device's name."""
        return self.device.name

    @property
    def slot(self) -> int | None:
        """The card's slot of PCI bus 0; None for a card over MMIO."""
        return self.transport.slot if isinstance(self.transport, PciFunction) else None

    def set_paused(self, on: bool) -> None:
        """The machine is paused: nothing of the card writes to guest memory until it goes on. Any
        thread but a vCPU's, without the I/O lock.

        :raises PyvmmError: the data path does not start again, or the machine ends.
        """
        self._last_call(lambda: self.device.set_paused(on))

    def reset(self) -> None:
        """The machine starts over: back to the state after power-on. No vCPU runs; threads as with
        ``set_paused``.

        :raises HostError: the machine ends.
        """
        with self._lock:
            if not self.leaving:
                self.device.reset()
        self._last_call(lambda: None)  # which comes after the reset

    def leave(self) -> None:
        """The card is off the bus: its data path is about to stop. The I/O lock is held."""
        self.leaving = True
        self.device.reset()

    def stop(self) -> None:
        """The machine ends: take the rings from the data path, for good. No vCPU runs any more;
        threads as with ``set_paused``.

        :raises PyvmmError: the data path did not stop in order.
        """
        self._last_call(self.device.park)

    def _last_call(self, job: Callable[[], None]) -> None:
        """A transition of the whole machine, which finds a card at rest whose removal has come
        first.
        """
        try:
            self._thread.call(job)
        except HostError:
            if not self.leaving:
                raise

    def cut(self) -> None:
        """The machine ends: no conversation with another process goes on, and none begins. Any
        thread; takes no lock that a conversation holds.
        """
        self._over = True
        self.device.datapath.cut()
        self._thread.cut()

    def close(self) -> None:
        """End the card's thread. A second call does nothing.

        :raises HostError: a job of the card goes on although its conversations have been cut. Then
            the data path is left alone for good.
        """
        self._over = True
        if not self._thread.end() and not self._stuck:
            self._stuck = True
            self.device.abandon()
            raise HostError(f"{self.name}: the data path does not let go")
