"""The channel to our init, by which the machine starts commands in the running guest: sessions
(``guest/pyvmm_port.h`` has the protocol).

Theory of operation: a session has two ends, the guest and whoever has opened it (``Machine.run``,
or a client of the control socket). Both send frames. A frame for the guest waits here in a form
that cannot grow: a counter, a flag, or bytes for which the guest has given credit. A byte on the
second serial port tells init that there is something, and the next reads of the register fetch it,
up to 64 KiB with one exit. A sleep of the machine loses what is in the port, so a thread rings
again each second until init comes, and then ends. What the guest sends waits likewise, within the
credit that its reader has given. So each stream of each session stands still by itself if nobody
takes it.

The guest is not trusted. Who sends more than it has credit for loses the session; a frame that
makes no sense is ignored.
"""

from __future__ import annotations

import struct
import threading
import time

from pyvmm.bus import PIO, Bus
from pyvmm.devices.guest_frames import FRAME, FRAME_MAX, PAGE, TWO, BadFrame, frame, parse
from pyvmm.errors import CommandFailed, GuestReboot
from pyvmm.fd import Closing, EventFd
from pyvmm.spec.platform import (
    BELL_CHANNEL,
    CHANNEL_PAGES,
    CHANNEL_WINDOW,
    FRAME_CLOSE,
    FRAME_CREDIT,
    FRAME_ERROR,
    FRAME_EXIT,
    FRAME_FAILED,
    FRAME_INPUT,
    FRAME_LEAVE,
    FRAME_OPEN,
    FRAME_OUTPUT,
    FRAME_SIGNAL,
    FRAME_SIZE,
    FRAME_START,
    GUEST_ANSWERS,
    PORT_GUEST_CHANNEL,
)
from pyvmm.threads import Thread

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from pyvmm.memory import GuestMemory

DESCRIPTION_MAX = 4 << 20  # bytes
SESSIONS_MAX = 64
SIGNALS_MAX = 64  # signals that wait for the guest; further ones are dropped
SIGNAL_MAX = 64  # the largest number of a signal
REMIND_S = CHECK_S = 1.0
STREAMS = (FRAME_OUTPUT, FRAME_ERROR)


class Pages:
    """The pages of guest memory that init has named for frames. The guest may name any address; a
    page outside of RAM can be neither read nor written.
    """

    def __init__(self, memory: GuestMemory) -> None:
        self._memory = memory
        self._addresses: list[int] = []  # guest-physical

    def name(self, number: int) -> bool:
        """Read the list in the page with this page frame number, and answer; returns whether the
        list makes sense.
        """
        self._addresses = []
        address = number << 12
        try:
            count, *frames = struct.unpack(
                f"<{1 + CHANNEL_PAGES}I", self._memory.read(address, 4 * (1 + CHANNEL_PAGES))
            )
            if not 0 < count <= CHANNEL_PAGES:
                return False
            self._memory.write(address, GUEST_ANSWERS.to_bytes(4, "little"))
        except IndexError:
            return False
        self._addresses = [frame << 12 for frame in frames[:count]]
        return True

    def forget(self) -> None:
        """There are no pages any more."""
        self._addresses = []

    @property
    def size(self) -> int:
        """How many bytes fit."""
        return len(self._addresses) * PAGE

    def read(self, size: int) -> bytes:
        """The first ``size`` bytes; empty if they are not all in RAM."""
        try:
            return b"".join(
                self._memory.read(address, min(PAGE, size - at))
                for at, address in zip(range(0, size, PAGE), self._addresses, strict=False)
            )
        except IndexError:
            return b""

    def store(self, data: bytes) -> bool:
        """Write ``data``, at most ``size`` bytes; returns whether all pages are in RAM."""
        try:
            for at, address in zip(range(0, len(data), PAGE), self._addresses, strict=False):
                self._memory.write(address, data[at : at + PAGE])
        except IndexError:
            return False
        return True


class Session(Closing):
    """One command in the guest. Its opener sends frames by ``send`` and gets frames by ``take``;
    ``fileno`` becomes readable when there are some. Any thread; no method waits.

    :ivar number: names the session in frames.
    """

    def __init__(self, channel: Channel, number: int) -> None:
        self._channel, self.number = channel, number
        self._event = EventFd()
        # For the guest:
        self._description = bytearray()
        self._started = self._start_sent = False
        self._pulled = False  # the guest knows of the session
        self._input = bytearray()
        self._input_ends = False
        self._owed = dict.fromkeys(STREAMS, 0)  # credit
        self._deaf: list[int] = []  # streams that nobody reads any more
        self._signals: list[int] = []
        self._cells: bytes | None = None  # the payload of FRAME_SIZE
        # What the other ends may send:
        self._input_room = CHANNEL_WINDOW
        self._input_unpaid = 0  # bytes sent to the guest, for which it has given no credit yet
        self._room = dict.fromkeys(STREAMS, CHANNEL_WINDOW)
        # For the opener:
        self._got = {kind: bytearray() for kind in STREAMS}
        self._ends = dict.fromkeys(STREAMS, False)
        self._ends_told = dict.fromkeys(STREAMS, False)
        self._input_credit = 0
        self._last: tuple[int, bytes] | None = None  # FRAME_EXIT or FRAME_FAILED
        self._last_taken = False

    def fileno(self) -> int:
        """The descriptor to poll."""
        return self._event.fileno()

    @property
    def over(self) -> bool:
        """Whether ``take`` has given the last frame."""
        return self._last_taken

    def close(self) -> None:
        """The opener wants no more: the command is ended if it still runs. A second call does
        nothing.
        """
        with self._channel.lock:
            self._channel.drop(self)
            self._event.close()

    # --- the opener -------------------------------------------------------------------------------

    def send(self, kind: int, payload: bytes = b"") -> None:
        """Send a frame to the guest.

        :raises BadFrame: the frame is not allowed now.
        """
        with self._channel.lock:
            if self._last is not None:
                return
            self._check(kind, payload)
            self._channel.ring()

    def _check(self, kind: int, payload: bytes) -> None:
        if kind == FRAME_OPEN and not self._started:
            if len(self._description) + len(payload) > DESCRIPTION_MAX:
                raise BadFrame(f"a command of more than {DESCRIPTION_MAX} bytes")
            self._description += payload
        elif kind == FRAME_START and not self._started:
            self._started = True
        elif kind == FRAME_INPUT and len(payload) <= self._input_room and not self._input_ends:
            self._input_room -= len(payload)
            self._input += payload
            self._input_ends = not payload
        elif kind == FRAME_CREDIT and len(payload) == TWO.size:
            stream, size = TWO.unpack(payload)
            if stream not in STREAMS or size > (
                CHANNEL_WINDOW - self._room[stream] - len(self._got[stream])
            ):
                raise BadFrame("credit for bytes that were not sent")
            self._room[stream] += size
            self._owed[stream] += size
        elif kind in STREAMS and not payload:
            if not self._ends_told[kind] and kind not in self._deaf:
                self._ends_told[kind] = True
                self._deaf.append(kind)
        elif kind == FRAME_SIGNAL and len(payload) == 4:
            number = int.from_bytes(payload, "little")
            if not 0 < number <= SIGNAL_MAX:
                raise BadFrame(f"signal {number}")
            if len(self._signals) < SIGNALS_MAX:
                self._signals.append(number)
        elif kind == FRAME_SIZE and len(payload) == TWO.size:
            self._cells = payload
        else:
            raise BadFrame(f"a frame of type {kind} with {len(payload)} bytes")

    def take(self) -> list[tuple[int, bytes]]:
        """Type and payload of the frames that have come. The last one of a session is FRAME_EXIT
        or FRAME_FAILED.
        """
        found: list[tuple[int, bytes]] = []
        with self._channel.lock:
            if self._event.closed:
                return found
            self._event.drain()
            for kind, data in self._got.items():
                found += [
                    (kind, bytes(data[at : at + FRAME_MAX]))
                    for at in range(0, len(data), FRAME_MAX)
                ]
                data.clear()
                if self._ends[kind] and not self._ends_told[kind]:
                    self._ends_told[kind] = True
                    found.append((kind, b""))
            if self._input_credit:
                found.append((FRAME_CREDIT, TWO.pack(FRAME_INPUT, self._input_credit)))
                self._input_credit = 0
            if self._last is not None and not self._last_taken:
                found.append(self._last)
                self._last_taken = True
        return found

    # --- the channel, with its lock ---------------------------------------------------------------

    def fail(self, code: int, text: str) -> None:
        """End the session for its opener, with an exit code and a reason."""
        self.finish(FRAME_FAILED, code.to_bytes(4, "little") + text.encode())

    def finish(self, kind: int, payload: bytes) -> None:
        """Note the last frame. The first stands."""
        if self._last is None:
            self._last = kind, payload
            self._wake()

    def _wake(self) -> None:
        if not self._event.closed:
            self._event.nudge()

    @property
    def known(self) -> bool:
        """Whether the guest has heard of the session."""
        return self._pulled

    def came(self, kind: int, payload: bytes) -> None:
        """Take a frame of the guest.

        :raises BadFrame: the guest has broken the protocol.
        """
        if self._last is not None:
            return
        if kind in STREAMS:
            if self._ends[kind] or len(payload) > self._room[kind]:
                raise BadFrame("more output than there was credit for")
            self._room[kind] -= len(payload)
            self._got[kind] += payload
            self._ends[kind] = not payload
            self._wake()
        elif kind == FRAME_CREDIT and len(payload) == TWO.size:
            stream, size = TWO.unpack(payload)
            if stream != FRAME_INPUT or size > self._input_unpaid:
                raise BadFrame("credit for input that it has not got")
            self._input_unpaid -= size
            self._input_room += size
            self._input_credit += size
            self._wake()
        elif kind == FRAME_EXIT and len(payload) == 4:
            self.finish(FRAME_EXIT, (payload[0]).to_bytes(4, "little"))

    @property
    def pending(self) -> bool:
        """Whether there is something for the guest."""
        if self._last is not None or not self._started:
            return False
        if not self._start_sent or self._input or self._deaf or self._signals:
            return True
        return self._cells is not None or self._input_ends is True or any(self._owed.values())

    def pull(self, room: int) -> bytes:
        """Frames for the guest, at most ``room`` bytes of them."""
        out = bytearray()

        def add(kind: int, payload: bytes | bytearray = b"") -> bool:
            fits = len(out) + FRAME.size + len(payload) <= room
            if fits:
                out.extend(frame(kind, payload, self.number))
            return fits

        def piece(data: bytearray, kind: int) -> bool:
            """As much of ``data`` as fits; returns whether all of it does."""
            size = min(len(data), room - len(out) - FRAME.size)
            if size > 0 and add(kind, data[:size]):
                del data[:size]
            return not data

        if not self.pending:
            return b""
        if not self._start_sent:
            if not self._pulled and not add(FRAME_OPEN):
                return b""
            self._pulled = True
            if not piece(self._description, FRAME_OPEN) or not add(FRAME_START):
                return bytes(out)
            self._start_sent = True
        while self._signals and add(FRAME_SIGNAL, self._signals[0].to_bytes(4, "little")):
            del self._signals[0]
        while self._deaf and add(self._deaf[0]):
            del self._deaf[0]
        if self._cells is not None and add(FRAME_SIZE, self._cells):
            self._cells = None
        for kind, size in self._owed.items():
            if size and add(FRAME_CREDIT, TWO.pack(kind, size)):
                self._owed[kind] = 0
        before = len(self._input)
        empty = piece(self._input, FRAME_INPUT)
        self._input_unpaid += before - len(self._input)
        if self._input_ends and empty and add(FRAME_INPUT):
            self._input_ends = False
        return bytes(out)


class Channel:
    """The machine's end of the channel.

    :param ring: writes a byte to the second serial port.
    :param pages: those that the guest will name.
    :ivar lock: guards the sessions; held for moments only.
    :ivar ended: whether the machine has ended.
    """

    def __init__(self, bus: Bus, ring: Callable[[bytes], object], pages: Pages) -> None:
        self._bell, self._pages = ring, pages
        self.lock = threading.Lock()
        self._changed = threading.Condition(self.lock)
        self._sessions: dict[int, Session] = {}
        self._closing: list[int] = []  # sessions that the guest is to end
        self._leaving = False
        self._number = 0
        self._rung = 0.0  # when the bell has rung for what waits; 0: the guest knows of nothing
        self._reminding = False  # a thread does
        self._ready = self.ended = False
        self._problem: CommandFailed | GuestReboot | None = None
        bus.add(PIO, PORT_GUEST_CHANNEL, 4, "guest-channel", self)

    # --- the guest's side: vCPU threads, under the I/O lock ---------------------------------------

    def name(self, number: int) -> None:
        """GUEST_CHANNEL: the guest takes sessions from now on. One that it had before is lost."""
        with self.lock:
            self._lose_known("the guest started over")
            self._ready = self._pages.name(number)
            self._rung = 0.0
            self._changed.notify_all()

    def started_without(self) -> None:
        """The guest's init runs, and has named no channel: it does not know of it."""
        with self.lock:
            if not self._ready and self._problem is None:
                self._problem = CommandFailed(
                    "the guest takes no commands: its init is of an older pyvmm, or its kernel "
                    "has no serial port ttyS1",
                    "build the image again: pyvmm image build",
                )
                self._changed.notify_all()

    def read(self, offset: int, size: int) -> int:
        """The guest fetches frames; returns the number of bytes in its pages."""
        if offset or size != 4:
            return 0
        with self.lock:
            data = self._collect(self._pages.size) if self._ready else b""
            if not data:
                self._rung = 0.0
            elif not self._pages.store(data):
                return 0
            else:
                self._rung = time.monotonic()
        return len(data)

    def _collect(self, room: int) -> bytes:
        out = bytearray()
        if self._leaving and room >= FRAME.size:
            self._leaving = False
            out += frame(FRAME_LEAVE)
        while self._closing and len(out) + FRAME.size <= room:
            out += frame(FRAME_CLOSE, session=self._closing.pop())
        for number in list(self._sessions):
            session = self._sessions[number]
            got = session.pull(min(room - len(out), room // 2))
            if got:  # the next time it is the others' turn first
                self._sessions[number] = self._sessions.pop(number)
            out += got
        return bytes(out)

    def write(self, offset: int, size: int, value: int) -> None:
        """The guest hands over frames: ``value`` bytes in its pages."""
        if offset or size != 4:
            return
        with self.lock:
            data = self._pages.read(min(value, self._pages.size))
            for kind, number, payload in parse(data):
                session = self._sessions.get(number)
                if session is None or not session.known:
                    continue
                try:
                    session.came(kind, payload)
                except BadFrame as e:
                    session.fail(
                        CommandFailed.exit_code, f"the guest's init broke the protocol: {e}"
                    )
                    self._closing.append(number)
                    self.ring()

    # --- the machine's side -----------------------------------------------------------------------

    def ring(self) -> None:
        """Tell init if something waits that it does not know of. With the lock."""
        if self._ready and not self._rung and self._waits():
            self._rung = time.monotonic()
            self._bell(bytes([BELL_CHANNEL]))
            if not self._reminding:
                try:
                    Thread(target=self._remind, name="channel", daemon=True).start()
                    self._reminding = True
                except RuntimeError:  # there can be no more threads
                    pass

    def _waits(self) -> bool:
        return (
            self._leaving or bool(self._closing) or any(s.pending for s in self._sessions.values())
        )

    def _remind(self) -> None:
        """Ring again each ``REMIND_S`` until the guest has come and has got all."""
        with self.lock:
            while self._rung:
                left = self._rung + REMIND_S - time.monotonic()
                if left > 0:
                    self._changed.wait(left)
                    continue
                self._rung = 0.0
                self.ring()
            self._reminding = False

    def open(self) -> Session:
        """Open a session. Its opener sends FRAME_OPEN with the description, then FRAME_START.

        :raises CommandFailed: there are too many.
        """
        with self.lock:
            if len(self._sessions) >= SESSIONS_MAX:
                raise CommandFailed(
                    f"{SESSIONS_MAX} commands run in the guest already", "wait for one of them"
                )
            self._number += 1
            session = self._sessions[self._number] = Session(self, self._number)
            if self._problem is not None:
                session.fail(self._problem.exit_code, str(self._problem))
            return session

    def drop(self, session: Session) -> None:
        """Forget a session, and let the guest end its command. With the lock."""
        if self._sessions.pop(session.number, None) is None:
            return
        if session.known and session._last is None:
            self._closing.append(session.number)
            self.ring()

    def leave(self) -> None:
        """Ask the guest to power off."""
        with self.lock:
            self._leaving = True
            self.ring()

    def wait_ready(self, timeout: float, check: Callable[[], None] | None = None) -> None:
        """Wait until the guest takes commands.

        :param check: is called meanwhile, each second, and may raise to end the wait.
        :raises PyvmmError: the guest takes none within ``timeout`` seconds, or has ended; then the
            exit code is that of its end.
        """
        until = time.monotonic() + timeout
        with self.lock:
            while not self._ready and self._problem is None:
                left = until - time.monotonic()
                if left <= 0:
                    break
                self._changed.wait(min(left, CHECK_S))
                if check is not None:
                    check()
            if self._problem is not None:
                error = type(self._problem)(self._problem.cause, self._problem.hint)
                error.exit_code = self._problem.exit_code
                raise error
            if not self._ready:
                raise CommandFailed(
                    f"the guest takes no commands after {timeout:g} s",
                    "it needs the init of an image of pyvmm's (pyvmm image build); see its console",
                )

    def gone(self, why: str, code: int = CommandFailed.exit_code) -> None:
        """The guest has ended: so have its sessions."""
        with self.lock:
            self._problem = CommandFailed(f"no command can run in the guest: {why}")
            self._problem.exit_code = code
            self._ready, self.ended, self._rung = False, True, 0.0
            for session in self._sessions.values():
                session.fail(code, why)
            self._changed.notify_all()

    def reset(self) -> None:
        """The guest starts over, so the commands that ran in it are lost."""
        with self.lock:
            self._ready, self._rung, self._problem = False, 0.0, None
            self._closing.clear()
            self._leaving = False
            self._pages.forget()
            self._lose_known("the guest rebooted")
            self._changed.notify_all()

    def _lose_known(self, why: str) -> None:
        for session in self._sessions.values():
            if session.known:
                session.fail(GuestReboot.exit_code, why)
