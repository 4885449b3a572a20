"""The control socket of a running machine: QEMU's Machine Protocol (docs/control.md)."""

from __future__ import annotations

from pyvmm import __version__

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pyvmm.control.commands import Controlled
    from pyvmm.control.server import Server


def serve(machine: Controlled, name: str | None = None, path: str | None = None) -> Server:
    """Make the control socket of ``machine`` and serve it in a thread.

    :param name: the machine's name (default: the first free of ``vm0``, ...). :param path: the
        socket's path; default: in the runtime directory.
    :raises UsageError: the name is taken or bad, or no socket can be made at the path.
    :raises HostError: there is no private directory for the socket.
    """
    from pyvmm.control.commands import COMMANDS, version
    from pyvmm.control.registry import Claim
    from pyvmm.control.server import Server

    claim = Claim(name, path)
    try:
        return Server(
            claim, COMMANDS, machine, {"version": version(__version__), "capabilities": []}
        )
    except BaseException:
        claim.close()
        raise
