"""Where a guest runs: on this machine's KVM, or in the testbed."""

from __future__ import annotations

import os
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

VHOST_NET = "/dev/vhost-net"
#: The series of the testbed's kernel that has vDPA, and its modules.
VDPA_KERNEL, VDPA_MODULES = "6.12", "vhost_vdpa vduse"


def elsewhere(
    host: str,
    kernel: str | None,
    argv: list[str],
    *,
    vhost: bool = False,
    vdpa: bool = False,
    writable: Sequence[str] = (),
    note: Callable[[], str] | None = None,
    lasting: bool = False,
) -> int | None:
    """Run ``pyvmm ARGV`` in the testbed if ``host`` or this machine asks for it.

    :param host: ``auto``, ``local`` or ``testbed``.
    :param kernel: None for an image of Linux.
    :param vhost: the machine wants /dev/vhost-net. :param vdpa: it wants vDPA.
    :param writable: directories that the guest may write.
    :param note: called if the guest will run in the testbed, before it boots: what the user must
        know then; may be empty.
    :param lasting: the machine is to be found by other commands, for which the testbed must be up.
    :returns: the exit status from the testbed, or None to go on here.
    """
    if host == "local" or (host == "testbed" and "PYVMM_IN_TESTBED" in os.environ):
        return None  # this is the place
    from pyvmm.errors import TestbedError
    from pyvmm.programs import module
    from pyvmm.testbed.testbed import Testbed

    if host == "auto":
        from pyvmm.boot import is_linux
        from pyvmm.doctor import can_run_linux_locally

        good, reason = can_run_linux_locally()
        good = good or (kernel is not None and not is_linux(kernel))
        if good and vhost and not os.access(VHOST_NET, os.R_OK | os.W_OK):
            reason = f"{VHOST_NET} is missing or forbidden"
            good = not Testbed().is_set_up()  # then the machine's own error says what to do
        if good:
            return None
    testbed = Testbed(
        kernel=VDPA_KERNEL if vdpa else None,
        writable=writable,
        progress=lambda text: print(f"testbed: {text}", file=sys.stderr),
    )
    if host == "auto":
        if not testbed.is_set_up():
            raise TestbedError(
                f"no Linux guest can run here: {reason}", "set the testbed up: pyvmm testbed setup"
            )
        print(f"pyvmm: {reason}; running in the testbed", file=sys.stderr)
    if lasting and not testbed.is_up():
        raise TestbedError(
            "a machine in the background needs a testbed that stays", "start it: pyvmm testbed up"
        )
    text = note() if note is not None else ""
    if text:
        print(f"pyvmm: {text}", file=sys.stderr, flush=True)
    command = module("pyvmm", *argv)
    if vdpa:  # nothing but us would load the modules there
        command = ["sh", "-c", f'modprobe -a {VDPA_MODULES}; exec "$@"', "sh", *command]
    return testbed.run_attached(command)
