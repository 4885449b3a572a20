"""Tables of a machine's rates (``pyvmm.exits.rates``), for a terminal of 80 columns."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

    Rates = Mapping[str, Any]


def number(value: float | None) -> str:
    """A rate in up to four digits; a dash if nobody counts."""
    return "-" if value is None else f"{value:.0f}" if value >= 10 else f"{value:.1f}"


def vcpu_lines(now: Rates) -> list[str]:
    """One line per vCPU."""
    out = [f"{'':8}{'exits':>10}{'in KVM':>10}{'interrupts':>12}"]
    for v in now["vcpus"]:
        text = "".join(
            f"{number(v[key]):>{w}}"
            for key, w in (("exits", 10), ("kvm_exits", 10), ("interrupts", 12))
        )
        out.append(f"{'vcpu' + str(v['index']):8}{text}")
    return out


def net_lines(net: Rates) -> list[str]:
    """A card: both directions, and its workers."""
    head = f"{net['name']:8}{'packets':>10}{'Mbit/s':>10}{'kicks':>10}{'interrupts':>12}"
    out = [f"{head}   {net['mode']}"]
    for way, text in (("rx", "to guest"), ("tx", "from it")):
        mbit = net[f"{way}_bytes"]
        cells = (
            net[f"{way}_packets"],
            None if mbit is None else mbit * 8 / 1e6,
            net[f"{way}_kicks"],
        )
        row = "".join(f"{number(cell):>10}" for cell in cells)
        out.append(f"{text:8}{row}{number(net[f'{way}_calls']):>12}")
    for worker in net["workers"]:
        out.append(f"{number(worker['cpu_percent']):>10} % CPU  {worker['name']}")
    return out


def cause_lines(now: Rates, room: int) -> list[str]:
    """Exits to the VMM in all, and by cause in at most ``room`` lines, one at least; the rarest
    causes are summed.
    """
    causes = [f"{number(rate):>10}   {name}" for name, rate in now["by_name"].items()]
    room = max(room, 1)
    if len(causes) > room:
        rest = sum(rate or 0 for rate in list(now["by_name"].values())[room - 1 :])
        causes = [*causes[: room - 1], f"{number(rest):>10}   other causes"]
    return [f"{number(now['exits']):>10} exits to the VMM", *causes]
