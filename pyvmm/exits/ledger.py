"""The exit ledger of a machine: every return of KVM_RUN by reason, place and device."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from pyvmm.bus import Bus
    from pyvmm.kvm.vcpu import ExitRecord, Vcpu


class Line:
    """One cause of exits, summed over the vCPUs.

    :ivar device: bus name of who answered; empty for nobody or no access.
    :ivar time: ns in the VMM. :ivar units: single accesses (string instructions have several an exit).
    """

    __slots__ = ("addr", "count", "device", "reason", "size", "time", "units", "write")

    def __init__(self, record: ExitRecord, device: str) -> None:
        self.reason, self.addr, self.size, self.write = record.reason, record.addr, record.size, record.write
        self.device = device
        self.count = self.time = self.units = 0

    @property
    def what(self) -> str:
        """The cause in words: ``pio write 0x3f8 serial0``."""
        if self.reason not in ("io", "mmio"):
            return self.reason if not self.addr else f"{self.reason} {self.addr}"
        space = "pio" if self.reason == "io" else "mmio"
        way = "write" if self.write else "read"
        return f"{space} {way} {self.addr:#x}/{self.size} {self.device or 'nobody'}"

    def as_dict(self) -> dict[str, object]:
        """For JSON."""
        d: dict[str, object] = {"reason": self.reason, "count": self.count, "time_ns": self.time}
        if self.reason in ("io", "mmio"):
            d |= {
                "direction": "write" if self.write else "read",
                "address": self.addr,
                "size": self.size,
                "units": self.units,
                "device": self.device or None,
            }
        elif self.addr:
            d["detail"] = self.addr
        return d


class Ledger:
    """A snapshot. ``total`` counts the returns of KVM_RUN, and the lines' counts add up to it."""

    def __init__(self, vcpus: Iterable[Vcpu], bus: Bus) -> None:
        self.total = 0
        lines: dict[tuple[object, ...], Line] = {}
        for vcpu in vcpus:
            self.total += vcpu.runs
            for r in vcpu.ledger():
                device = bus.name(r.region)
                key = (r.reason, r.addr, r.size, r.write, device)
                line = lines.get(key)
                if line is None:
                    line = lines[key] = Line(r, device)
                line.count += r.count
                line.time += r.time
                line.units += r.units
        #: most frequent first
        self.lines = sorted(lines.values(), key=lambda line: -line.count)

    def by_reason(self) -> dict[str, int]:
        """Exits a reason, most frequent first."""
        return self._sum(lambda line: line.reason)

    def by_device(self) -> dict[str, int]:
        """Port and memory exits a device, most frequent first."""
        return self._sum(
            lambda line: (line.device or "nobody") if line.reason in ("io", "mmio") else line.reason
        )

    def _sum(self, key: Callable[[Line], str]) -> dict[str, int]:
        out: dict[str, int] = {}
        for line in self.lines:
            name = key(line)
            out[name] = out.get(name, 0) + line.count
        return dict(sorted(out.items(), key=lambda item: -item[1]))

    def as_dict(self) -> dict[str, object]:
        """For JSON."""
        return {
            "kvm_run_returns": self.total,
            "by_reason": self.by_reason(),
            "by_device": self.by_device(),
            "lines": [line.as_dict() for line in self.lines],
        }
