"""Where a guest runs: on this machine's KVM, or in the testbed."""

from __future__ import annotations

import sys


def elsewhere(host: str, kernel: str | None, argv: list[str]) -> int | None:
    """Run ``pyvmm ARGV`` in the testbed if ``host`` or this machine asks for it.

    :param host: ``auto``, ``local`` or ``testbed``. :param kernel: None for an image of Linux.
    :returns: the exit status from the testbed, or None to go on here.
    """
    from pyvmm.errors import TestbedError

    if host == "local":
        return None
    if host == "auto":
        from pyvmm.boot import is_linux
        from pyvmm.host.doctor import can_run_linux_locally

        if kernel is not None and not is_linux(kernel):
            return None
        good, reason = can_run_linux_locally()
        if good:
            return None
    from pyvmm.host.testbed import Testbed

    testbed = Testbed(progress=lambda text: print(f"testbed: {text}", file=sys.stderr))
    if host == "auto":
        if not testbed.is_set_up():
            raise TestbedError(
                f"no Linux guest can run here: {reason}", "set the testbed up: pyvmm testbed setup"
            )
        print(f"pyvmm: {reason}; running in the testbed", file=sys.stderr)
    return testbed.run_attached([sys.executable, "-m", "pyvmm", *argv])
