"""One capture: its members, which are cards, and the thread that writes the file.

Theory of operation: a member has sources in C (``cext/capture.h``): one ring per queue pair, which
workers fill, and at times a packet socket on a tap. The thread takes packets from all sources, in
the order of time and in batches, and writes them. It sleeps while there are none. If the reader of
the file is slow, the sources become full and count what they lose; no card waits for a capture. The
losses so far are written once per second, and all counts at the end.
"""

from __future__ import annotations

import errno
import os
import select
import threading
import time
from contextlib import ExitStack

from pyvmm._ext import ffi, lib
from pyvmm.capture import pcapng
from pyvmm.errors import HostError, UsageError
from pyvmm.fd import Closing, EventFd, Fd
from pyvmm.threads import Thread, report_bug

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any, Protocol

    class Captured(Protocol):
        """A card that can be captured."""

        @property
        def name(self) -> str:
            """Such as ``net0``."""

        def facts(self) -> tuple[str, bytes]:
            """What the file says of the card: in words, and its MAC address or nothing."""

        def attach(self, member: Member) -> None:
            """Begin to give the member packets.

            :raises PyvmmError: the card's data path cannot be captured here.
            """

        def detach(self, member: Member) -> None:
            """End that. A second call does nothing."""


#: Bytes that are kept of a packet by default: all of it.
SNAPLEN: int = lib.PV_CAPTURE_SNAPLEN
INSTRUCTION = 8  # bytes of struct sock_filter
#: Seconds between two batches, so that a stream of packets does not wake the thread for each.
PACE_S = 0.004
#: Seconds after which a socket that takes no packets any more has shown all that it has.
RETIRE_S = 3 * lib.PV_CAPTURE_BLOCK_MS / 1000
#: Nanoseconds that packets wait if there is a socket, whose packets are shown late: so that all are
#: in the order of time.
HOLD_NS = 2 * lib.PV_CAPTURE_BLOCK_MS * 1_000_000
#: Seconds between two reports of losses in the file.
LOSSES_S = 1.0
#: Seconds that a slow reader of the file has for the rest, once the capture is to end.
LINGER_S = 2.0
#: Bytes that a regular file takes by default. No guest fills the disk (docs/bounds.md).
LIMIT = 1 << 30
LIMIT_MIN = 2 * lib.PV_CAPTURE_ROOM
#: Begins the comment that says that the limit was reached.
FULL = "the limit of "
#: Packets that are thrown away under the lock.
DISCARD = 1 << 14
#: What poll(2) promises of a pipe that can be written (PIPE_BUF).
PIECE = 4096


class Source:
    """A source in C, ``struct pv_capture``. Owned by its member.

    :ivar socket: the packet socket of the source, owned; None for a ring.
    :ivar retired: when it will have shown all, CLOCK_MONOTONIC in seconds; None while it is in use.
    """

    def __init__(self, c: Any, socket: Fd | None = None) -> None:
        self.c, self.socket = c, socket
        self.retired: float | None = None

    def free(self) -> None:
        """Release it. A second call does nothing."""
        c, self.c = self.c, ffi.NULL
        lib.pv_capture_free(c)
        if self.socket is not None:
            self.socket.close()


class Member:
    """A card in a capture. The public methods are the card's; any thread.

    :ivar number: of its interface in the file.
    """

    def __init__(self, capture: Capture, number: int, card: Captured) -> None:
        self._capture, self.number, self.card = capture, number, card
        self.rings: dict[int, Source] = {}
        self.sockets: list[Source] = []
        self.past = [0, 0, 0]  # seen, accepted and lost, of sources that are gone
        self.told = 0  # losses that the file has been told of
        self.kernel = False  # the kernel has filtered, and does not say how much
        self.gone = False  # the card
        self.stuck = False  # a worker may use a ring for ever: see ``CapturePoint.remove``
        self.ring(0)  # has the notes

    def ring(self, pair: int) -> Any:
        """The ring of a queue pair, for a worker: ``struct pv_capture *``.

        :raises HostError: there is no memory.
        """
        capture = self._capture
        with capture.lock:
            if pair not in self.rings:
                wake = capture.wake.fileno()
                c = lib.pv_capture_ring(self.number, capture.snaplen, *capture.program, wake)
                if not c:
                    raise HostError("no memory for a capture")
                if capture.queue is not None:
                    lib.pv_capture_only(c, capture.queue)
                self.rings[pair] = Source(c)
            return self.rings[pair].c

    @property
    def queue(self) -> int | None:
        """The index of the only virtqueue whose packets are wanted; None: all."""
        return self._capture.queue

    def socket(self, fd: Fd, *, mirrored: bool = False) -> Source:
        """Make a source of a packet socket (``hostnet.packets``), which it owns from here on. It
        gives nothing until ``listen``; ``retire`` is needed in any case.

        :param mirrored: see ``Tap``.
        :raises HostError: there is no memory.
        """
        capture = self._capture
        c = lib.pv_capture_socket(
            self.number, capture.snaplen, *capture.program, fd.fileno(), mirrored
        )
        if not c:
            fd.close()
            raise HostError("no memory for a capture")
        return Source(c, fd)

    def listen(self, source: Source) -> None:
        """Take packets from a socket, from now on.

        :raises HostError: the kernel does not take the filter; the socket gives nothing.
        """
        capture = self._capture
        with capture.lock:
            error = self._filter(source, capture.snaplen)
            if error:
                remedy = "raise the sysctl net.core.optmem_max, or capture without a filter"
                raise HostError(f"cannot filter packets: {os.strerror(-error)}", remedy)
            self.kernel = True
            self.sockets.append(source)
            capture.nudge()

    def retire(self, source: Source) -> None:
        """Take no more packets from a socket but those that it has. The source is the capture's
        from here on.
        """
        capture = self._capture
        with capture.lock:
            if source not in self.sockets:
                source.free()
                return
            self._filter(source, 0)  # if this fails, it takes some more until it is freed
            source.retired = time.monotonic() + RETIRE_S
            capture.nudge()

    def _filter(self, source: Source, snaplen: int) -> int:
        assert source.socket is not None
        fd = source.socket.fileno()
        error: int = lib.pv_capture_filter(fd, snaplen, *self._capture.program)
        return error

    def note(self, text: str) -> None:
        """Put a comment at the card's next packet, or at the end of the file."""
        with self._capture.lock:
            lib.pv_capture_note(self.rings[0].c, time.time_ns(), text.encode())

    def leave(self) -> None:
        """The card goes, and has let go of the member. A capture without members ends."""
        self._capture.leave(self)

    # --- for the capture, under its lock ----------------------------------------------------------

    def sources(self) -> list[Source]:
        """All that there are."""
        return [*self.rings.values(), *self.sockets]

    def counts(self) -> list[int]:
        """Packets seen, accepted and lost so far."""
        total = list(self.past)
        for source in self.sources():
            for at, n in enumerate(_counts(source)):
                total[at] += n
        return total

    def drop(self, source: Source) -> None:
        """Free a socket that has shown all."""
        for at, n in enumerate(_counts(source)):
            self.past[at] += n
        self.sockets.remove(source)
        source.free()

    def free(self) -> None:
        """Free all; what has been counted stays."""
        self.past = self.counts()
        rings, self.rings = self.rings, {}
        sockets, self.sockets = self.sockets, []
        for source in (*sockets, *([] if self.stuck else rings.values())):
            source.free()


def _has_positions(fd: int) -> bool:
    """Whether writes never wait for a reader. A confined back-end may not ask what it is."""
    try:
        os.lseek(fd, 0, os.SEEK_CUR)
    except OSError:
        return False
    return True


def _notes(source: Source) -> str:
    """The comments that have got no packet."""
    found: list[str] = []
    while (text := lib.pv_capture_noted(source.c, len(found))) != ffi.NULL:
        found.append(ffi.string(text).decode(errors="replace"))
    return "; ".join(found)


def _counts(source: Source) -> tuple[int, int, int]:
    c = ffi.new("struct pv_capture_counts *")
    lib.pv_capture_count(source.c, c)
    return c.seen, c.accepted, c.lost


class Capture(Closing):
    """A capture of cards into a pcapng file, from now on until ``close``, until the file cannot be
    written any more, or until all cards are gone.

    :param cards: at least one. :param fd: the file, a pipe or a stream socket; owned from here on,
        also if there is an error.
    :param snaplen: bytes to keep of each packet, 1 to ``SNAPLEN``.
    :param code: instructions of ``capture.bpf``; empty: all packets. :param expression: what they
        were compiled from, for the file.
    :param queue: the index of the only virtqueue whose packets are wanted: even to the guest, odd
        from the guest.
    :param limit: bytes that the capture writes at most, ``LIMIT_MIN`` at least; packets beyond are
        lost. By default ``LIMIT`` for a file, and none for a pipe or a socket.
    :ivar over: readable when the capture has ended.
    :ivar problem: why the file is not whole; empty if it is.
    :raises PyvmmError: a card cannot be captured; nothing is left behind.
    """

    def __init__(
        self,
        cards: Sequence[Captured],
        fd: int,
        *,
        snaplen: int = SNAPLEN,
        code: bytes = b"",
        expression: str = "",
        queue: int | None = None,
        limit: int | None = None,
    ) -> None:
        self._out = Fd(fd)
        self.problem = ""
        self.lock = threading.Lock()  # held for a moment; guards the members
        self._members: list[Member] = []
        self._closing = False  # the cards have let go
        self._stop_at = 0.0  # when a slow reader has had its time; 0: no end is in sight
        self._begin, self._told_at = time.time_ns(), time.monotonic()
        self._thread: threading.Thread | None = None
        with ExitStack() as undo:
            undo.callback(self._out.close)
            if not 1 <= snaplen <= SNAPLEN:
                raise UsageError(f"a snaplen of {snaplen}", f"use 1 to {SNAPLEN}")
            if limit is not None and limit < LIMIT_MIN:
                raise UsageError(
                    f"a limit of {limit} bytes for a capture", f"use {LIMIT_MIN} at least"
                )
            self.snaplen, self.queue = snaplen, queue
            self.program = (code or ffi.NULL, len(code) // INSTRUCTION)
            self.wake = EventFd()
            undo.callback(self.wake.close)
            self.over = EventFd()
            undo.callback(self.over.close)
            self._regular = _has_positions(fd)
            self._limit = limit or (LIMIT if self._regular else 0)  # 0: none
            self._written = 0
            self._piece = PIECE if os.get_blocking(fd) else lib.PV_CAPTURE_ROOM
            self._room = ffi.new("uint8_t[]", lib.PV_CAPTURE_ROOM)
            undo.callback(self._release)
            head = pcapng.section()
            for number, card in enumerate(cards):
                words, mac = card.facts()
                head += pcapng.interface(card.name, words, mac, snaplen, expression)
                self._members.append(Member(self, number, card))
            for member in self._members:
                member.card.attach(member)
            self._head = head
            thread = Thread(target=self._run, name="capture", daemon=True)
            try:
                thread.start()
            except RuntimeError as e:
                raise HostError(
                    f"cannot start a capture: {e}", "raise the limit of processes"
                ) from e
            self._thread = thread
            undo.pop_all()

    @property
    def full(self) -> bool:
        """Whether the limit was reached: there is no room for another batch."""
        room: int = lib.PV_CAPTURE_ROOM
        return 0 < self._limit < self._written + room

    def _full_words(self) -> str:
        return f"{FULL}{self._limit >> 20} MiB was reached"

    @property
    def packets(self) -> int:
        """Packets so far that the filter wants, of all cards. Any thread."""
        return self._total(1)

    @property
    def lost(self) -> int:
        """Packets of these that are missing in the file. Any thread."""
        return self._total(2)

    def _total(self, which: int) -> int:
        with self.lock:
            return sum(member.counts()[which] for member in self._members)

    def nudge(self) -> None:
        """Have the thread look. The lock is held."""
        if not self.wake.closed:
            self.wake.nudge()

    def close(self) -> None:
        """End the capture, and wait until the file is whole; the reader of a pipe or a socket has
        ``LINGER_S`` seconds for the rest. A second call does nothing.
        """
        with self.lock:
            self._hurry()
        self._detach()
        with self.lock:
            self._closing = True
            self.nudge()
        assert self._thread is not None
        self._thread.join()
        with self.lock:
            self.wake.close()
            self.over.close()

    def _hurry(self) -> None:
        """The capture is to end: a slow reader has ``LINGER_S`` from now on. The lock is held."""
        if not self._stop_at:
            self._stop_at = time.monotonic() + LINGER_S
            self.nudge()

    def leave(self, member: Member) -> None:
        """The card goes (``Member.leave``)."""
        with self.lock:
            member.gone = True
            if all(member.gone for member in self._members):
                self._hurry()
            self.nudge()

    def _detach(self) -> None:
        for member in self._members:
            member.card.detach(member)

    def _release(self) -> None:
        """Let go of the cards, and free the sources."""
        self._detach()
        with self.lock:
            for member in self._members:
                member.free()

    # --- the thread -------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            self._write(self._head)
            while self._round():
                pass
            self._write(self._statistics(final=True))
            if self.full and self.lost:
                self.problem = (
                    f"{self._full_words()}: {self.lost} of {self.packets} packets are lost"
                )
        except OSError as e:
            self.problem = e.strerror or str(e)
        except Exception as e:
            self.problem = f"{type(e).__name__}: {e}"
            report_bug(e)
        finally:
            self._release()
            self._out.close()
            with self.lock:
                if not self.over.closed:
                    self.over.nudge()

    def _round(self) -> bool:
        """Write what there is, or wait for more. False at the end."""
        now = time.monotonic()
        with self.lock:
            ending = self._closing or all(member.gone for member in self._members)
            sources = [source for member in self._members for source in member.sources()]
            array = ffi.new("struct pv_capture *[]", [source.c for source in sources])
            sockets = [source for source in sources if source.socket is not None]
            due = [one for one in sockets if one.retired is not None and one.retired <= now]
            # A source that goes leaves nothing behind.
            hold = HOLD_NS if sockets and not due else 0
            size = thrown = 0
            if self.full:
                thrown = lib.pv_capture_discard(array, len(sources), DISCARD)
            else:
                size = lib.pv_capture_drain(
                    array, len(sources), time.time_ns(), hold, self._room, lib.PV_CAPTURE_ROOM
                )
            if not size and not thrown:
                for member in self._members:
                    for source in due:
                        if source in member.sockets:
                            member.drop(source)
            left = any(member.sockets for member in self._members)
        if size:
            self._write(ffi.buffer(self._room, size))
        if now >= self._told_at + LOSSES_S and not self.full:
            self._told_at = now
            self._write(self._statistics(final=False))
        if size >= lib.PV_CAPTURE_ROOM // 2 or thrown == DISCARD:
            return True
        if size or thrown:
            self._wait(PACE_S, [])
            return True
        if ending and not left:
            return hold > 0  # once more: what was too young for this batch
        self._idle()
        return True

    def _idle(self) -> None:
        """Sleep until there is something to do."""
        with self.lock:
            sources = [source for member in self._members for source in member.sources()]
            ready = [lib.pv_capture_ask(source.c) for source in sources]
            sockets = [source for source in sources if source.socket is not None]
            times = [source.retired for source in sockets if source.retired is not None]
            fds = [source.socket.fileno() for source in sockets if source.socket is not None]
            lossy = not self.full and any(
                member.counts()[2] > member.told for member in self._members
            )
        if lossy:
            times.append(self._told_at + LOSSES_S)
        if not any(ready):
            left = max(min(times) - time.monotonic(), 0) + 0.001 if times else None
            self._wait(left, fds)
        elif fds:  # what there is is too young
            self._wait(PACE_S, [])

    def _wait(self, seconds: float | None, fds: Sequence[int]) -> None:
        """Wait until something is to be read, or the time is over.

        :raises BrokenPipeError: nobody reads the file any more.
        """
        poll = select.poll()
        for fd in (self.wake.fileno(), *fds):
            poll.register(fd, select.POLLIN)
        if not self._regular:
            poll.register(self._out.fileno(), 0)
        for fd, _mask in poll.poll(None if seconds is None else seconds * 1000):
            if fd == self.wake.fileno():
                self.wake.drain()
            elif fd == self._out.fileno():
                raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))

    def _write(self, data: bytes | ffi.buffer) -> None:
        """Write all of it. Waits for a slow reader, until ``LINGER_S`` after the end.

        :raises OSError: this is impossible.
        """
        view = memoryview(data)
        self._written += len(view)
        while view:
            if self._regular:
                view = view[os.write(self._out.fileno(), view) :]
                continue
            poll = select.poll()
            poll.register(self._out.fileno(), select.POLLOUT)
            if not self._stop_at:
                poll.register(self.wake.fileno(), select.POLLIN)
            left = self._stop_at - time.monotonic() if self._stop_at else None
            if left is not None and left <= 0:
                raise OSError(errno.ETIMEDOUT, "its reader is too slow")
            for fd, _mask in poll.poll(None if left is None else left * 1000 + 1):
                if fd == self.wake.fileno():
                    self.wake.drain()
                    continue
                try:
                    view = view[os.write(fd, view[: self._piece]) :]
                except BlockingIOError:
                    break

    def _statistics(self, *, final: bool) -> bytes:
        """Blocks with the counts of each member that has lost more packets since the last time; at
        the end those of all members, with the comments that have got no packet.
        """
        out, now = b"", time.time_ns()
        with self.lock:
            for member in self._members:
                seen, accepted, lost = member.counts()
                if not final and lost == member.told:
                    continue
                member.told = lost
                comment = _notes(member.rings[0]) if final else ""
                if final and lost and self.full:
                    comment = "; ".join(filter(None, (self._full_words(), comment)))
                received = None if member.kernel and self.program[1] else seen
                counted = pcapng.Statistics(member.number, received, accepted, lost, comment)
                out += counted.pack(self._begin, now)
        return out
