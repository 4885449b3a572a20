"""The machines that L1 can be, by their processors, and by the address of a real one."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pyvmm.testbed.machine import Machine

#: The first one is the default, because it is the quicker one.
CPUS = ("amd", "intel")


def machine(cpu: str, host: str = "") -> type[Machine]:
    """The kind of machine with a processor of ``CPUS``, or with an address."""
    if host:
        from pyvmm.testbed.ssh import Ssh

        return Ssh
    if cpu == "intel":
        from pyvmm.testbed.intel import Intel

        return Intel
    from pyvmm.testbed.amd import Amd

    return Amd
