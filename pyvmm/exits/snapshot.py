"""A copy of all counters, made in a vCPU's thread while the guest waits and evaluated later."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from pyvmm.kvm.stats import Stats
    from pyvmm.kvm.vcpu import Vcpu

    Numbers = dict[str, dict[str, int]]


class Snapshot:
    """All counters at one moment.

    :param time: CLOCK_MONOTONIC, ns. :param vm: the VM's statistics; None if KVM has none.
    :param past: the sums of the VMs before a reboot. :param counters: of each card, by its name.
    :ivar ledgers: the exits of each vCPU.
    """

    __slots__ = ("_past", "_raw", "counters", "ledgers", "name", "time")

    def __init__(
        self,
        name: str,
        time: int,
        vcpus: Sequence[Vcpu],
        vm: Stats | None,
        past: Numbers,
        counters: Numbers,
    ) -> None:
        self.name, self.time, self.counters = name, time, counters
        self.ledgers = [vcpu.snapshot() for vcpu in vcpus]
        self._past = past
        groups = {"vm": vm} | {f"vcpu{vcpu.index}": vcpu.stats for vcpu in vcpus}
        self._raw = {
            group: (stats, stats.raw()) for group, stats in groups.items() if stats is not None
        }

    @property
    def stats(self) -> Numbers | None:
        """KVM's statistics that only grow, by group: ``vm``, ``vcpu0``, ...; None if KVM has no
        statistics.
        """
        now = {group: stats.growing(raw) for group, (stats, raw) in self._raw.items()}
        return sums(now, self._past, 1) if now else None


def sums(numbers: Numbers, others: Numbers, sign: int) -> Numbers:
    """``numbers`` plus or minus the ``others`` of the same names."""
    return {
        group: {name: n + sign * others.get(group, {}).get(name, 0) for name, n in values.items()}
        for group, values in numbers.items()
    }
