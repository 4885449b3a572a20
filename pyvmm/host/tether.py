"""Child processes that do not outlive this process."""

from __future__ import annotations

from pyvmm.errors import HostError
from pyvmm.programs import which

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence


def tethered(argv: Sequence[str]) -> list[str]:
    """Extend a command so that the kernel kills it when the thread that has started it ends, for
    whatever reason (PR_SET_PDEATHSIG of prctl(2), set by util-linux' setpriv).

    :raises HostError: setpriv is not installed.
    """
    program = which("setpriv")
    if program is None:
        raise HostError("setpriv is missing", "install util-linux")
    return [program, "--pdeathsig", "KILL", "--", *argv]
