"""Rates of a running machine, per second: the difference of two answers to the command
``x-pyvmm-ledger`` of the control socket.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

#: The counters of a data path that are shown, in this order.
COUNTERS = (
    "rx_packets",
    "rx_bytes",
    "rx_kicks",
    "rx_calls",
    "tx_packets",
    "tx_bytes",
    "tx_kicks",
    "tx_calls",
)


def rates(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, Any]:
    """What happened between two answers of one machine, for JSON (docs/top.md). A value is null if
    nothing counts it.

    KVM's counters start over if the machine was reset in between; they are null then.
    """
    seconds = (after["time-ns"] - before["time-ns"]) / 1e9
    same = before.get("reboots") == after.get("reboots")

    def per_second(new: Any, old: Any) -> float | None:
        if new is None or old is None or seconds <= 0:
            return None
        rate: float = round((new - old) / seconds, 1)
        return rate

    def share(new: float, old: float) -> float | None:
        return round(100 * (new - old) / seconds, 1) if seconds > 0 and new >= old else None

    old_names = before["exits"]["by_name"]
    names = {
        name: per_second(count, old_names.get(name, 0))
        for name, count in after["exits"]["by_name"].items()
        if count != old_names.get(name, 0)
    }
    vcpus = []
    for new, old in zip(after["vcpus"], before["vcpus"], strict=True):
        vcpus.append(
            {
                "index": new["index"],
                "exits": per_second(new["kvm-run-returns"], old["kvm-run-returns"]),
                "kvm_exits": per_second(new["exits-in-kvm"], old["exits-in-kvm"]) if same else None,
                "interrupts": per_second(new["interrupts"], old["interrupts"]) if same else None,
            }
        )
    nets = []
    past = {net["name"]: net for net in before["nets"]}
    for new in after["nets"]:
        old = past.get(new["name"], new)  # a card that has just been added has no rates yet
        now, then = new["counters"], old["counters"]
        if any(n < then.get(key, 0) for key, n in now.items()):
            then = now  # another card has taken the name meanwhile
        used = {worker["tid"]: worker["cpu_s"] for worker in old["workers"]}
        nets.append(
            {
                "name": new["name"],
                "mode": new["mode"],
                **{key: per_second(now.get(key), then.get(key)) for key in COUNTERS},
                "workers": [
                    {
                        "name": w["name"],
                        "cpu_percent": share(w["cpu_s"], used.get(w["tid"], w["cpu_s"])),
                    }
                    for w in new["workers"]
                ],
            }
        )
    exits = per_second(after["exits"]["kvm_run_returns"], before["exits"]["kvm_run_returns"])
    return {
        "name": after["name"],
        "status": after["status"],
        "seconds": round(seconds, 3),
        "exits": exits,
        "by_name": dict(sorted(names.items(), key=lambda item: -(item[1] or 0))),
        "vcpus": vcpus,
        "nets": nets,
    }
