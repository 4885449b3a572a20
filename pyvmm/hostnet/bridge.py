"""A tap that is a port of a bridge of the host's (``bridge=``)."""

from __future__ import annotations

import os

from pyvmm import helper
from pyvmm.errors import NetError, NetForbidden, UsageError
from pyvmm.hostnet.packets import permit
from pyvmm.hostnet.tap import Interface, Tap
from pyvmm.spec.ethernet import TAP_MAX_MTU

#: Taps of one process, at most: a name has 15 characters.
TAPS_MAX = 1000


def tap_of(bridge: str, name: str | None, *, mtu: int | None, queues: int, txqueuelen: int) -> Tap:
    """The tap ``name`` as a port of a bridge; owned by the caller. Without a name, a new tap, which
    goes with its last descriptor.

    :param mtu: bytes; by default a new tap has the bridge's, so that the bridge keeps that.
    :raises NetError: there is no such bridge, or the tap cannot become a port of it.
    :raises NetForbidden: this user may not do so.
    """
    try:
        theirs = Interface(bridge).mtu
    except OSError:
        made = f"ip link add {bridge} type bridge && ip link set {bridge} up"
        raise NetError(f"there is no bridge {bridge}", f"as root: {made}") from None
    if name is not None:
        tap = Tap(name, mtu=mtu, queues=queues, txqueuelen=txqueuelen)
    else:
        tap = _new(
            bridge, mtu=mtu or min(theirs, TAP_MAX_MTU), queues=queues, txqueuelen=txqueuelen
        )
    try:
        tap.join(bridge)
    except BaseException:
        tap.close()
        raise
    return tap


def _new(bridge: str, *, mtu: int, queues: int, txqueuelen: int) -> Tap:
    if helper.sealed():
        raise UsageError(
            f"bridge={bridge}: a confined machine makes no new port of a bridge",
            "name a tap of the command line: tap=NAME; or start with --sandbox off",
        )
    for number in range(TAPS_MAX):
        name = f"pv{os.getpid()}n{number}"
        if Interface(name).exists():
            continue
        try:
            tap = Tap(name, mtu=mtu, queues=queues, txqueuelen=txqueuelen)
        except NetForbidden as e:
            raise NetForbidden(
                f"may not make a tap for the bridge {bridge}",
                "run as root, or name a tap of yours that is a port of it: tap=NAME",
            ) from e
        if tap.created:
            permit(name)
            return tap
        tap.close()  # somebody else's, made a moment ago
    raise NetError(f"no name is left for a tap of {bridge}", "end other machines")
