"""Packet sockets (packet(7)) on a tap, for captures of what a data path of the kernel or of another
process hands over.
"""

from __future__ import annotations

import os
import socket

from pyvmm import helper
from pyvmm._ext import lib
from pyvmm.errors import HostError, NetForbidden
from pyvmm.fd import Fd
from pyvmm.hostnet.netns import enter_and, ours
from pyvmm.hostnet.tap import index_of

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pyvmm.hostnet.netns import Namespace


def open_packets(tap: str, namespace: Namespace | None) -> Fd:
    """A packet socket that hears a tap, and takes no packet until ``pv_capture_filter()``
    (cext/capture.h).

    :param namespace: of our own, with the tap in it; None: the tap is in that of this process.
    :raises NetForbidden: this user may not. :raises HostError: the socket cannot be had.
    """
    places = [] if namespace is None else [namespace.net, namespace.user]
    try:
        _, fds = helper.do("packets", tap, fds=[fd.fileno() for fd in places if fd is not None])
    except PermissionError as e:
        raise NetForbidden(
            f"may not capture at tap {tap} ({e.strerror})",
            "run as root, leave out tap=, or use --net emulated",
        ) from e
    except OSError as e:
        raise HostError(f"cannot capture at tap {tap}: {e.strerror}") from e
    return Fd(fds[0])


def permit(tap: str) -> None:
    """Allow what this process may ask about a tap of the host when it is confined: the tap's number
    (live switches), faults by tc, captures.
    """
    helper.permit("interface", tap)
    helper.permit("traffic", tap)
    helper.permit("packets", _of_the_host(tap))


def _of_the_host(tap: str) -> str:
    return f"tap {tap}"  # no number of a namespace has a space


def needs(words: list[str]) -> list[tuple[str, str]]:
    """The permissions of the helper that ``open_described`` with these words needs: for a tap of
    the host, that of ``permit``; for one of a namespace, that the namespace is ours.
    """
    tap, *places = words
    if not places:
        return [("packets", _of_the_host(tap))]
    return [] if ours(int(places[0])) else [("packets", str(os.fstat(int(places[0])).st_ino))]


def open_described(words: list[str]) -> tuple[list[str], list[int]]:
    """Make a packet socket; an operation of ``helper``.

    :param words: the tap's name, then the numbers of no descriptor, or of those of a network
        namespace and perhaps its user namespace.
    :returns: the socket's descriptor. :raises OSError: from the kernel.
    """
    tap, *places = words

    def make() -> tuple[list[str], list[int]]:
        with socket.socket(socket.AF_PACKET, socket.SOCK_RAW | socket.SOCK_CLOEXEC, 0) as s:
            error = lib.pv_capture_open(s.fileno(), index_of(tap, s))
            if error:
                raise OSError(-error, os.strerror(-error))
            return [], [s.detach()]

    return enter_and(make, *map(int, places)) if places else make()
