"""guest/guest.h repeats the machine's addresses, because C cannot read Python: the two must be the
same.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from pyvmm.spec import platform as pf

GUEST = Path(__file__).parents[2] / "guest"
#: Names in the guests' sources that have another name in pyvmm.spec.platform.
ALIASES = {"IRQ": "IRQ_COM1"}
OWN = {"PORT_PIC_MASTER", "PORT_PIC_SLAVE"}  # KVM has these ports; pyvmm does not assign them


def defines(name: str) -> dict[str, int]:
    text = (GUEST / name).read_text()
    return {
        k: int(v, 0)
        for k, v in re.findall(r"^#define\s+(\w+)\s+(0x[0-9a-f]+|\d+)\s*(?:/\*.*)?$", text, re.M)
    }


@pytest.mark.parametrize("name", ["guest.h", "pci.h", "serial.c"])
def test_guests_agree_with_the_platform(name: str) -> None:
    checked = 0
    for key, value in defines(name).items():
        known = getattr(pf, ALIASES.get(key, key), None)
        if known is not None:
            assert value == known, key
            checked += 1
        else:
            assert not key.startswith("PORT_") or key in OWN, f"{key} is not in pyvmm.spec.platform"
    assert checked
