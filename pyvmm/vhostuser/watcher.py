"""The watcher keeps a session with a back-end: it makes one connection after another.

``connect`` makes the first session, in the caller's thread. From then on the watcher's thread
notices when the session ends, and makes the next one. It may take long, because it holds no lock
while it connects and negotiates; only ``cut`` ends that.

A negotiated session is offered to the owner (``Owner.resume``), which goes on with it. Only this
thread waits for a session's descriptors, so only this thread closes them; other threads only cut
the connection.
"""

from __future__ import annotations

import threading
import time

from pyvmm.errors import HostError, PyvmmError, VhostUserError
from pyvmm.fd import EventFd
from pyvmm.spec.vhost_user import VHOST_USER_BACKEND_CONFIG_CHANGE_MSG
from pyvmm.threads import Thread, report_bug
from pyvmm.vhostuser.session import Session
from pyvmm.vhostuser.wire import Closed, Stopped, Stranger, readable

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any, Protocol

    from pyvmm.vhostuser.connect import Connector
    from pyvmm.vhostuser.history import BackendHistory
    from pyvmm.vhostuser.wire import Channel

    class Owner(Protocol):
        """The object that uses the back-end. Its methods are called in the watcher's thread;
        ``negotiate`` also in the thread that calls ``connect``.
        """

        def negotiate(self, s: Session) -> None:
            """Agree with a back-end that has connected. :raises PyvmmError: it does not fit."""

        def resume(self, s: Session) -> None:
            """A back-end has come back: go on with it, and ``adopt`` its session.

            :raises PyvmmError: that failed.
            """

        def speaks(self, s: Session) -> None:
            """The connection has something to read, or has ended. Call ``lose`` if that ends the
            session.
            """

        def ring_error(self, ring: int) -> None:
            """The back-end has found a ring malformed."""

        def config_changes(self, s: Session) -> None:
            """The back-end says that the device's configuration has changed. Call ``lose`` if what
            follows ends the session.
            """

        def failed(self, error: Exception) -> None:
            """A bug: the watcher's thread has met an exception, and goes on without a session."""


#: Seconds between attempts to connect again: the first, doubled each time up to the second.
RETRY, RETRY_MAX = 0.01, 1.0
#: The longest such pause before the first connection, because the caller waits for it.
FIRST_RETRY_MAX = 0.2


class Watcher:
    """Keeps one session at a time.

    :param connector: makes connections; owned from here on. :param owner: see there.
    :param errs: eventfds by ring index, by which back-ends report malformed rings; lent.
    :param recorder: a ``kvm.recorder.Scope`` for every message, or None.
    :ivar session: the session in use; None while there is none.
    """

    def __init__(
        self,
        connector: Connector,
        owner: Owner,
        errs: Sequence[EventFd],
        history: BackendHistory,
        recorder: Any,
    ) -> None:
        self._connector, self._owner, self._errs = connector, owner, errs
        self._history, self._recorder = history, recorder
        self._thread: threading.Thread | None = None
        self._state = threading.Lock()  # held for a few instructions; guards:
        self.session: Session | None = None
        self._candidate: Session | None = None  # not adopted yet
        self._over = False
        self._end = EventFd()  # readable after ``cut``

    def connect(self, wait: float) -> Session:
        """Make the first session. A back-end that does not fit is an error at once.

        :param wait: seconds for a connection.
        :raises VhostUserError: there is no back-end, or it does not fit. :raises Stopped: ``cut``
            was called.
        :raises HostError: no thread can be started.
        """
        until, delay = time.monotonic() + wait, RETRY
        while True:
            left = max(0.0, until - time.monotonic())
            try:
                channel = self._connector.connect(left, self._end.fileno())
                break
            except (Stopped, Stranger):
                raise
            except VhostUserError:
                if time.monotonic() >= until:
                    raise
            readable([self._end.fileno()], min(delay, left))
            delay = min(2 * delay, FIRST_RETRY_MAX)
        s = self._negotiate(channel)
        self.adopt(s)
        thread = Thread(target=self._watch, args=(s,), name="vhost-user", daemon=True)
        try:
            thread.start()
        except RuntimeError as e:
            s.close()
            raise HostError(f"cannot start a thread: {e}", "raise the limit of processes") from e
        self._thread = thread
        return s

    def _negotiate(self, channel: Channel) -> Session:
        """Make a candidate from a connection.

        :raises PyvmmError: this back-end does not fit; the channel is closed.
        """
        s = Session(channel, self._connector.name)
        channel.recorder = self._recorder
        with self._state:
            self._candidate = s
            if self._over:
                s.cut()
        try:
            self._owner.negotiate(s)
        except BaseException:
            self._reject(s)
            raise
        self._history.count("connections")
        return s

    def adopt(self, s: Session) -> None:
        """Use the candidate as the session from now on."""
        with self._state:
            self.session, self._candidate = s, None

    def _reject(self, s: Session) -> None:
        with self._state:
            self._candidate = None
        s.close()

    # --- any thread -------------------------------------------------------------------------------

    def lose(self, s: Session) -> bool:
        """End the session; returns whether it was the present one. The watcher makes the next."""
        with self._state:
            if self.session is not s:
                return False
            self.session = None
        s.cut()  # this wakes the watcher
        return True

    def drop(self) -> None:
        """End the present session, as if the connection had failed."""
        with self._state:
            if self.session is not None:
                self.session.cut()

    def cut(self) -> None:
        """End every conversation and every wait at once, and allow no other. Takes no lock that a
        conversation holds.
        """
        with self._state:
            if self._over:
                return
            self._over = True
            self._end.signal()
            for s in (self.session, self._candidate):
                if s is not None:
                    s.cut()

    def close(self) -> None:
        """End the thread and release everything. Call it once, when no thread uses a session."""
        self.cut()
        if self._thread is not None:
            self._thread.join()
        self._connector.close()
        self._end.close()

    # --- the thread -------------------------------------------------------------------------------

    def _watch(self, first: Session) -> None:
        s: Session | None = first
        delay = RETRY
        while not self._over:
            waits = self._connector.waits
            try:
                if s is not None:
                    if not self._listen(s):
                        s.close()
                        s = None
                    continue
                s = self._reconnect()
            except Exception as e:
                self._bug(s, e)
                s, waits = None, False
            if s is not None:
                delay = RETRY
            elif not waits:
                readable([self._end.fileno()], delay)
                delay = min(2 * delay, RETRY_MAX)
        if s is not None:
            self._owner.speaks(s)  # the session was ended by ``cut``
            s.close()

    def _bug(self, s: Session | None, error: Exception) -> None:
        """An exception in this thread, which has to go on."""
        report_bug(error)
        if s is not None:
            self.lose(s)
            s.close()
        self._owner.failed(error)

    def _listen(self, s: Session) -> bool:
        """Wait for an event on a connection that should be silent; returns whether the session
        goes on.
        """
        requests = s.requests
        fds = [self._end.fileno(), s.channel.fileno(), *(err.fileno() for err in self._errs)]
        if requests is not None:
            fds.append(requests.fileno())
        ready = readable(fds, None)
        for ring, err in enumerate(self._errs):
            if err.fileno() in ready:
                err.drain()
                self._owner.ring_error(ring)
        if requests is not None and requests.fileno() in ready:
            self._serve_request(s)
        if s.channel.fileno() in ready:
            self._owner.speaks(s)
        return self.session is s

    def _serve_request(self, s: Session) -> None:
        """Answer a request of the back-end. A bad request ends the channel for requests only."""
        try:
            request = s.serve_request()
            self._history.count("backend_requests")
        except Closed:
            s.close_requests()
        except PyvmmError as e:
            self._history.note(f"the back-end's own channel is closed: {e}")
            s.close_requests()
        else:
            # Only now: a back-end that waits for the answer does not serve our questions meanwhile.
            if request == VHOST_USER_BACKEND_CONFIG_CHANGE_MSG:
                self._owner.config_changes(s)

    def _reconnect(self) -> Session | None:
        """Try once to have a session again, and to resume with it."""
        try:
            channel = self._connector.connect(None, self._end.fileno())
        except Stranger as e:
            self._history.count("refusals")
            self._history.note(f"not resumed: {e}")
            return None
        except PyvmmError:
            return None  # the back-end is not there yet
        finally:
            self._history.note(*self._connector.complaints())
        try:
            s = self._negotiate(channel)
            try:
                self._owner.resume(s)
            except BaseException:
                self._reject(s)
                raise
        except PyvmmError as e:
            if not isinstance(e, Stopped):
                self._history.count("refusals")
                self._history.note(f"not resumed: {e}")
            return None
        return s
