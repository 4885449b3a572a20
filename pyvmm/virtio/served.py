"""A virtio device whose virtqueues a data path serves, whatever the kind of device and of path: it
starts, parks and resumes them, and remembers their positions.

What is said to the data path is said in jobs, so that rings, positions and ``datapath`` belong to
the thread that runs jobs. Other threads may look at the attributes.
"""

from __future__ import annotations

import time

from pyvmm.virtio.device import VirtioDevice
from pyvmm.virtio.listener import PathListener

TYPE_CHECKING = False
if TYPE_CHECKING:
    import threading
    from collections.abc import Sequence

    from pyvmm.datapath.base import RingServer, Vring
    from pyvmm.memory import GuestMemory
    from pyvmm.virtio.device import Jobs


class ServedDevice(VirtioDevice):
    """Base of devices with a data path. A subclass may override ``before_start``, ``started``,
    ``before_stop``, ``stopped`` and ``gone_on``.

    :param datapath: serves the virtqueues; owned from here on.
    :param queue_sizes, jobs, lock: see ``VirtioDevice``. :ivar datapath: in force.
    """

    def __init__(
        self,
        name: str,
        memory: GuestMemory,
        queue_sizes: list[int],
        datapath: RingServer,
        *,
        jobs: Jobs | None = None,
        lock: threading.RLock | None = None,
    ) -> None:
        super().__init__(name, memory, queue_sizes, jobs=jobs, lock=lock)
        self.datapath = datapath
        self._held: set[str] = set()  # why nothing may touch guest memory
        self._driven = False  # from activate to deactivate
        self._listener: PathListener | None = None
        self._rings: dict[int, Vring] = {}
        self._serving: list[int] = []

    # --- for subclasses ---------------------------------------------------------------------------

    @property
    def rings(self) -> list[Vring]:
        """The rings for the data path, lowest index first."""
        return [ring for _, ring in sorted(self._rings.items())]

    @property
    def in_force(self) -> int:
        """The negotiated features as the data path gets them."""
        return self.driver_features

    def before_start(self, rings: Sequence[Vring], acked: int) -> None:
        """The data path is about to start on these rings.

        :raises PyvmmError: it cannot.
        """

    def started(self) -> None:
        """The data path serves the virtqueues."""

    def before_stop(self) -> None:
        """The data path is about to be stopped, if it runs."""

    def stopped(self) -> None:
        """The data path has let go of the virtqueues."""

    def gone_on(self) -> None:
        """The device goes on after its start, or after something has held the rings."""

    def link(self, up: bool) -> None:
        """The interface behind the data path is gone, or back. Any thread. Few devices have one."""

    # --- what holds the rings ---------------------------------------------------------------------

    def set_paused(self, on: bool) -> None:
        """In a job: the machine is paused, so park the rings, and nothing writes to guest memory;
        or it goes on, and so do the rings.

        :raises PyvmmError: the data path does not start again; the driver has to reset the device.
        """
        try:
            self._hold("the machine is paused", on)
        except Exception as e:
            self.failed("pause", e)
            raise

    def mastering_changed(self) -> None:
        """Park the rings while the bus does not let the device access memory (PCI 3.0, 6.2.2)."""
        self._hold("bus mastering is off", not self.mastering)

    def _hold(self, reason: str, on: bool) -> None:
        """Park the rings for a reason, the device's own included; or take the reason back. The
        rings go on from where they are once no reason is left.

        :raises PyvmmError: the path did not stop in order, or does not start again.
        """
        if on == (reason in self._held):
            return
        if on:
            self._held.add(reason)
            self.park()
            return
        self._held.remove(reason)
        if self._driven:
            self.resume()
            self.gone_on()

    # --- jobs of the status machine ---------------------------------------------------------------

    def activate(self, rings: list[Vring]) -> None:
        """Hand the rings to the data path."""
        self._rings = {ring.index: ring for ring in rings}
        self._driven = True
        self.resume()
        self.gone_on()

    def stop_ring(self, index: int) -> None:
        """Take all rings from the data path, and give it the others back."""
        self.park()
        self._rings.pop(index, None)
        self.resume()

    def start_ring(self, ring: Vring) -> None:
        """Take all rings from the data path, and give it one more."""
        self.park()
        self._rings[ring.index] = ring
        self.resume()

    def deactivate(self) -> None:
        """Take the rings back."""
        try:
            self.park()
        finally:
            self._driven = False
            self._rings = {}

    # --- the data path ----------------------------------------------------------------------------

    def resume(self, *, hold: bool = False, patience: float | None = None) -> None:
        """In a job: start the data path on its rings, from where they are; unless something holds
        the rings.

        :param hold: keep the path's faults until ``release_faults``.
        :param patience: seconds that another process may take for it.
        :raises PyvmmError: the host's side or the data path refuses.
        """
        if self._held:
            return
        rings, acked = self.rings, self.in_force
        begin = time.monotonic_ns()
        listener = PathListener(self, hold=hold)
        self.before_start(rings, acked)
        self.datapath.start(acked, self.memory, rings, listener, patience=patience)
        self._serving = [ring.index for ring in rings]
        self._listener = listener
        try:
            self.started()
        except BaseException:
            self.park(patience=patience)  # the path runs, and knows where the rings are by now
            raise
        if self.recorder is not None:
            self.recorder.step("start", begin, {"rings": rings})

    def release_faults(self) -> None:
        """Pass on the faults that ``resume(hold=True)`` keeps."""
        if self._listener is not None:
            self._listener.release()

    def park(self, *, finish: bool = False, patience: float | None = None) -> None:
        """In a job: stop the data path; the rings remember their positions. See
        ``RingServer.stop``.

        :raises PyvmmError: the path did not stop in order; positions are as they were at the start.
        """
        serving, self._serving = self._serving, []
        listener, self._listener = self._listener, None
        begin = time.monotonic_ns()
        try:
            try:
                self.before_stop()
            finally:  # whatever it raises, nothing may touch guest memory from here on
                bases = self.datapath.stop(finish=finish, patience=patience)
                for index, base in zip(serving, bases, strict=False):
                    self.set_position(index, base)
        finally:
            if listener is not None:
                listener.end()
            if serving:
                self.stopped()
        if self.recorder is not None and serving:
            self.recorder.step("stop", begin, {"bases": bases})

    def replace(self, path: RingServer) -> None:
        """In a job: have another data path go on where the present one, which the caller owns, has
        left the rings.

        :raises PyvmmError: nobody knows where that is, or ``path`` does not start.
        """
        try:
            self.park()
        finally:
            self.datapath = path
        if self._driven:
            self.resume()

    @property
    def serving(self) -> list[int]:
        """Indices of the virtqueues that the data path has been started on, lowest first."""
        return list(self._serving)

    def ring(self, index: int) -> Vring:
        """Virtqueue ``index`` at its latest position at rest."""
        return self._rings[index]

    def set_position(self, index: int, base: int) -> None:
        """Let the next start of virtqueue ``index`` be from ``base`` on."""
        self._rings[index] = self._rings[index].at(base)

    def close(self) -> None:
        """Stop and release the data path, too."""
        super().close()
        if not self._abandoned:
            self.datapath.close()
