"""Children that do not outlive us."""

from __future__ import annotations

import shutil

from pyvmm.errors import HostError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence


def tethered(argv: Sequence[str]) -> list[str]:
    """``argv`` as a command that the kernel kills when the thread that starts it ends, however that
    ends (PR_SET_PDEATHSIG of prctl(2), by the setpriv of util-linux).

    :raises HostError: there is no setpriv.
    """
    program = shutil.which("setpriv")
    if program is None:
        raise HostError("setpriv is missing", "install util-linux")
    return [program, "--pdeathsig", "KILL", "--", *argv]
