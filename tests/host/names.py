"""The names of machines that run on this host."""

from __future__ import annotations

from pyvmm.control.client import connect
from pyvmm.errors import MachineMissing


def reachable(name: str) -> bool:
    """A machine has its name before its socket, and its socket before that listens."""
    try:
        connect(name).close()
    except MachineMissing:
        return False
    return True
