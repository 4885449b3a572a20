"""A virtio device whose rings a vhost-user back-end serves, over one connection after another: the
front-end's part that is the same for every kind of device.

Theory of operation. A session (``pyvmm.vhostuser.session``) is one connection, and the watcher
(``pyvmm.vhostuser.watcher``) makes one after another. While there is none the rings are parked:
kicks gather in the eventfds, and the guest sees a pause. A new session starts at the used index of
each ring. That is exact with an in-flight file, which we keep for the next back-end; without one,
chains that were served but not yet returned are served again.

A thread that talks to the back-end in use, or changes which rings it serves, holds ``_turn``. A
conversation has a time limit. The watcher takes ``_turn`` only to give the rings to a back-end that
has come back, and ``stop`` cuts that conversation short. ``cut`` takes no lock that a conversation
holds, and neither do the methods that any thread may call.

The back-end cannot end the machine. It can corrupt the guest, whose memory it has, but its messages
and its silence end at most its connection.
"""

from __future__ import annotations

import threading
from contextlib import contextmanager, suppress

from pyvmm.errors import PyvmmError, VhostUserError
from pyvmm.spec.virtio import VIRTIO_F_RING_PACKED, VIRTIO_F_VERSION_1
from pyvmm.vhostuser.history import BackendHistory
from pyvmm.vhostuser.rings import RingSet
from pyvmm.vhostuser.session import PROTOCOL_FEATURES, Refused
from pyvmm.vhostuser.watcher import Watcher
from pyvmm.vhostuser.wire import Stopped, TimedOut, protocol_names

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence
    from typing import Any, Protocol

    from pyvmm.memory import GuestMemory
    from pyvmm.vhostuser.connect import Connector
    from pyvmm.vhostuser.rings import Times
    from pyvmm.vhostuser.session import Session, Virtqueue

    class FaultEvents(Protocol):
        """Takes what a back-end reports about rings; any thread."""

        def fault(self, queue: int, problem: str) -> None:
            """The back-end has found ring ``queue`` malformed."""


#: Memory regions that a guest may have: below and above the PCI hole.
REGIONS = 2


class VhostUserDevice:
    """The rings of one device, and the back-end that serves them. A kind of device, such as
    ``datapath.vhost_user.VhostUserNet``, overrides what the second section lists.

    ``connect``, ``prepare``, ``start``, ``stop``, ``stop_rings`` and ``close`` are called by one
    thread at a time; the other methods by any thread.

    :param connector: makes connections; owned from here on. :param rings: how many the device can
        have.
    :param times: is told when rings change hands.
    :param timeout: seconds for a whole conversation, such as a start or a stop of the rings.
    :param recorder: a ``kvm.recorder.Scope`` for every message, or None.
    """

    #: Mask of the virtio features that the back-end honours; the device honours all others.
    data_features: int = -1
    #: Mask of the protocol features to use if the back-end has them.
    protocol_features: int = PROTOCOL_FEATURES

    def __init__(
        self,
        connector: Connector,
        rings: int,
        times: Times,
        *,
        timeout: float = 5.0,
        recorder: Any = None,
    ) -> None:
        self.times, self.timeout = times, timeout
        self._name = connector.name
        self._complaints = connector.complaints
        self._history = BackendHistory()
        self._offer = self._required = 0
        self._closed = False

        self._turn = threading.Lock()
        self._state = threading.Lock()  # held for a few instructions; guards:
        self._resuming: Session | None = None  # the rings are being given to this session
        self._stopping = False  # ``stop`` is about to take the rings back
        self._events: FaultEvents | None = None
        self._faulted: set[int] = set()
        self._lost: VhostUserError | None = None  # why nobody knows the rings' positions

        try:
            self._rings = RingSet(rings, times, self._history)
            try:
                self._watcher = Watcher(connector, self, self._rings.errs, self._history, recorder)
            except BaseException:
                self._rings.close()
                raise
        except BaseException:
            connector.close()
            raise

    # --- what a kind of device adds ---------------------------------------------------------------

    def check_offer(self, s: Session) -> None:
        """:raises VhostUserError: the back-end lacks something that this kind of device needs."""

    def introduce(self, s: Session, acked: int) -> None:
        """Called in a conversation: send what must come before features and memory."""

    def resumed(self, s: Session) -> None:
        """Called in a conversation: a new back-end has taken the rings of the one before."""

    def reconfigured(self, s: Session) -> None:
        """Called in a conversation: the back-end says that its configuration has changed."""

    def went(self, reason: PyvmmError) -> None:
        """The back-end has gone. Any thread; must not wait."""

    def repeats(self, ring: Virtqueue) -> bool:
        """Whether a driver may notice that a chain of this ring is served twice."""
        return True

    def feature_names(self, features: int) -> str:
        """A mask of features in words."""
        return f"{features:#x}"

    # --- the back-end that serves (_turn is held) -------------------------------------------------

    @contextmanager
    def _talking(self, s: Session, patience: float | None) -> Iterator[None]:
        """A conversation that is necessary to serve the rings: if it fails, or the back-end refuses
        anything in it, the session is lost.
        """
        try:
            with s.conversation(self.timeout if patience is None else patience):
                yield
        except PyvmmError as e:
            self._lose(s, e)
            raise

    def _introduce(self, s: Session, acked: int, memory: GuestMemory, size: int) -> None:
        """Agree on everything but the rings. No ring has more than ``size`` entries."""
        self.introduce(s, acked)
        chosen = acked & s.features & self.data_features
        if chosen >> VIRTIO_F_RING_PACKED & 1:
            s.choose_features(chosen)  # the size of the notes depends on it
        self._rings.share_inflight(s, size)
        s.choose_features(chosen)
        s.share_memory(memory)

    def _give(self, s: Session, bases: Sequence[int]) -> None:
        """Give memory and rings to the back-end, and let it run. :param bases: the positions."""
        self._check(s)  # the guest may use more features than when the session was negotiated
        rings = self._rings
        agreed = rings.acked, rings.memory, rings.size
        if s.prepared != agreed:
            if s.prepared is not None:
                rings.leave_inflight()  # the file is for rings of another size
            self._introduce(s, *agreed)
        s.prepared = None
        rings.give(s, bases)

    def _lose(self, s: Session, reason: PyvmmError) -> None:
        """The session has ended: park the rings."""
        pending = self._pending()  # now: a driver may make more available once the rings are parked
        if not self._watcher.lose(s):
            return
        if not isinstance(reason, Stopped):  # else we ended it
            self._history.count("disconnections")
            self._history.count("timeouts", isinstance(reason, TimedOut))
            self._history.note(str(reason))
        self._rings.lost()
        self._park(pending)
        if not isinstance(reason, Stopped):
            self.went(reason)

    def _park(self, pending: int) -> None:
        """No back-end serves the rings until one comes back, which may serve ``pending`` chains
        again.
        """
        if not self._rings.rings:
            return
        try:
            self._rings.from_used()
        except VhostUserError as e:
            self._lost = e
            self._rings.rest()
            with self._state:
                events = self._events
            if events is not None:
                events.fault(-1, str(e))
            return
        self._history.parked()
        self._history.count("possible_repeats", pending)

    def _pending(self) -> int:
        """How many chains the next back-end may serve again: the available ones, unless an
        in-flight file tells which of them are done.
        """
        rings = self._rings
        if rings.inflight is not None:
            return 0
        return sum(rings.pending(ring) for ring in rings.rings if self.repeats(ring))

    # --- the device's side ------------------------------------------------------------------------

    def connect(self, wait: float = 10.0) -> None:
        """Make the first session. A back-end that does not fit is an error at once.

        :param wait: seconds for a connection.
        :raises VhostUserError: there is no back-end, or it does not fit. :raises Stopped: ``cut``
            was called.
        :raises HostError: no thread can be started.
        """
        s = self._watcher.connect(wait)
        self._offer = s.features & self.data_features

    def offer(self) -> tuple[int, int | None]:
        """All virtio features that the present back-end offers, as a mask, and its answer to
        GET_QUEUE_NUM; 0 and None if there is no back-end.
        """
        s = self._watcher.session
        return (s.features, s.queue_num) if s is not None else (0, None)

    def features(self) -> int:
        """The features of ``BACKEND_FEATURES`` that the first back-end offered, as a mask."""
        return self._offer

    def prepare(self, acked: int, memory: GuestMemory, rings: Sequence[Virtqueue]) -> None:
        """Agree with the back-end on all that can be agreed on before the start.

        :raises PyvmmError: the back-end refuses, or is gone.
        """
        if not rings:
            return
        with self._turn:
            s = self._watcher.session
            if s is None:
                where = f"the back-end at {self._name}"
                raise VhostUserError(f"{where} is gone", "start it again")
            agreed = acked, memory, max(ring.size for ring in rings)
            with self._talking(s, None):
                self._introduce(s, *agreed)
                s.settle()
            s.prepared = agreed

    def start(
        self,
        acked: int,
        memory: GuestMemory,
        rings: Sequence[Virtqueue],
        events: FaultEvents,
        *,
        patience: float | None = None,
    ) -> None:
        """Have the back-end serve the rings, from their positions. If it is gone or fails, the
        rings are parked until another back-end serves them.

        :param acked: the features that the driver has chosen.
        :param patience: seconds, instead of the device's ``timeout``.
        """
        if not rings:  # the driver has enabled no ring
            return
        with self._turn:
            self._rings.use(acked, memory, rings)
            self._lost = None
            self._required = acked & self.features()
            with self._state:
                self._events, self._faulted = events, set()
            s = self._watcher.session
            if s is None:
                self._park(self._pending())
                return
            try:
                with self._talking(s, patience):
                    self._give(s, [ring.base for ring in rings])
            except PyvmmError:
                pass  # the rings are parked

    def stop_rings(self, indices: Iterable[int], *, patience: float | None = None) -> None:
        """Take some of the rings back; ``stop`` must come next.

        :raises PyvmmError: the back-end does not give the rings.
        """
        with self._turn:
            s = self._watcher.session
            if s is not None:
                with self._talking(s, patience):
                    self._rings.take_some(s, indices)

    def stop(self, *, patience: float | None = None) -> list[int]:
        """Take the rings back. A back-end that does not give them is disconnected; the used indices
        are then the positions.

        :returns: the rings' positions, in the order of ``start``; empty if no ring was started.
        :raises VhostUserError: a back-end has gone, and nobody knows how far it was.
        """
        with self._state:
            self._stopping = True
            if self._resuming is not None:
                self._resuming.cut()  # the watcher starts the rings that we are about to stop
        with self._turn:
            with self._state:
                self._stopping = False
            if not self._rings.rings and self._lost is None:
                return []
            s = self._watcher.session
            bases: list[int] = []
            if s is not None and self._rings.rings:
                try:
                    with self._talking(s, patience):
                        bases = self._rings.take(s)
                        s.reset()
                except PyvmmError:
                    bases = []
            lost, self._lost = self._lost, None
            if lost is None and not bases:
                bases = self._rings.from_used()
                self._rings.undo()
            self._rings.rest()
            self._required = 0
            self._history.served()
            with self._state:
                self._events = None
            if lost is not None:
                raise lost
        return bases

    def converse(self, say: Callable[[Session], None]) -> bool:
        """Send the back-end messages that do not concern the rings.

        :param say: called in a conversation. :returns: False if there is no back-end.
        :raises Refused: the back-end refuses; the session goes on.
        :raises PyvmmError: the conversation failed, and the session is lost.
        """
        with self._turn:
            s = self._watcher.session
            if s is None:
                return False
            try:
                with s.conversation(self.timeout):
                    say(s)
            except Refused as e:
                self._history.note(str(e))
                raise
            except PyvmmError as e:
                self._lose(s, e)
                raise
        return True

    def drop(self) -> None:
        """End the present session, as if the connection had failed: the watcher makes another
        session. Any thread; never waits.
        """
        self._watcher.drop()

    def cut(self) -> None:
        """End every conversation at once and allow no other, because the machine ends. Any thread;
        takes no lock that a conversation holds.
        """
        self._watcher.cut()

    def close(self) -> None:
        """Stop, disconnect and release everything. A second call does nothing."""
        if self._closed:
            return
        self._closed = True
        with suppress(VhostUserError):
            self.stop()
        self._watcher.close()
        self._rings.close()

    # --- what any thread may ask ------------------------------------------------------------------

    @property
    def problems(self) -> list[str]:
        """The last refusals and losses, in words."""
        return self._history.problems

    @property
    def connected(self) -> bool:
        """Whether there is a session with a back-end."""
        return self._watcher.session is not None

    def problem(self) -> str:
        """Why no back-end serves the rings; empty if one does, or if no ring is started."""
        if not self._rings.rings or self.connected:
            return ""
        return self.problems[-1] if self.problems else "no back-end"

    def counters(self) -> dict[str, int]:
        """The counters of connections, losses and their cost."""
        return self._history.counters()

    def report(self) -> dict[str, object]:
        """The part of the machine's report about the back-end and its problems."""
        self._history.note(*self._complaints())
        s = self._watcher.session
        return {
            "socket": self._name,
            "connected": s is not None,
            "protocol_features": protocol_names(s.protocol) if s is not None else [],
            "inflight": self._rings.inflight is not None,
            "problems": list(self.problems),
        }

    # --- the watcher's owner, in its thread -------------------------------------------------------

    def negotiate(self, s: Session) -> None:
        """Check whether the back-end fits. :raises PyvmmError: it does not."""
        with s.conversation(self.timeout):
            s.negotiate(self.protocol_features)
            self._check(s)

    def _check(self, s: Session) -> None:
        where = f"the back-end at {s.name}"
        if not s.offers(VIRTIO_F_VERSION_1):
            raise VhostUserError(
                f"{where} does not offer VERSION_1", "use a back-end of virtio 1.0 or later"
            )
        missing = self._required & ~s.features
        if missing:
            raise VhostUserError(
                f"{where} lacks features that the guest uses: {self.feature_names(missing)}",
                "start it as it was before",
            )
        if s.slots < REGIONS:
            raise VhostUserError(
                f"{where} takes {s.slots} memory regions, and {REGIONS} are needed"
            )
        self.check_offer(s)

    def resume(self, s: Session) -> None:
        """Give the rings that wait for a back-end to one that has come back.

        :raises PyvmmError: the back-end does not take them.
        """
        with self._turn:
            with self._state:
                if self._rings.rings and not self._stopping:
                    self._resuming = s
            try:
                if self._resuming is not None:
                    with s.conversation(self.timeout):
                        self._give(s, self._rings.from_used())
                        self.resumed(s)
                    for ring in self._rings.rings:
                        # The old back-end may have returned chains without a call.
                        ring.call.nudge()
            finally:
                with self._state:
                    self._resuming = None
            self._watcher.adopt(s)
            self._history.served()

    def speaks(self, s: Session) -> None:
        """The back-end sends something, or has gone. Outside of a conversation both end the
        session.
        """
        with self._turn:  # an answer for another thread has been taken by then
            if self._watcher.session is s:
                try:
                    s.check_silence()
                except PyvmmError as e:
                    self._lose(s, e)

    def config_changes(self, s: Session) -> None:
        """The back-end says that the configuration has changed."""
        with self._turn:
            if self._watcher.session is not s:
                return
            try:
                with s.conversation(self.timeout):
                    self.reconfigured(s)
            except Refused as e:
                self._history.note(str(e))
            except PyvmmError as e:
                self._lose(s, e)

    def failed(self, error: Exception) -> None:
        """A bug in the watcher's thread; the session is lost."""
        self._history.count("disconnections")
        problem = f"vhost-user: {type(error).__name__}: {error}"
        self._history.note(problem)
        with self._state:
            events = self._events
        if events is not None:
            events.fault(-1, problem)

    def ring_error(self, ring: int) -> None:
        """The back-end has found a ring malformed. This is reported once per start."""
        self._history.count("ring_errors")
        with self._state:
            events = self._events if ring not in self._faulted else None
            self._faulted.add(ring)
        if events is not None:
            events.fault(ring, f"queue {ring}: the vhost-user back-end has found it malformed")
