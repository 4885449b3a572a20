"""A copy of all counters, made in a vCPU's thread while the guest waits: a module of its own, since
its import is part of that.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from pyvmm.kvm.stats import Stats
    from pyvmm.kvm.vcpu import Vcpu

    Numbers = dict[str, dict[str, int]]


class Mark:
    """All counters at a moment.

    :ivar time: CLOCK_MONOTONIC, ns. :ivar counters: of each card's data path.
    :param vm: the VM's statistics, None where KVM has none. :param past: what VMs before a reboot
        had counted.
    """

    __slots__ = ("_past", "_raw", "counters", "name", "snapshots", "time")

    def __init__(
        self,
        name: str,
        time: int,
        vcpus: Sequence[Vcpu],
        vm: Stats | None,
        past: Numbers,
        counters: list[dict[str, int]],
    ) -> None:
        self.name, self.time, self.counters = name, time, counters
        self.snapshots = [vcpu.snapshot() for vcpu in vcpus]
        self._past = past
        groups = {"vm": vm} | {f"vcpu{vcpu.index}": vcpu.stats for vcpu in vcpus}
        self._raw = {
            group: (stats, stats.raw()) for group, stats in groups.items() if stats is not None
        }

    @property
    def stats(self) -> Numbers | None:
        """KVM's statistics that only grow, by group: ``vm``, ``vcpu0``, ...; None where KVM has
        none.
        """
        now = {group: stats.growing(raw) for group, (stats, raw) in self._raw.items()}
        return sums(now, self._past, 1) if now else None


def sums(numbers: Numbers, others: Numbers, sign: int) -> Numbers:
    """``numbers`` plus or minus the ``others`` of the same names."""
    return {
        group: {name: n + sign * others.get(group, {}).get(name, 0) for name, n in values.items()}
        for group, values in numbers.items()
    }
