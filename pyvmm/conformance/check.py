"""Conformance of a vhost-user-net back-end, without a guest: this process fills the rings as a
driver does, and uses our own front-end.

Each item of :data:`ITEMS` is a function of a :class:`Checker`. It returns what was seen as a text,
or raises :class:`Failed`, :class:`Skipped` or :class:`Unchecked`. If the back-end sends packets
back (a loop, ``dpdk-testpmd --forward-mode=io`` with one port), the items compare the received
packets as well; otherwise they check only that each transmit chain is returned once, and in an
orderly way.
"""

from __future__ import annotations

import os
import select
import struct
import time
from contextlib import contextmanager

from pyvmm.conformance.dirty_log import FrontendLog, page
from pyvmm.conformance.driver import NetDriver, wait_for
from pyvmm.conformance.subject import RETRY_S, Gone, Subject
from pyvmm.datapath.vhost_user import VhostUserNet
from pyvmm.errors import PyvmmError, VhostUserError
from pyvmm.memory import GuestMemory
from pyvmm.spec import vhost_user as spec
from pyvmm.spec import virtio, virtio_net
from pyvmm.vhostuser.session import Session
from pyvmm.vhostuser.wire import Closed, TimedOut

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import Literal, TypeVar

    T = TypeVar("T")
    Result = Literal["passed", "failed", "skipped", "unchecked"]

VERSION_1 = 1 << virtio.VIRTIO_F_VERSION_1
EVENT_IDX = 1 << virtio.VIRTIO_RING_F_EVENT_IDX
INDIRECT = 1 << virtio.VIRTIO_RING_F_INDIRECT_DESC
MRG_RXBUF = 1 << virtio_net.VIRTIO_NET_F_MRG_RXBUF
RING_PACKED = 1 << virtio.VIRTIO_F_RING_PACKED
LOG_ALL = 1 << spec.VHOST_F_LOG_ALL
NAMES = {
    EVENT_IDX: "EVENT_IDX",
    INDIRECT: "INDIRECT_DESC",
    MRG_RXBUF: "MRG_RXBUF",
    RING_PACKED: "RING_PACKED",
}
OPTIONAL = (EVENT_IDX, INDIRECT, MRG_RXBUF)
MAC = bytes.fromhex("525400ba5e01")
#: The frames' header: to no host, from us, an EtherType for local experiments. A random number per
#: card follows: a back-end may have packets of an earlier card under way.
HEADER = b"\x02\x00\x00\x00\x00\x77" + MAC + b"\x88\xb5"
#: How frames are split into segments, in turn: header and frame in one, header apart, in many.
SPLITS: tuple[list[int], ...] = ([], [12], [12, 14, 20], [6, 6, 10, 10, 10])


#: Seconds that one packet may take to come back, while nobody knows whether any does.
ECHO_S = 0.2


class Failed(Exception):
    """The back-end does not do what it must."""


class Skipped(Exception):
    """The item does not apply: the back-end does not offer the feature."""


class Unchecked(Exception):
    """The item cannot be checked, which is no fault of the back-end's."""


class Item:
    """The result of one check.

    :ivar result: ``passed``, ``failed``, ``skipped`` (does not apply) or ``unchecked`` (cannot be
        checked). :ivar detail: what was seen, or what is wrong.
    :ivar clause: of a failed item, where it is written. :ivar rings: what was in the rings then.
    """

    __slots__ = ("clause", "detail", "name", "result", "rings", "seconds")

    def __init__(
        self,
        name: str,
        result: Result,
        detail: str,
        seconds: float,
        clause: str = "",
        rings: list[str] | None = None,
    ) -> None:
        self.name, self.result, self.detail, self.seconds = name, result, detail, seconds
        self.clause, self.rings = clause, rings or []


class LoggedNet(VhostUserNet):
    """A front-end that can migrate its guest."""

    protocol_features = VhostUserNet.protocol_features | 1 << spec.VHOST_USER_PROTOCOL_F_LOG_SHMFD


class DrivenCard:
    """A network card on the back-end, driven by this process: memory, drivers and front-end."""

    def __init__(
        self,
        checker: Checker,
        acked: int,
        *,
        size: int = 256,
        start: int | None = None,
        pairs: int = 1,
        rx_size: int = 2048,
    ) -> None:
        self.checker = checker
        self.memory = GuestMemory(8 << 20)
        self.drivers: list[NetDriver] = []
        self.path: VhostUserNet | None = None
        self.number = 0
        self.header = HEADER + os.urandom(4)
        self._at: dict[int, int] = {}  # how many chains each ring had returned at ``log``
        try:
            at = 0x10000
            for pair in range(pairs):
                driver = NetDriver(
                    self.memory,
                    base=at,
                    size=size,
                    start=start,
                    packed=bool(acked & RING_PACKED),
                    event_idx=bool(acked & EVENT_IDX),
                    indirect=bool(acked & INDIRECT),
                    mrg_rxbuf=bool(acked & MRG_RXBUF),
                    rx_buffers=min(size, 256),
                    rx_size=rx_size,
                    pair=pair,
                )
                at += (7 << 20) // pairs & ~0xFFF
                driver.end = at
                driver.fill(kick=False)
                self.drivers.append(driver)
            self.path = checker.answered(lambda: self._connect(pairs))
            self.acked = acked & self.path.features()
            if acked & ~self.acked:
                raise Failed(f"features {acked & ~self.acked:#x} have gone")
            self.start()
        except BaseException:
            checker.note_rings(self.drivers)
            self.close()
            raise

    def _connect(self, pairs: int) -> VhostUserNet:
        path = LoggedNet(self.checker.subject, queues=pairs, mac=MAC, timeout=self.checker.timeout)
        try:
            path.connect(0)  # the subject has a time limit of its own
        except BaseException:
            path.close()
            raise
        return path

    def start(self) -> None:
        """Hand over the rings, each from where the device has returned everything."""
        assert self.path is not None
        rings = [r.vring(r.position) for d in self.drivers for r in d.rings]
        self.path.start(self.acked, self.memory, rings, self)
        self.healthy()

    def fault(self, queue: int, problem: str) -> None:
        """Does nothing: ``healthy`` asks the data path's counters."""

    def link(self, up: bool) -> None:
        """Does nothing: a vhost-user back-end does not report its link."""

    def healthy(self) -> None:
        """:raises Failed: the connection has ended, or the back-end found a ring malformed."""
        assert self.path is not None
        counters = self.path.counters()
        if counters["ring_errors"]:
            raise Failed("it has found a ring malformed (ERR eventfd)")
        if self.path.problems:
            raise Failed(self.path.problems[-1])

    def stop(self) -> None:
        """Take the rings back. :raises Failed: GET_VRING_BASE differs from what was returned."""
        assert self.path is not None
        bases = self.path.stop()
        self.healthy()
        for ring, base in zip((r for d in self.drivers for r in d.rings), bases, strict=True):
            if self.path.counters()["bad_bases"] or base != ring.position:
                words = ring.vring().format.words
                raise Failed(
                    f"ring {ring.index}: GET_VRING_BASE gives {words(base)}, its used index is "
                    f"{words(ring.position)}"
                )

    def log(self, log: FrontendLog) -> bool:
        """Have the back-end mark what it writes from now on; whether it can."""
        assert self.path is not None
        rings = [r.vring() for d in self.drivers for r in d.rings]
        able = False

        def ask(s: Session) -> None:
            nonlocal able
            able = s.has(spec.VHOST_USER_PROTOCOL_F_LOG_SHMFD)
            if able:
                log.start(s, self.acked, rings)

        self.path.converse(ask)
        for driver in self.drivers:
            driver.filled.clear()
        self._at = {ring.index: ring.returned for d in self.drivers for ring in d.rings}
        return able

    def written(self) -> dict[int, str]:
        """The pages that the back-end has certainly written since ``log``, and what is there. The
        rings have 256 entries, so that each area lies in one page.
        """
        pages = {}
        for driver in self.drivers:
            for ring in driver.rings:
                if ring.returned == self._at[ring.index]:
                    continue  # nothing has come back
                if self.acked & RING_PACKED:
                    pages[page(ring.desc)] = f"the descriptors of ring {ring.index}"
                else:
                    pages[page(ring.used)] = f"the used ring of ring {ring.index}"
            for gpa, length in driver.filled:
                for at in range(page(gpa), gpa + length, spec.VHOST_LOG_PAGE):
                    pages[at] = "a receive buffer"
        return pages

    def frame(self, length: int) -> bytes:
        """The next frame, of ``length`` bytes or a few more."""
        self.number += 1
        head = self.header + struct.pack("<I", self.number)
        return head + bytes((self.number + i) & 0xFF for i in range(max(0, length - len(head))))

    def send(self, count: int, *, pair: int = 0, longest: int = 1400) -> None:
        """Send frames of many lengths in chains of many shapes, in bursts. Received packets are
        compared if the back-end sends them back.

        A packet may come back on any queue pair: nothing says which one the back-end has to choose.

        :raises Failed: a chain is not returned, or a packet comes back changed, twice, out of order
            or not at all.
        """
        driver = self.drivers[pair]
        burst = max(1, min(32, driver.tx.size // 8))
        for each in self.drivers:
            each.received.clear()
        sent: list[bytes] = []
        while count > 0:
            now = min(burst, count)
            count -= now
            frames = [self.frame(60 + 97 * (self.number + i) % (longest - 59)) for i in range(now)]
            for i, frame in enumerate(frames):
                driver.queue(
                    frame,
                    split=SPLITS[(len(sent) + i) % len(SPLITS)] if driver.tx.size >= 64 else None,
                )
            driver.tx.publish()
            sent += frames
            self.finished(driver)
            if not self.checker.echoes:
                continue
            patience = self.checker.timeout
            if not wait_for(lambda: len(self.back()) >= len(sent), patience):  # noqa: B023
                self.healthy()
                raise Failed(f"{len(self.back())} of {len(sent)} packets have come back")
        if self.checker.echoes:
            self._compare(sent)

    def _compare(self, sent: list[bytes]) -> None:
        """All packets are back, each once; those of one queue pair in order."""
        for driver in self.drivers:
            numbers = [_number(p) for p in self.ours(driver)]
            if numbers != sorted(numbers):
                raise Failed(f"packets have come back in the wrong order on pair {driver.pair}")
        for at, (packet, original) in enumerate(
            zip(sorted(self.back(), key=_number), sent, strict=False)
        ):
            if packet != original:
                raise Failed(f"packet {at} has come back changed, or another one twice")
        if len(self.back()) != len(sent):
            raise Failed(f"{len(self.back())} packets have come back of {len(sent)}")

    def ours(self, driver: NetDriver) -> list[bytes]:
        """The packets received on one queue pair that this run has sent."""
        driver.poll()
        return [p[12:] for p in driver.received if p[24:30] == self.header[12:18]]

    def back(self) -> list[bytes]:
        """The packets received on any queue pair that this run has sent."""
        return [packet for driver in self.drivers for packet in self.ours(driver)]

    def finished(self, driver: NetDriver) -> None:
        """Wait until every transmit chain is returned. :raises Failed: a chain is not returned, or
        returned twice, or returned with bytes written.
        """

        def all_done() -> bool:
            driver.poll()
            try:
                for _, length in driver.tx.take_used():
                    if length:
                        raise Failed(f"a transmit was returned with {length} bytes written")
            except KeyError as e:
                raise Failed(f"it returned head {e}, which is not its own") from e
            return driver.tx.outstanding == 0

        if not wait_for(all_done, self.checker.timeout):
            self.healthy()
            raise Failed(
                f"{driver.tx.outstanding} transmits are not returned in {self.checker.timeout:g} s"
            )

    def close(self) -> None:
        """Disconnect; a second call does nothing."""
        if self.path is not None:
            self.path.close()
        for driver in self.drivers:
            driver.close()
        self.drivers = []
        self.memory.close()


def _number(packet: bytes) -> int:
    """The number of a packet of ours."""
    return int.from_bytes(packet[18:22], "little")


class Checker:
    """A back-end under test.

    :param subject: how to get sessions with it, lent; or the path of its listening socket.
    :param timeout: seconds for each answer and each burst.
    :param queues: queue pairs to use at once; default: as many as the back-end has, up to 4.
    :param echo_seconds: time to find out whether the back-end sends packets back.
    :ivar gone: no back-end answers any more; :ivar reason: says why.
    :ivar echoes: whether the back-end sends packets back. :ivar features: the features that it
        offers, as a mask. :ivar items: results so far.
    """

    def __init__(
        self,
        subject: Subject | str,
        *,
        timeout: float = 5.0,
        queues: int | None = None,
        echo_seconds: float = 1.0,
    ) -> None:
        if isinstance(subject, str):
            subject = Subject(subject, timeout=timeout)
        self.subject, self.timeout, self.queues = subject, timeout, queues
        self.echo_seconds = echo_seconds
        self.features = 0
        self.pairs = 1
        self.echoes = False
        self.items: list[Item] = []
        self.gone = False
        self.reason: Gone | None = None
        self._rings: list[str] = []
        self._answered = False  # in the present item

    def note_rings(self, drivers: list[NetDriver]) -> None:
        """Something has gone wrong: keep what is in the rings."""
        self._rings += [ring.describe() for driver in drivers for ring in driver.rings]

    @contextmanager
    def card(self, acked: int = VERSION_1, **options: int) -> Iterator[DrivenCard]:
        """A running card with these features. It is stopped in an orderly way if nothing failed."""
        card = DrivenCard(self, acked, **options)
        try:
            yield card
            card.stop()
        except BaseException:
            self.note_rings(card.drivers)
            raise
        finally:
            card.close()

    @contextmanager
    def session(self) -> Iterator[Session]:
        """A session without memory and rings, in a conversation."""
        wanted = 1 << spec.VHOST_USER_PROTOCOL_F_MQ | 1 << spec.VHOST_USER_PROTOCOL_F_REPLY_ACK
        session = self.answered(lambda: self._negotiated(wanted))
        try:
            with session.conversation(self.timeout):
                yield session
        finally:
            session.close()

    def _negotiated(self, wanted: int) -> Session:
        session = Session(self.subject.dial(), self.subject.name)
        try:
            with session.conversation(self.timeout):
                session.negotiate(wanted)
        except BaseException:
            session.close()
            raise
        return session

    def answered(self, begin: Callable[[], T]) -> T:
        """Begin a session, again and again until the back-end answers: one that is about to end may
        accept a connection, and close it.

        :raises Gone: no back-end answers in time.
        """
        until = time.monotonic() + self.timeout
        while True:
            try:
                session = begin()
            except Closed as e:
                if time.monotonic() >= until:
                    raise Gone(e.cause, e.hint) from e
                time.sleep(RETRY_S)
            else:
                self._answered = True
                return session

    def all_features(self) -> int:
        """VERSION_1 and the optional features of split rings that the back-end offers, as a
        mask.
        """
        return VERSION_1 | sum(bit for bit in OPTIONAL if self.features & bit)

    def formats(self) -> list[int]:
        """RING_PACKED where the back-end offers it, for an item that is to hold on both formats of
        rings: 0 is the split one.
        """
        return [0, RING_PACKED] if self.features & RING_PACKED else [0]

    def suppressions(self) -> list[int]:
        """Both formats, without and with EVENT_IDX, as far as the back-end offers them."""
        return [form | bit for form in self.formats() for bit in {0, EVENT_IDX & self.features}]

    def need(self, bit: int) -> None:
        """:raises Skipped: the back-end does not offer feature ``bit``."""
        if not self.features & bit:
            raise Skipped(f"{NAMES[bit]} is not offered")

    def run(self, report: Callable[[Item], None] = lambda item: None) -> None:
        """Check every item, in order; ``report`` is called after each. If the first item fails, or
        there is no back-end any more, the others are not checked.
        """
        for name, check, clause in ITEMS:
            item = self._gone_item(name) if self.gone else self._check(name, check, clause)
            self.items.append(item)
            report(item)
            if check is negotiation:
                if item.result == "failed":
                    return
                self.subject.learn()

    def _check(self, name: str, check: Callable[[Checker], str], clause: str) -> Item:
        start, self._answered = time.monotonic(), False
        before = len(self.subject.crashes)
        self._rings = []
        result: Result
        try:
            result, detail = "passed", check(self)
        except Skipped as e:
            result, detail = "skipped", str(e)
        except Unchecked as e:
            result, detail = "unchecked", str(e)
        except Gone as e:
            self.gone, self.reason = True, e
            if not self._answered:  # it has not seen anything of this item
                return self._gone_item(name, time.monotonic() - start)
            result, detail = "failed", f"the back-end has gone: {e}"
        except (Failed, PyvmmError) as e:
            result, detail = "failed", str(e)
        seconds = time.monotonic() - start
        self.subject.settle()
        crashes = self.subject.crashes[before:]
        if crashes:
            detail = "; ".join([detail, *crashes] if result == "failed" else crashes)
            result = "failed"
        if result != "failed":
            return Item(name, result, detail, seconds)
        return Item(name, result, detail, seconds, clause, self._rings)

    def _gone_item(self, name: str, seconds: float = 0.0) -> Item:
        served = [item for item in self.items if item.result != "unchecked"]
        text = "no back-end accepts a connection"
        if served:
            last = served[-1]
            text = f"there is no back-end any more since {last.name!r}"
            if last.result == "passed":
                text += "; if it serves one session only: --respawn CMD"
        return Item(name, "unchecked", text, seconds)


# --- the items ------------------------------------------------------------------------------------


def negotiation(checker: Checker) -> str:
    """See what the back-end offers, and whether it sends packets back, for the other items."""
    with checker.card() as card:  # one session only: some back-ends serve no other
        assert card.path is not None
        checker.features, pairs = card.path.offer()
        checker.pairs = pairs or 1
        end = time.monotonic() + min(checker.echo_seconds, checker.timeout)
        # More than one packet: a back-end that has just started may drop the first.
        while not checker.echoes and (not card.number or time.monotonic() < end):
            card.send(1)
            checker.echoes = wait_for(card.back, min(ECHO_S, checker.timeout))
    back = "come back" if checker.echoes else "do not come back: receiving is not checked"
    return f"packets {back}"


def _with(bits: int) -> Callable[[Checker], str]:
    def check(checker: Checker) -> str:
        for bit in NAMES:
            if bits & bit:
                checker.need(bit)
        with checker.card(VERSION_1 | bits) as card:
            card.send(600)
        return "600 packets"

    return check


def ring_sizes(checker: Checker) -> str:
    """Rings of two to 1024 entries work; packed ones of any number between."""
    seen = []
    for form in checker.formats():
        sizes = (2, 64, 100, 1024) if form else (2, 64, 1024)
        for size in sizes:
            with checker.card(checker.all_features() | form, size=size) as card:
                card.send(2 * size, longest=200)
        seen.append(" ".join(str(size) for size in sizes))
    return "; packed ".join(seen)


def wrap(checker: Checker) -> str:
    """Indices wrap around at 65535, and the laps of a packed ring at its end."""
    for form in checker.formats():
        # A packed ring of 256 entries: index 200, wrap counter 0, for both sides.
        start = 200 | 200 << 16 if form else 0xFF80
        with checker.card(checker.all_features() | form, start=start) as card:
            card.send(600)
    return "both indices passed 65535"


def merged(checker: Checker) -> str:
    """A frame may be longer than a receive buffer."""
    checker.need(MRG_RXBUF)
    if not checker.echoes:
        raise Unchecked("packets do not come back")
    with checker.card(VERSION_1 | MRG_RXBUF, rx_size=256) as card:
        card.send(100)
    return "frames over up to six buffers"


def num_buffers(checker: Checker) -> str:
    """num_buffers is 1 if one buffer is enough (5.1.6.4), also without MRG_RXBUF."""
    if not checker.echoes:
        raise Unchecked("packets do not come back")
    for bits in (0, MRG_RXBUF & checker.features):
        with checker.card(VERSION_1 | bits) as card:
            card.send(8)
            counts = {struct.unpack_from("<H", p, 10)[0] for p in card.drivers[0].received}
            if counts != {1}:
                with_ = "with" if bits else "without"
                raise Failed(f"num_buffers is {sorted(counts)}, {with_} MRG_RXBUF")
    return ""


def stop_and_start(checker: Checker) -> str:
    """Rings stop and start ten times, with packets in between."""
    for form in checker.formats():
        with checker.card(checker.all_features() | form) as card:
            for _ in range(10):
                card.send(40)
                card.stop()
                card.start()
    return "10 times"


def waiting(checker: Checker) -> str:
    """Chains that became available while the rings were stopped are served after the start,
    without a kick by the driver.
    """
    for form in checker.formats():
        with checker.card(checker.all_features() | form) as card:
            driver = card.drivers[0]
            card.send(10)
            card.stop()
            for _ in range(20):
                driver.queue(card.frame(100))
            driver.tx.publish(kick=False)
            card.start()
            card.finished(driver)
    return "20 packets"


def _ways(bits: int) -> str:
    """What was negotiated, in words."""
    form = "packed ring, " if bits & RING_PACKED else ""
    return f"{form}{'with' if bits & EVENT_IDX else 'without'} EVENT_IDX"


def called(checker: Checker) -> str:
    """The back-end interrupts a driver that asks for it, on each ring."""
    for bits in checker.suppressions():
        with checker.card(VERSION_1 | bits) as card:
            driver = card.drivers[0]
            rings = [driver.tx] + ([driver.rx] if checker.echoes else [])
            for _ in range(20):
                for ring in rings:
                    ring.call_fd.drain()
                    ring.enable_interrupts()
                driver.queue(card.frame(100))
                driver.tx.publish()
                for ring in rings:
                    if not select.select([ring.call_fd.fileno()], [], [], checker.timeout)[0]:
                        raise Failed(
                            f"ring {ring.index}: no interrupt in {checker.timeout:g} s, "
                            f"{_ways(bits)}"
                        )
                card.finished(driver)
                patience = checker.timeout if checker.echoes else 0
                wait_for(card.back, patience)
    return "20 times"


def not_called(checker: Checker) -> str:
    """The back-end does not interrupt a driver that does not ask. The specification allows such
    interrupts; users do not.
    """
    for bits in checker.suppressions():
        with checker.card(VERSION_1 | bits) as card:
            driver = card.drivers[0]
            card.send(40)  # the signals of a start are over
            driver.tx.disable_interrupts()
            driver.tx.call_fd.drain()
            card.send(40)
            if select.select([driver.tx.call_fd.fileno()], [], [], 0)[0]:
                raise Failed(f"interrupts nobody asked for, {_ways(bits)}")
    return ""


def queue_pairs(checker: Checker) -> str:
    """Several queue pairs work at once."""
    pairs = checker.queues or min(checker.pairs, 4)
    if pairs < 2:
        raise Skipped("there is one queue pair")
    for form in checker.formats():
        with checker.card(checker.all_features() | form, pairs=pairs) as card:
            for pair in 3 * [*range(pairs)]:
                try:
                    card.send(40, pair=pair)
                except Failed as e:
                    raise Failed(
                        f"pair {pair} of {pairs} (it says that it has {checker.pairs}): {e}"
                    ) from None
    return f"{pairs} of {checker.pairs}"


def reconnect(checker: Checker) -> str:
    """The front-end vanishes and returns: five times, with the same rings and memory. How far a
    packed ring is, only a back-end with in-flight notes can tell.
    """
    seen = "5 times"
    for form in checker.formats():
        with checker.card(checker.all_features() | form) as card:
            assert card.path is not None
            if form and not card.path.report()["inflight"]:
                return f"{seen}; packed rings not, which takes INFLIGHT_SHMFD"
            _reconnect(checker, card, card.path)
    return seen


def _reconnect(checker: Checker, card: DrivenCard, path: VhostUserNet) -> None:
    for times in range(2, 7):
        card.send(40)
        path.drop()

        def back(times: int = times) -> bool:
            return path.counters()["connections"] >= times and path.connected

        if not wait_for(back, checker.timeout):
            raise Failed(f"it does not serve a front-end that comes again: {path.problems[-1:]}")
        path.problems.clear()
        for driver in card.drivers:
            driver.tx.publish()
    card.send(40)


def dirty_log(checker: Checker) -> str:
    """While a guest migrates, the back-end marks each page that it writes; also if that begins
    while the rings are served.
    """
    if not checker.features & LOG_ALL:
        raise Skipped("LOG_ALL is not offered")
    seen = []
    for form in checker.formats():
        with checker.card(checker.all_features() | form) as card, FrontendLog(card.memory) as log:
            card.send(40)
            if not card.log(log):
                raise Skipped("LOG_SHMFD is not offered")
            card.send(60)
            card.stop()  # nothing is written, and so marked, any more
            written, marked = card.written(), log.pages()
            missing = [f"{what} at {at:#x}" for at, what in written.items() if at not in marked]
            if missing:
                kind = "packed: " if form else ""
                raise Failed(
                    f"{kind}{len(missing)} of {len(written)} pages that it has written are not"
                    f" marked: {', '.join(missing[:3])}"
                )
            seen.append(f"{len(written)}")
            card.start()
            card.send(40)
    return f"{'; packed '.join(seen)} pages"


def malformed_ring(checker: Checker) -> str:
    """A head outside of the table, or a packed descriptor outside of memory, stops a ring, but does
    not end the back-end.
    """
    told = []
    for form in checker.formats():
        card = DrivenCard(checker, checker.all_features() | form)
        try:
            card.drivers[0].tx.spoil()
            assert card.path is not None
            path = card.path
            told.append(
                wait_for(
                    lambda: path.counters()["ring_errors"] or path.problems,  # noqa: B023
                    min(1.0, checker.timeout),
                )
            )
            checker.note_rings(card.drivers)
        finally:
            card.close()
        with checker.card() as other:
            other.send(40)
    return "ERR was signalled" if all(told) else "in silence"


def unknown_request(checker: Checker) -> str:
    """An unknown request is refused or ends the session; the next session is served."""
    with checker.session() as session:
        patience = min(1.0, checker.timeout)
        try:
            answer = session.channel.ask(199, b"12345678", need_reply=True, timeout=patience)
            answer.close()
            seen = "refused" if answer.u64 else "acknowledged"
        except TimedOut:
            seen = "ignored"
        except VhostUserError:
            seen = "the session ends"
    if seen == "acknowledged":
        raise Failed("a request that does not exist is acknowledged as done")
    with checker.card() as card:
        card.send(10)
    return seen


def garbage(checker: Checker) -> str:
    """Bytes that are no message, or part of a message, end a session; the next one is served."""
    for data in (
        b"\xff" * 64,
        struct.pack(spec.HEADER, 1, 1, 0xFFFFFFFF),
        struct.pack(spec.HEADER, 5, 1, 40) + bytes(7),
    ):
        channel = checker.subject.dial()
        try:
            channel.send_bytes(data)
        finally:
            channel.close()
        with checker.card() as card:
            card.send(10)
    return ""


#: Where it is written: sections of virtio 1.2, and of QEMU's docs/interop/vhost-user.rst.
SERVED = "virtio 1.2, 2.7.8.2"
FEATURES = {
    EVENT_IDX: "2.7.7 and 2.7.10",
    INDIRECT: "2.7.5.3",
    MRG_RXBUF: "5.1.6.3.1 and 5.1.6.4",
    RING_PACKED: "2.8",
}


def _combinations() -> list[tuple[str, Callable[[Checker], str], str]]:
    out = []
    for n in range(1 << len(NAMES)):
        bits = [bit for i, bit in enumerate(NAMES) if n >> i & 1]
        name = "features VERSION_1" + "".join(f"+{NAMES[b]}" for b in bits)
        clause = ", ".join([SERVED, *(FEATURES[b] for b in bits)])
        out.append((name, _with(sum(bits)), clause))
    return out


#: Name, check, and where it is written what a back-end must do.
ITEMS: list[tuple[str, Callable[[Checker], str], str]] = [
    ("negotiation", negotiation, "virtio 1.2, 6.1; vhost-user, Communication"),
    *_combinations(),
    ("ring sizes", ring_sizes, "virtio 1.2, 2.7"),
    ("indices wrap", wrap, "virtio 1.2, 2.7.6 and 2.7.8"),
    ("merged receive buffers", merged, "virtio 1.2, 5.1.6.3.1"),
    ("num_buffers", num_buffers, "virtio 1.2, 5.1.6.4"),
    ("rings stop and start", stop_and_start, "vhost-user, VHOST_USER_GET_VRING_BASE"),
    ("packets wait for a start", waiting, "vhost-user, Starting and stopping rings"),
    ("interrupts when asked for", called, "virtio 1.2, 2.7.7.2"),
    ("no interrupts when not asked for", not_called, "virtio 1.2, 2.7.7"),
    ("queue pairs", queue_pairs, "virtio 1.2, 5.1.2; vhost-user, Multiple queue support"),
    ("front-end reconnects", reconnect, "vhost-user, Backend program conventions"),
    ("pages are marked for a migration", dirty_log, "vhost-user, Migration"),
    ("malformed ring", malformed_ring, "vhost-user, VHOST_USER_SET_VRING_ERR"),
    ("unknown request", unknown_request, "vhost-user, VHOST_USER_PROTOCOL_F_REPLY_ACK"),
    ("garbage", garbage, "vhost-user, Message Specification"),
]
