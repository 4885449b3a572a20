"""Probe a vhost-user back-end without a guest: what it offers, how it answers each message, and how
fast it answers.

For people who write back-ends. The back-end gets a memory of the probe's own with empty rings, so
it sends no packets.
"""

from __future__ import annotations

import struct
import time

from pyvmm.datapath.vhost_user import DATA_MASK, NET_PROTOCOL_FEATURES
from pyvmm.errors import VhostUserError
from pyvmm.fd import Closing, eventfds
from pyvmm.memory import GuestMemory
from pyvmm.spec import vhost_user as spec
from pyvmm.spec.vhost_user import VRING_STATE
from pyvmm.vhostuser.session import PROTOCOL_FEATURES, RUNNING
from pyvmm.vhostuser.wire import Closed, Region, connect, pack_regions, protocol_names, request_name

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

#: The addresses of the rings, which have 256 entries each.
RING_SIZE, RING_STEP, RING_BASE = 256, 0x4000, 0x10000


class Step:
    """One message and its result.

    :ivar outcome: ``ok``, ``refused``, ``sent`` (the message has no answer), or what went wrong.
        :ivar detail: the reply in words.
    :ivar microseconds: from the first byte sent to the last byte received.
    """

    __slots__ = ("detail", "message", "microseconds", "outcome")

    def __init__(self, message: str, outcome: str, detail: str, microseconds: float) -> None:
        self.message, self.outcome, self.detail, self.microseconds = (
            message,
            outcome,
            detail,
            microseconds,
        )


class Probe(Closing):
    """A conversation with the back-end at ``path``; each message is added to ``steps``.

    :param timeout: seconds for each answer. :ivar features, protocol: what the back-end offers, as
        masks; :ivar queues: its queue pairs, or None if it does not say.
    """

    def __init__(self, path: str, *, timeout: float = 2.0) -> None:
        self.path, self.timeout = path, timeout
        self.steps: list[Step] = []
        self.features = self.protocol = 0
        self.queues: int | None = None
        self._used = 0  # the protocol features in use, as a mask
        self._channel = connect(path)

    def _do(
        self,
        request: int,
        payload: bytes = b"",
        fds: Sequence[int] = (),
        *,
        answers: Sequence[str] = (),
        show: object = "",
    ) -> tuple[int, ...]:
        """Send one message and note the step. ``answers``: layouts that the reply may have,
        if there is one.
        """
        name = request_name(request)
        label = f"{name}({show})" if show != "" else name
        ack = not answers and bool(self.protocol >> spec.VHOST_USER_PROTOCOL_F_REPLY_ACK & 1)
        start = time.monotonic_ns()
        values: tuple[int, ...] = ()
        outcome, detail = "sent", ""
        try:
            if answers or ack:
                answer = self._channel.ask(
                    request, payload, fds, need_reply=ack, timeout=self.timeout
                )
                try:
                    values = answer.unpack(*(answers or ["<Q"]))
                    if answer.fds:
                        detail = f"{len(answer.fds)} descriptor(s) "
                finally:
                    answer.close()
                outcome = "refused" if ack and values[0] else "ok"
                if answers:
                    detail += " ".join(f"{v:#x}" for v in values)
            else:
                self._channel.send(request, payload, fds, timeout=self.timeout)
        except VhostUserError as e:
            outcome = "closed the connection" if isinstance(e, Closed) else e.cause
            self.steps.append(Step(label, outcome, "", (time.monotonic_ns() - start) / 1000))
            raise
        self.steps.append(Step(label, outcome, detail, (time.monotonic_ns() - start) / 1000))
        return values

    def _has(self, bit: int) -> bool:
        return bool(self._used >> bit & 1)

    def run(self) -> None:
        """Send all messages that make sense with the offered features. :raises VhostUserError: the
        conversation ended early; see ``steps``.
        """
        self.features = self._do(spec.VHOST_USER_GET_FEATURES, answers=["<Q"])[0]
        has_protocol = bool(self.features >> spec.VHOST_USER_F_PROTOCOL_FEATURES & 1)
        if has_protocol:
            offered = self._do(spec.VHOST_USER_GET_PROTOCOL_FEATURES, answers=["<Q"])[0]
            self._used = known = offered & (PROTOCOL_FEATURES | NET_PROTOCOL_FEATURES)
            self._do(
                spec.VHOST_USER_SET_PROTOCOL_FEATURES,
                struct.pack("<Q", known),
                show="+".join(protocol_names(known)),
            )
            self.protocol = offered

        if self._has(spec.VHOST_USER_PROTOCOL_F_MQ):
            self.queues = self._do(spec.VHOST_USER_GET_QUEUE_NUM, answers=["<Q"])[0]
        if self._has(spec.VHOST_USER_PROTOCOL_F_CONFIGURE_MEM_SLOTS):
            self._do(spec.VHOST_USER_GET_MAX_MEM_SLOTS, answers=["<Q"])
        self._do(spec.VHOST_USER_SET_OWNER)
        with _Rings() as rings:
            self._set_up(rings, has_protocol)
            self._take_down()

    def _set_up(self, rings: _Rings, has_protocol: bool) -> None:
        if self._has(spec.VHOST_USER_PROTOCOL_F_MTU):
            self._do(spec.VHOST_USER_NET_SET_MTU, struct.pack("<Q", 1500), show=1500)
        if self._has(spec.VHOST_USER_PROTOCOL_F_INFLIGHT_SHMFD):
            wanted = struct.pack(spec.INFLIGHT, 0, 0, 2, RING_SIZE)
            layouts = [spec.INFLIGHT, spec.INFLIGHT_UNPADDED]
            self._do(spec.VHOST_USER_GET_INFLIGHT_FD, wanted, answers=layouts)
        bits = self.features & (DATA_MASK | 1 << spec.VHOST_USER_F_PROTOCOL_FEATURES)
        self._do(spec.VHOST_USER_SET_FEATURES, struct.pack("<Q", bits), show=f"{bits:#x}")
        region, fd = rings.region, rings.memory.fd.fileno()
        if self._has(spec.VHOST_USER_PROTOCOL_F_CONFIGURE_MEM_SLOTS):
            self._do(spec.VHOST_USER_ADD_MEM_REG, bytes(8) + region.pack(), [fd])
        else:
            self._do(spec.VHOST_USER_SET_MEM_TABLE, pack_regions([region]), [fd])
        for i in (0, 1):
            state = struct.pack(VRING_STATE, i, RING_SIZE)
            self._do(spec.VHOST_USER_SET_VRING_NUM, state, show=f"{i}, {RING_SIZE}")
            self._do(spec.VHOST_USER_SET_VRING_BASE, struct.pack(VRING_STATE, i, 0), show=f"{i}, 0")
            self._do(spec.VHOST_USER_SET_VRING_ADDR, rings.address(i), show=i)
            for k, request in enumerate(
                (
                    spec.VHOST_USER_SET_VRING_ERR,
                    spec.VHOST_USER_SET_VRING_KICK,
                    spec.VHOST_USER_SET_VRING_CALL,
                )
            ):
                self._do(request, struct.pack("<Q", i), [rings.events[3 * i + k].fileno()], show=i)
        if has_protocol:
            for i in (0, 1):
                self._do(
                    spec.VHOST_USER_SET_VRING_ENABLE, struct.pack(VRING_STATE, i, 1), show=f"{i}, 1"
                )
        if self._has(spec.VHOST_USER_PROTOCOL_F_STATUS):
            self._do(spec.VHOST_USER_SET_STATUS, struct.pack("<Q", RUNNING), show=f"{RUNNING:#x}")
            self._do(spec.VHOST_USER_GET_STATUS, answers=["<Q"])

    def _take_down(self) -> None:
        if self._has(spec.VHOST_USER_PROTOCOL_F_RARP):
            self._do(spec.VHOST_USER_SEND_RARP, bytes.fromhex("5254001234560000"))
        for i in (0, 1):
            state = struct.pack(VRING_STATE, i, 0)
            self._do(spec.VHOST_USER_GET_VRING_BASE, state, answers=[VRING_STATE], show=i)
        if self._has(spec.VHOST_USER_PROTOCOL_F_RESET_DEVICE):
            self._do(spec.VHOST_USER_RESET_DEVICE)
        self._do(spec.VHOST_USER_GET_FEATURES, answers=["<Q"])

    def close(self) -> None:
        """Disconnect."""
        self._channel.close()


class _Rings:
    """1 MiB of memory with two empty rings, and their eventfds."""

    def __init__(self) -> None:
        self.events = eventfds(6)
        self.memory = GuestMemory(1 << 20)
        r = self.memory.regions[0]
        self.region = Region(r.gpa, r.size, r.host, r.offset)

    def address(self, i: int) -> bytes:
        at = self.region.user + RING_BASE + i * RING_STEP
        return struct.pack(spec.VRING_ADDR, i, 0, at, at + 0x2000, at + 0x1000, 0)

    def __enter__(self) -> _Rings:
        return self

    def __exit__(self, *exc: object) -> None:
        for event in self.events:
            event.close()
        self.memory.close()
