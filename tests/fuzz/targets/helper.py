"""The helper of a confined VMM that somebody has taken over: whatever it is asked for, it does what
was permitted and nothing else, answers, and goes on.
"""

from __future__ import annotations

import contextlib
import os
import re
import socket
from typing import TYPE_CHECKING

from pyvmm import helper
from pyvmm._ext import lib
from pyvmm.backend.vduse import own_name
from pyvmm.errors import PyvmmError
from pyvmm.hostnet import netns
from pyvmm.hostnet.rights import FDS_MAX, recv_fds, send_fds
from tests.fuzz.data import Data

if TYPE_CHECKING:
    from collections.abc import Callable

SETTING = ("tap7", str(lib.SIOCSIFMTU), "dc050000")
#: What the command line has named.
PERMITTED = {
    ("connect", "/run/a/s"),
    ("listen", "/run/a/t"),
    ("remove", "/run/a/t"),
    ("open", "/boot/kernel"),
    ("tap", "tap7"),
    ("interface", "tap7"),
    ("setting", " ".join(SETTING)),
    ("macvtap", "eth7"),
    ("vdpa", "card0"),
    ("vduse", ""),
    ("tool", "ping /bin/ping"),
    ("start", helper.BACKEND),
    ("start", f"{helper.USER_NETWORK} 0"),
}
WORDS = (
    *("", "0", "1", "3", "-1", "99999999999", "lo", "tap7", "eth7", "card0", "s", "/dev/mem"),
    *("/run/a/s", "/run/a/t", "/boot/kernel", "/run/a/../a/s", "3,4", "1500", "00" * 24, "zz"),
    *(str(n) for n in (lib.SIOCGIFMTU, lib.SIOCSIFMTU, lib.SIOCSIFFLAGS, lib.SIOCBRADDIF)),
    *("ping", "echo", "/bin/ping", "end"),
    *helper.MODULES,
)
ORDERS = (*helper.OPERATIONS, "start", "kill", "permit", "seal", "execve", "")
#: Operations that need no permission: what they make is the VMM's alone. What ``packets`` hears is
#: judged by the namespace that comes along.
FREE = ("namespace", "steering", "route", "packets")


def allowed(order: str, words: list[str]) -> bool:
    """Whether an operation that is done was permitted, as the documentation has it."""
    if order in FREE:
        return True
    if order == "traffic":  # of a tap of the host, or of one in a namespace that the helper made
        places = words[3:]
        return netns.ours(int(places[0])) if places else words[0] == "tap7"
    if order == "tool":  # in a namespace that the helper made
        return words[1] == "end" or (
            ("tool", f"{words[0]} {words[2]}") in PERMITTED and netns.ours(int(words[6]))
        )
    if order == "vduse":
        return not words[0] or is_own(words[0])
    if order == "vdpa":
        return words[0] == "card0" or is_own(words[0])
    if order == "interface":
        return words[0] == "tap7" and (words[1] != SETTING[1] or tuple(words) == SETTING)
    return (order, words[0]) in PERMITTED


def is_own(name: str) -> bool:
    """Whether a vDPA device is one of the VMM's own, by its whole name."""
    own = own_name(0, os.getppid()).removesuffix("0")
    return name.startswith(own) and re.fullmatch("0|[1-9][0-9]*", name[len(own) :]) is not None


class Deeds:
    """Stands in for what the helper does.

    :ivar done: what was done, and whether it was ``allowed``.
    """

    def __init__(self) -> None:
        self.done: list[tuple[str, list[str], bool]] = []

    def operation(self, name: str) -> Callable[[list[str]], helper.Result]:
        def do(words: list[str]) -> helper.Result:
            good = False
            try:  # now, because the descriptors that came along are closed afterwards
                good = allowed(name, words)
            finally:
                self.done.append((name, words, good))
            return ["done"], []

        return do

    def spawn(self, name: str, silent: bool, numbers: str, words: list[str], fds: list[int]) -> int:
        to = [int(number) for number in numbers.split(",") if number]
        assert (name, words[6:]) in [(helper.USER_NETWORK, ["0"])] or name == helper.BACKEND
        return len(to)


def make(argument: str) -> Callable[[bytes], None]:
    """What runs one input: a few requests."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours.setblocking(False)
    deeds = Deeds()
    helper._operation = deeds.operation
    helper._spawn = deeds.spawn
    parent = os.getppid()
    own = own_name(3, parent)
    # A namespace that the helper has made, as it were, one that it has not, and no namespace.
    places = ("/proc/self/ns/net", "/proc/self/ns/user", os.devnull)
    files = [os.open(path, os.O_RDONLY) for path in places]
    netns._made.add(os.fstat(files[0]).st_ino)

    def request(d: Data) -> bytes:
        words = ["7", d.of(ORDERS)]
        for _ in range(d.below(9)):
            kind = d.below(8)
            word = d.of(WORDS) if kind else d.some(24).decode(errors="surrogateescape")
            words.append(own + word if kind == 1 else word)
        if d.one_in(16):
            words.append("x" * d.number(2))
        return "\0".join(words).encode(errors="surrogateescape")[: helper.MESSAGE_MAX]

    def hear() -> None:
        answered, fds = recv_fds(ours, helper.MESSAGE_MAX, FDS_MAX)
        helper.heard(answered.partition(b"\0")[2], fds, "the helper")

    def one(data: bytes) -> None:
        d = Data(data)
        rules = helper._Rules()
        for pair in PERMITTED:
            rules.permit(*pair)
        rules.sealed = True
        while d.left:
            deeds.done.clear()
            send_fds(ours, request(d), [files[d.below(3)] for _ in range(d.below(3))])
            if not helper._serve_one(theirs, rules, parent):
                continue  # an empty message is as the end
            with contextlib.suppress(PyvmmError, OSError, RuntimeError):
                hear()
            for order, words, permitted in deeds.done:
                assert permitted, (order, words)

    return one
