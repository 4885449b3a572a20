"""Names of the taps that tests make in this machine's own network namespace, which the tests of
other workers look at as well.
"""

from __future__ import annotations

import os
import re


def own_tap(what: str) -> str:
    """A name of this process for a tap. :param what: at most five letters (IFNAMSIZ)."""
    return f"pv{os.getpid()}{what}"


def of_another(name: str) -> bool:
    """Whether a test of another process has made the tap."""
    match = re.fullmatch(r"pv(\d+)\D*", name)
    return match is not None and int(match[1]) != os.getpid()
