"""Where a guest runs: on this machine's KVM, in the testbed, or on a machine that ssh reaches."""

from __future__ import annotations

import os
import sys

from pyvmm.cli.support.options import SSH
from pyvmm.errors import TestbedError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

VHOST_NET = "/dev/vhost-net"
#: The series of the testbed's kernel that has vDPA, and its modules.
VDPA_KERNEL, VDPA_MODULES = "6.12", "vhost_vdpa vduse"


def surely_here(host: str, *, vhost: bool) -> bool:
    """Whether the guest runs on this machine, whatever its kernel is: then ``elsewhere``, whose
    parameters these are, gives None.
    """
    return _is_here(host) or (host == "auto" and not _why_not_here(None, vhost))


def elsewhere(
    host: str,
    kernel: str | None,
    argv: list[str],
    *,
    vhost: bool = False,
    vdpa: bool = False,
    writable: Sequence[str] = (),
    results: Sequence[str] = (),
    note: Callable[[], str] | None = None,
    lasting: bool = False,
) -> int | None:
    """Run ``pyvmm ARGV`` in the testbed, or on another machine, if ``host`` or this machine asks
    for it.

    :param host: as ``options.add_host`` gives it.
    :param kernel: None for an image of Linux.
    :param vhost: the machine wants /dev/vhost-net. :param vdpa: it wants vDPA.
    :param writable: directories that the guest may write. :param results: files and directories of
        these that come back from another machine.
    :param note: called if the guest will run in the testbed, before it boots: what the user must
        know then; may be empty.
    :param lasting: the machine is to be found by other commands, for which the testbed must be up.
    :returns: the exit status from the testbed, or None to go on here.
    """
    if _is_here(host):
        return None
    if host.startswith(SSH):
        return _by_ssh(host, argv, results, note, lasting)
    reason = _why_not_here(kernel, vhost) if host == "auto" else ""
    if host == "auto" and not reason:
        return None
    from pyvmm.programs import module
    from pyvmm.testbed.testbed import Testbed  # below: a guest that runs here does not wait for it

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
    _tell(note)
    command = module("pyvmm", *argv)
    if vdpa:  # nothing but us would load the modules there
        command = ["sh", "-c", f'modprobe -a {VDPA_MODULES}; exec "$@"', "sh", *command]
    return testbed.run_attached(command)


def _is_here(host: str) -> bool:
    return host == "local" or (host != "auto" and "PYVMM_IN_TESTBED" in os.environ)


def _why_not_here(kernel: str | None, vhost: bool) -> str:
    """Why this machine cannot run the guest; empty if it can. The parameters are those of
    ``elsewhere``.
    """
    from pyvmm.doctor import can_run_linux_locally

    good, reason = can_run_linux_locally()
    if not good:
        from pyvmm.boot import is_linux

        if kernel is None or is_linux(kernel):
            return reason
    if vhost and not os.access(VHOST_NET, os.R_OK | os.W_OK):
        from pyvmm.testbed.testbed import Testbed

        if Testbed().is_set_up():  # else the machine's own error says what to do
            return f"{VHOST_NET} is missing or forbidden"
    return ""


def _tell(note: Callable[[], str] | None) -> None:
    text = note() if note is not None else ""
    if text:
        print(f"pyvmm: {text}", file=sys.stderr, flush=True)


def _by_ssh(
    host: str,
    argv: list[str],
    results: Sequence[str],
    note: Callable[[], str] | None,
    lasting: bool,
) -> int:
    """Run ``pyvmm ARGV`` on another machine, as in ``elsewhere``. The files and directories that
    its options name travel there. Those come back that the command may write, and no others: the
    other machine must not replace what the command only reads.
    """
    from pyvmm.programs import module
    from pyvmm.testbed.testbed import Testbed
    from pyvmm.testbed.travel import READ, WRITTEN, named, values

    testbed = Testbed(
        host=host, progress=lambda text: print(f"testbed: {text}", file=sys.stderr, flush=True)
    )
    if lasting and not testbed.is_up():
        raise TestbedError(
            "a machine in the background needs a testbed that stays",
            f"start it: pyvmm testbed --host {host} up",
        )
    _tell(note)
    read = values(argv, READ)
    if argv[0] == "test":  # its kernels have no option
        read += [word for word in argv[1:] if os.path.isfile(word)]  # noqa: PTH113
    back = named([*values(argv, WRITTEN), *results])
    with testbed:
        testbed.give({**named(read), **back})
        return testbed.run_attached(module("pyvmm", *argv), returns=list(back.values()))
