"""Traffic control of a tap by tc(8): what is done on purpose to frames that no worker of pyvmm
moves.

The tap sends the frames for the guest (rx), so they wait in its root qdisc. It receives those of
the guest (tx), and an ingress has no queue: a filter there redirects them to an ifb, which gives
them back behind its own root qdisc. Captures at the tap see a frame of the guest before that, and a
frame for the guest after it.
"""

from __future__ import annotations

import os
import re
from contextlib import suppress
from socket import if_nametoindex
from struct import iter_unpack

from pyvmm import helper
from pyvmm.errors import HostError, NetForbidden, PyvmmError, UsageError
from pyvmm.hostnet.netns import enter_and
from pyvmm.hostnet.packets import needs as needs_of_a_tap
from pyvmm.hostnet.rtnetlink import has_root_qdisc
from pyvmm.programs import program

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

    from pyvmm.hostnet.netns import Namespace

#: Of what is done to one way, a whole number each, 0 for nothing: chances of 2^32; nanoseconds;
#: frames that may wait; bits per second; bytes. ``overtake``: so many go at once in spite of
#: ``delay``.
NUMBERS = ("loss", "duplicate", "corrupt", "delay", "jitter", "overtake", "queue", "rate", "burst")
WAYS = ("rx", "tx")
#: The handle of our root qdisc, by which we know it again; those below it have the next ones.
ROOT = 0x7076
#: Seconds for tc, which waits for the kernel's lock of all interfaces.
PATIENCE_S = 60.0
#: Names that are one word of a command, and no option.
NAME = re.compile(r"\w[\w.-]{0,14}", re.ASCII)
#: BPF_RET | BPF_K (linux/bpf_common.h), with which each of libpcap's programs ends.
RET_K = 0x06


class Shape:
    """What is done to the frames of one way.

    :param numbers: of ``NUMBERS``; those that are left out are 0.
    :param code: instructions (``struct sock_filter``): to the frames only for which they return
        something else than 0; empty: to all.
    """

    __slots__ = ("code", "numbers")

    def __init__(self, numbers: Mapping[str, int], code: bytes = b"") -> None:
        self.numbers = {name: int(numbers.get(name, 0)) for name in NUMBERS}
        self.code = code

    def word(self) -> str:
        """For the helper."""
        return " ".join([*map(str, self.numbers.values()), self.code.hex()])

    @classmethod
    def of_word(cls, word: str) -> Shape:
        """The shape of ``word()``. :raises ValueError: there is none."""
        *numbers, code = word.split(" ")
        return cls(
            dict(zip(NUMBERS, map(int, numbers), strict=True)),
            bytes.fromhex(code),
        )

    def qdisc(self) -> list[str]:
        """tc's words for the qdisc that does it: tbf for a burst, else netem."""
        n = self.numbers
        if n["burst"]:
            limit = min(n["queue"] << 16, (1 << 32) - 1)  # bytes: each frame has 64 KiB at most
            return ["tbf", *f"rate {n['rate']}bit burst {n['burst']} limit {limit}".split()]
        words = ["netem", "limit", str(n["queue"])]
        if n["delay"] or n["jitter"]:
            words += ["delay", *(f"{microseconds(n[name])}us" for name in ("delay", "jitter"))]
        for name in ("loss", "duplicate", "corrupt"):
            if n[name]:
                words += [name, _percent(n[name])]
        if n["overtake"]:
            words += ["reorder", _percent(n["overtake"])]
        if n["rate"]:
            words += ["rate", f"{n['rate']}bit"]
        return words


def percent_text(odds: int) -> str:
    """A chance of 2^32 in percent, as tc is told."""
    return f"{odds / 2**32 * 100:.7f}"


def microseconds(ns: int) -> int:
    """A time as tc is told."""
    return round(ns / 1000)


def _percent(odds: int) -> str:
    return f"{percent_text(odds)}%"


class Tc:
    """tc of one tap.

    :param namespace: of our own, with the tap in it; None: the tap is in that of this process.
    """

    def __init__(self, tap: str, namespace: Namespace | None) -> None:
        self._tap = tap
        places = [] if namespace is None else [namespace.net, namespace.user]
        self._places = [fd for fd in places if fd is not None]

    def set(self, shapes: Mapping[str, Shape]) -> None:
        """Have these shapes, by way, in the place of those before; none take all away, also those
        that somebody left behind who was killed. If nothing is there, that needs no tc.

        :raises UsageError: the tap has a qdisc of somebody else's. :raises NetForbidden: this user
            may not. :raises HostError: there is no tc, or it refuses; then there are no shapes.
        """
        self._do("set", *(shapes[way].word() if way in shapes else "" for way in WAYS))

    def look(self) -> dict[str, dict[str, int]]:
        """By way, of the shapes in force, what tc counts: frames that were ``sent`` and
        ``dropped``, and that are ``waiting``; ``overlimits``, how often a token bucket was empty.

        :raises HostError: as ``set``.
        """
        import json

        found: dict[str, dict[str, int]] = json.loads(self._do("look"))
        return found

    def _do(self, job: str, *words: str) -> str:
        try:
            fds = [fd.fileno() for fd in self._places]
            said, _ = helper.do("traffic", self._tap, job, "\n".join(words), fds=fds)
        except OSError as e:
            raise HostError(f"no traffic control of {self._tap}: {e.strerror}") from e
        return said[0]


def needs(words: list[str]) -> list[tuple[str, str]]:
    """The permissions of the helper that ``control`` with these words needs: for a tap of the host,
    ``traffic`` with its name; for one of a namespace, that the namespace is ours.
    """
    tap, _job, _text, *places = words
    return needs_of_a_tap([tap, *places]) if places else [("traffic", tap)]


def control(words: list[str]) -> tuple[list[str], list[int]]:
    """Do what ``Tc`` asks for; an operation of ``helper``.

    :param words: the tap; ``set`` or ``look``; shapes, one per line; then the numbers of no
        descriptor, or of those of a network namespace and perhaps its user namespace.
    :returns: what is counted, as JSON. :raises UsageError, HostError, OSError: see ``Tc``.
    """
    tap, job, text, *places = words
    if not NAME.fullmatch(tap):  # whoever asks may be somebody else's by now, and tc has commands
        raise HostError(f"no traffic control of {tap!r}", "name the tap by letters and digits")
    shapes = {
        way: Shape.of_word(word) for way, word in zip(WAYS, text.split("\n"), strict=False) if word
    }

    def inside() -> tuple[list[str], list[int]]:
        if job == "look":
            return [_look(tap)], []
        left = _left(tap)
        if not shapes and not left:
            return [""], []
        try:
            _clear(tap)
            try:
                _make(tap, shapes)
            except BaseException:
                with suppress(PyvmmError):  # what it could not have is what the user is told
                    _clear(tap)
                raise
        except NetForbidden as e:
            raise _forbidden(tap, left, e) from e
        return [""], []

    return enter_and(inside, *map(int, places)) if places else inside()


def _forbidden(tap: str, left: list[str], error: NetForbidden) -> NetForbidden:
    """What an ordinary user is told. :param left: see ``_left``."""
    if left:
        return NetForbidden(
            f"tap {tap} still has faults on demand, and you may not take them away: {error.cause}",
            f"as root: {'; '.join(left)}",
        )
    return NetForbidden(
        f"faults on demand at tap {tap} need root: {error.cause}",
        "run as root; or use --net emulated; or leave out tap=",
    )


def ifb_of(tap: str) -> str:
    """The name of the tap's ifb, by the tap's number: names of taps are too long for a prefix.

    :raises OSError: there is no such tap.
    """
    return f"pvifb{if_nametoindex(tap)}"


def _run(name: str, *argv: str, lines: str = "") -> str:
    """Run tc or ip; its output."""
    import subprocess

    try:
        path = program(name)
    except FileNotFoundError as e:
        raise HostError(
            f"there is no program {name} here",
            "apt install iproute2; a machine with --jail has none: use --net emulated",
        ) from e
    env = {**os.environ, "LC_ALL": "C"}
    try:
        done = subprocess.run(
            [path, *argv], input=lines, capture_output=True, text=True, timeout=PATIENCE_S, env=env
        )
    except subprocess.TimeoutExpired as e:  # which subprocess has killed
        raise HostError(
            f"{name} has not ended after {PATIENCE_S:g} s: {' '.join(argv[:4])}",
            "see what holds the kernel's lock of all interfaces: dmesg",
        ) from e
    if done.returncode:
        said = next((s for s in done.stderr.splitlines() if s.strip()), f"{done.returncode}")
        if "not permitted" in said:
            raise NetForbidden(f"{name}: Operation not permitted")
        remedy = ""
        if "unknown" in said or "No such file" in said or "not supported" in said:
            remedy = "as root: modprobe -a sch_netem sch_tbf sch_ingress act_mirred cls_bpf ifb"
        raise HostError(f"{name}: {said[:200]}", remedy)
    return done.stdout


def _qdiscs(interface: str) -> list[dict[str, Any]]:
    import json

    found: list[dict[str, Any]] = json.loads(
        _run("tc", "-s", "-j", "qdisc", "show", "dev", interface) or "[]"
    )
    return found


def _exists(interface: str) -> bool:
    try:
        return if_nametoindex(interface) > 0
    except OSError:
        return False


def _left(tap: str) -> list[str]:
    """The commands that take away what of ours may be there: mostly none, and found without tc.

    :raises OSError: there is no such tap.
    """
    out = []
    if has_root_qdisc(if_nametoindex(tap), ROOT):
        out.append(f"tc qdisc del dev {tap} root")
    if _exists(ifb_of(tap)):
        out += [f"tc qdisc del dev {tap} ingress", f"ip link del {ifb_of(tap)}"]
    return out


def _root_is_ours(interface: str) -> bool:
    return any(q.get("root") and q["handle"] == f"{ROOT:x}:" for q in _qdiscs(interface))


def _clear(tap: str) -> None:
    """Take away what is ours. :raises UsageError: something else is there; all is as before."""
    ifb, ours = ifb_of(tap), f"{ROOT:x}:"
    redirected = _exists(ifb)
    if redirected and not _root_is_ours(ifb):
        raise UsageError(
            f"there is an interface {ifb} of somebody else's", f"as root: ip link del {ifb}"
        )
    lines = []
    for qdisc in _qdiscs(tap):
        kind, handle = qdisc["kind"], qdisc["handle"]
        if qdisc.get("root") and handle == ours:
            lines.append(f"qdisc del dev {tap} root")
        elif kind == "ingress" and redirected:
            lines.append(f"qdisc del dev {tap} ingress")
        elif kind in ("ingress", "clsact") or (qdisc.get("root") and handle != "0:"):
            place = kind if kind in ("ingress", "clsact") else "root"
            raise UsageError(
                f"{tap} has a qdisc of somebody else's: {kind}",
                f"as root: tc qdisc del dev {tap} {place}",
            )
    if lines:
        _batch(lines)
    if redirected:  # the last, because the ingress is known as ours by it
        _run("ip", "link", "del", ifb)


def _make(tap: str, shapes: Mapping[str, Shape]) -> None:
    lines: list[str] = []
    if "tx" in shapes:
        ifb = ifb_of(tap)
        _make_ifb(ifb, shapes["tx"])
        lines += [f"qdisc add dev {tap} ingress"]
        act = f"action mirred egress redirect dev {ifb}"
        lines += [_filter(tap, "ffff:", shapes["tx"], act)]
    if "rx" in shapes:
        shape, place, handle = shapes["rx"], "root", ROOT
        if shape.code:  # others take the second band
            lines += [f"qdisc add dev {tap} root handle {ROOT:x}: prio bands 2 priomap{' 1' * 16}"]
            lines += [_filter(tap, f"{ROOT:x}:", shape, f"classid {ROOT:x}:1")]
            place, handle = f"parent {ROOT:x}:1", ROOT + 1
        lines += _queue(tap, place, handle, shape)
    if lines:
        _batch(lines)


def _batch(lines: list[str]) -> None:
    _run("tc", "-batch", "-", lines="".join(f"{line}\n" for line in lines))


def _make_ifb(ifb: str, shape: Shape) -> None:
    """Make an ifb with the root qdisc by which ``_clear`` knows it as ours, or none."""
    _run("ip", "link", "add", ifb, "type", "ifb")
    try:
        with suppress(HostError):  # a kernel without IPv6; else the ifb would send frames itself
            _run("ip", "link", "set", ifb, "addrgenmode", "none")
        _run("ip", "link", "set", ifb, "up")
        _batch(_queue(ifb, "root", ROOT, shape))
    except BaseException:
        with suppress(PyvmmError):
            _run("ip", "link", "del", ifb)
        raise


def _filter(interface: str, parent: str, shape: Shape, then: str) -> str:
    """The command that does ``then`` to the frames of a shape."""
    match = "matchall"
    if shape.code:
        # cls_bpf takes another number than -1 for a class.
        rows = [
            " ".join(map(str, (*row[:3], 0xFFFFFFFF if row[0] == RET_K and row[3] else row[3])))
            for row in iter_unpack("=HBBI", shape.code)
        ]
        match = f'bpf bytecode "{len(rows)},{",".join(rows)}"'
    return f"filter add dev {interface} parent {parent} protocol all prio 1 {match} {then}"


def _queue(interface: str, place: str, handle: int, shape: Shape) -> list[str]:
    """The commands that make a shape's qdisc."""
    front = f"qdisc add dev {interface}"
    lines = [f"{front} {place} handle {handle:x}: {' '.join(shape.qdisc())}"]
    if shape.numbers["burst"]:  # tbf itself counts bytes
        limit = shape.numbers["queue"]
        lines.append(f"{front} parent {handle:x}:1 handle {handle + 1:x}: pfifo limit {limit}")
    return lines


def _look(tap: str) -> str:
    """What the kernel has counted, as JSON."""
    import json

    out = {}
    for way, interface in zip(WAYS, (tap, ifb_of(tap)), strict=True):
        if not _exists(interface):
            continue
        for qdisc in _qdiscs(interface):
            number = int(qdisc["handle"].rstrip(":") or "0", 16)
            if qdisc["kind"] in ("netem", "tbf") and number in (ROOT, ROOT + 1):
                out[way] = {
                    "sent": int(qdisc["packets"]),
                    "dropped": int(qdisc["drops"]),
                    "waiting": int(qdisc["qlen"]),
                    "overlimits": int(qdisc["overlimits"]),
                }
    return json.dumps(out)
