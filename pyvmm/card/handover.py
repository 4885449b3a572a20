"""The hand-over of a card's virtqueues from one data path to another under a running guest
(docs/switch.md).

Theory of operation. Every path leaves a ring with its position equal to the used index: no chain is
in anybody's hands. So the used index in guest memory is also where to go on after a path that
failed (a packed ring has no such index: then the guest has to reset the device), and ``start`` of
one path after ``stop`` of another is the whole hand-over. The guest sees a pause. The steps are:
move (only if frames are to enter elsewhere), park, start; if the new path does not start, roll back
to the old one; if that does not start either, fall back to emulation.
"""

from __future__ import annotations

import time

from pyvmm.errors import HostError, PyvmmError
from pyvmm.spec.virtio import VIRTIO_RING_F_EVENT_IDX

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from pyvmm.card.report import SwitchOutcome, SwitchReport
    from pyvmm.card.uplink import Route
    from pyvmm.virtio.net import NetDevice

#: Moving to another place: wait at most ``MOVE_S`` seconds for frames that are still addressed to
#: the old one. The old place counts as drained after ``QUIET_S`` seconds without a frame, or after
#: ``UNSEEN_S`` if we cannot see what waits there.
MOVE_S, QUIET_S, UNSEEN_S = 1.0, 0.01, 0.05


class HandOver:
    """One hand-over; ``run`` once, in the card's thread.

    :param old: in force. :param new: prepared (``DataPath.prepare``), to be in force.
    :param spare: makes a route that works wherever any can (emulation on the card's tap), or raises
        PyvmmError; None if the card has no tap.
    :param report: gets what happened.
    :param patience: seconds that another process has for each of its parts; then it is cut off.
    :param taking: told of a route a moment before its data path serves the rings.
    """

    def __init__(
        self,
        device: NetDevice,
        old: Route,
        new: Route,
        spare: Callable[[], Route] | None,
        report: SwitchReport,
        patience: float,
        taking: Callable[[Route], None],
    ) -> None:
        self._device, self._old, self._new, self._spare = device, old, new, spare
        self._report, self._patience, self._taking = report, patience, taking
        self._indices: list[int] = []  # of the virtqueues that change hands
        self._lost = False  # nobody knows the rings' positions

    def run(self) -> Route:
        """Have the new path serve the rings from where the old one left them.

        :return: the route in force: the new one, the old one, or one that ``spare`` made. The
            caller closes those that are not in force. Only if no path can start, the guest has to
            reset the device.
        :raises UsageError: the new path lacks features that are in use; nothing was touched.
        """
        device, old, new, report = self._device, self._old, self._new, self._report
        device.check(new.path)
        self._indices, since = device.serving, time.monotonic_ns()
        if not self._indices:  # not driven yet, or the cable is pulled: the rings are at rest
            self._taking(new)
            device.use(new.path)
            report.outcome, report.mode = "switched", new.path.name
            return new
        moves = not new.same_place(old)
        if moves:
            with report.step("move"):
                self._move()
        with report.step("park"):
            trouble = self._park()
        report.parked(self._indices, since, old.path.times.asked, self._pending())
        used = self._start(trouble)
        report.mode = used.path.name
        self._wake()
        if moves:  # whichever path goes on, also one that cannot announce without rings
            used.announce(device.mac)
            device.announce()
        return used

    # --- move -------------------------------------------------------------------------------------

    def _move(self) -> None:
        """Frames are to enter and leave at another place.

        A frame of the guest's would have the network go on sending to the old place, so the old
        path stops transmitting. Then the network is told of the new place, and what is under way to
        the old one is received there. Best effort: a failure costs frames that no data path has
        accepted.
        """
        old, new = self._old, self._new
        try:
            old.path.stop_transmit(patience=self._patience)
        except PyvmmError:
            return  # the old path will not stop in order, either
        if new.tap is not None:  # what waits there came while it was not the card's place
            self._report.stale = new.tap.discard()
        if new.announce(self._device.mac):
            self._drain()

    def _drain(self) -> None:
        """Wait until the old place is silent."""
        tap, memory = self._old.tap, self._device.memory
        enough = UNSEEN_S if tap is None else QUIET_S
        start = quiet = time.monotonic()
        receive = [self._device.ring(index) for index in self._indices if index % 2 == 0]
        before: list[bytes] = []
        while (now := time.monotonic()) < start + MOVE_S and now < quiet + enough:
            after = [ring.format.returns(memory, ring) for ring in receive]
            if after != before or (tap is not None and tap.waiting()):
                before, quiet = after, now
            time.sleep(0.001)

    # --- park, and the rings' positions -----------------------------------------------------------

    def _park(self) -> str:
        """Take the rings from the old path. Returns why it did not let go of them in order, or
        nothing; then the used indices are the positions. Without these the rings are lost.
        """
        trouble = ""
        try:
            self._device.park(finish=True, patience=self._patience)
        except Exception as e:  # whatever it is: the rings are at rest all the same
            trouble = self._noted(e)
            if not self._take_used_indices():
                self._device.failed("hand-over", e)
                self._lost = True
        for index in self._indices:
            trouble = trouble or self._check_position(index)
            self._ask_for_kicks(index)
        return trouble

    def _pending(self) -> dict[int, int]:
        """Chains per virtqueue that the guest has made available and nobody has taken."""
        pending = {}
        for index in self._indices:
            ring = self._device.ring(index)
            pending[index] = ring.format.pending(self._device.memory, ring, ring.base)
        return pending

    def _take_used_indices(self) -> bool:
        """Make the used indices the positions: a path that failed leaves these behind, too. False
        for packed rings, which have none: they keep the positions that a path gave back last.
        """
        for index in self._indices:
            ring = self._device.ring(index)
            used = ring.format.returned(self._device.memory, ring)
            if used is None:
                return False
            self._device.set_position(index, used)
        return True

    def _check_position(self, index: int) -> str:
        """Returns what is wrong if the old path still had chains in its hands. Receive chains may
        be taken back: they are empty.
        """
        ring, memory = self._device.ring(index), self._device.memory
        if not ring.format.held(memory, ring, ring.base):
            return ""
        used = ring.format.give_back(memory, ring, ring.base)
        if index % 2 == 0:
            self._device.set_position(index, used)
            return ""
        words = ring.format.words
        return f"queue {index} stopped at {words(ring.base)} with {words(used)} returned"

    def _ask_for_kicks(self, index: int) -> None:
        """Have the driver kick (virtio 1.2, 2.7.8 and 2.7.10), whatever the old path told it: kicks
        gather in the eventfd until the next path looks.
        """
        ring, memory = self._device.ring(index), self._device.memory
        event_idx = bool(self._device.in_force >> VIRTIO_RING_F_EVENT_IDX & 1)
        ring.format.ask_for_kicks(memory, ring, ring.base, event_idx=event_idx)

    # --- start, roll back, fall back --------------------------------------------------------------

    def _start(self, trouble: str) -> Route:
        """Start the new path; if the old one did not stop in order, or the new one does not start,
        roll back; if that fails, fall back to emulation. Returns the route in force.
        """
        self._report.reason = trouble
        if self._lost:
            self._report.outcome = "failed"
            return self._old
        tries: list[tuple[SwitchOutcome, Callable[[], Route]]] = []
        if not trouble:
            tries.append(("switched", lambda: self._new))
        tries.append(("rolled-back", lambda: self._old))
        if self._spare is not None:
            tries.append(("fallback", self._spare))
        for outcome, make in tries:
            route: Route | None = None
            try:
                route = make()
                with self._report.step(f"start {route.path.name}"):
                    self._take(route)
            except Exception as e:  # whatever it is: first of all somebody has to serve the rings
                why = self._noted(e)
                self._report.reason += f"; {why}" if self._report.reason else why
                if route is not None and route not in (self._old, self._new):
                    route.path.close()
                self._take_used_indices()
                continue
            self._report.outcome = outcome
            return route
        self._report.outcome = self._last_resort()
        return self._old

    def _take(self, route: Route) -> None:
        """Start the route's path on the rings.

        :raises PyvmmError: the path does not serve them; it has let go of them.
        """
        device, path = self._device, route.path
        self._taking(route)
        device.use(path)
        device.resume(hold=True, patience=self._patience)
        problem = path.problem()
        if problem:
            device.park(patience=self._patience)
            raise HostError(f"{path.name}: {problem}")
        device.release_faults()

    def _last_resort(self) -> SwitchOutcome:
        """No path serves the rings. A vhost-user path may yet find a back-end, so start the old one
        and let it look.
        """
        self._taking(self._old)
        self._device.use(self._old.path)
        try:
            self._device.resume(patience=self._patience)
        except Exception as e:
            self._device.failed("hand-over", e)
            return "failed"
        return "rolled-back"

    def _wake(self) -> None:
        """Have both sides look: the old path may have swallowed a kick, or owe a call. A spurious
        interrupt is harmless.
        """
        for index in self._indices:
            ring = self._device.ring(index)
            ring.kick.nudge()
            ring.call.nudge()

    def _noted(self, error: Exception) -> str:
        """The error in words, for the reason; a bug of ours leaves its traceback, too."""
        if isinstance(error, PyvmmError):
            return str(error)
        import traceback  # here: no machine should pay for it at its start

        self._report.traceback += "".join(traceback.format_exception(error))
        return f"{type(error).__name__}: {error}"
