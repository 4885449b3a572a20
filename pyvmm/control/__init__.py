"""The control socket of a running machine: QEMU's Machine Protocol (docs/control.md)."""

from __future__ import annotations

from pyvmm import __version__

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping

    from pyvmm.control.commands import Controlled
    from pyvmm.control.registry import Claim
    from pyvmm.control.server import Command, Server


def serve(machine: Controlled, claim: Claim) -> Server:
    """Make the control socket of ``machine`` and serve it in a thread.

    :param claim: the machine's name; the server closes it.
    :raises UsageError: no socket can be made at the claim's path.
    """
    from pyvmm.control.server import Server, version

    claim.listen()
    return Server(claim, _commands, machine, {"version": version(__version__), "capabilities": []})


def _commands() -> Mapping[str, Command]:
    from pyvmm.control.commands import COMMANDS

    return COMMANDS
