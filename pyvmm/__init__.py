"""pyvmm: a small KVM hypervisor built around one device, virtio-net.

The public names are ``Machine``, ``Net``, ``Device``, ``Disk``, ``Share``, ``Outcome``,
``SwitchReport`` and the errors in ``pyvmm.errors``::

    import pyvmm

    with pyvmm.Machine(kernel="vmlinux", memory="128M", nets=[pyvmm.Net("emulated")]) as vm:
        vm.start()
        vm.console.expect("login:")
        outcome = vm.wait(timeout=60)

PYTEST_DONT_REWRITE: in the testbed, pyvmm is imported before pytest, which would warn of that.
"""

from __future__ import annotations

__version__ = "0.1.0"

__all__ = [
    "Device",
    "Disk",
    "Machine",
    "Net",
    "Outcome",
    "PyvmmError",
    "Root",
    "Share",
    "SwitchReport",
    "__version__",
]

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pyvmm.card.report import SwitchReport
    from pyvmm.devopt import Device
    from pyvmm.diskopt import Disk
    from pyvmm.errors import PyvmmError
    from pyvmm.machine import Machine
    from pyvmm.netopt import Net
    from pyvmm.outcome import Outcome
    from pyvmm.shareopt import Root, Share

_HOMES = {
    "Machine": "pyvmm.machine",
    "Outcome": "pyvmm.outcome",
    "Net": "pyvmm.netopt",
    "Device": "pyvmm.devopt",
    "Disk": "pyvmm.diskopt",
    "PyvmmError": "pyvmm.errors",
    "Root": "pyvmm.shareopt",
    "Share": "pyvmm.shareopt",
    "SwitchReport": "pyvmm.card.report",
}


def __getattr__(name: str) -> object:
    """Import the public names on first use: `pyvmm --help` needs none of them."""
    if name not in _HOMES:  # also asked for each module of ours, before Python imports one
        raise AttributeError(f"module 'pyvmm' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_HOMES[name]), name)
