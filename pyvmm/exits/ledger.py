"""The exit ledger of a machine: every return of KVM_RUN by reason, address, device and register."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from pyvmm.bus import Bus
    from pyvmm.kvm.vcpu import ExitRecord, Vcpu, VcpuSnapshot


class Line:
    """One cause of exits, summed over the vCPUs.

    :ivar device: bus name of the device that answered; empty if no device did, or for an exit
        that is not an access.
    :ivar register: the device's register; empty if its registers have no names.
    :ivar name: device and register: ``net0 queue 1 notify``.
    :ivar role: ``notify`` for the kick of a queue of packets, ``control`` for the kick of another
        queue, else empty.
    :ivar time: ns in the VMM. :ivar units: single accesses; a string instruction makes several
        per exit.
    """

    __slots__ = (
        "addr",
        "count",
        "device",
        "name",
        "reason",
        "register",
        "role",
        "size",
        "time",
        "units",
        "write",
    )

    def __init__(self, record: ExitRecord, bus: Bus) -> None:
        self.reason, self.addr, self.size, self.write = (
            record.reason,
            record.addr,
            record.size,
            record.write,
        )
        self.device, self.register, self.name = bus.describe(
            record.region, record.reg, record.write
        )
        self.role = bus.role(record.region, record.reg)
        self.count = self.time = self.units = 0

    @property
    def is_access(self) -> bool:
        """Whether the exit is an access to an I/O port or to MMIO."""
        return self.reason in ("io", "mmio")

    @property
    def what(self) -> str:
        """The cause in words: ``pio write 0x3f8/1 serial0 THR``."""
        if not self.is_access:
            return self.reason if not self.addr else f"{self.reason} {self.addr}"
        space = "pio" if self.reason == "io" else "mmio"
        way = "write" if self.write else "read"
        return f"{space} {way} {self.addr:#x}/{self.size} {self.name or 'nobody'}"

    def as_dict(self) -> dict[str, object]:
        """The line for JSON (docs/report.md)."""
        d: dict[str, object] = {"reason": self.reason, "count": self.count, "time_ns": self.time}
        if self.is_access:
            d |= {
                "direction": "write" if self.write else "read",
                "address": self.addr,
                "size": self.size,
                "units": self.units,
                "device": self.device or None,
                "register": self.register or None,
                "name": self.name or None,
            }
        elif self.addr:
            d["detail"] = self.addr
        return d


class Ledger:
    """The exits between two moments, or from the start of the machine to one moment.

    :param after: one snapshot per vCPU, at the end. :param before: one snapshot per vCPU, at the
        beginning; none for the start of the machine.
    :param total: how often KVM_RUN returned, if another counter knows; else the sum of the lines.
    :ivar lines: the most frequent line comes first.
    """

    def __init__(
        self,
        after: Sequence[VcpuSnapshot],
        before: Sequence[VcpuSnapshot],
        bus: Bus,
        *,
        total: int | None = None,
    ) -> None:
        lines: dict[tuple[object, ...], Line] = {}
        for sign, snapshots in ((1, after), (-1, before)):
            for snapshot in snapshots:
                for r in snapshot.records():
                    key = (r.reason, r.addr, r.size, r.write, r.region, r.reg)
                    line = lines.get(key)
                    if line is None:
                        line = lines[key] = Line(r, bus)
                    line.count += sign * r.count
                    line.time += sign * r.time
                    line.units += sign * r.units
        self.lines = sorted(
            (line for line in lines.values() if line.count or line.time),
            key=lambda line: (-line.count, line.what),
        )
        self.total = sum(line.count for line in self.lines) if total is None else total

    @classmethod
    def of(cls, vcpus: Iterable[Vcpu], bus: Bus) -> Ledger:
        """The exits of ``vcpus`` up to now."""
        vcpus = list(vcpus)
        runs = sum(vcpu.runs for vcpu in vcpus)
        return cls([vcpu.snapshot() for vcpu in vcpus], [], bus, total=runs)

    def by_reason(self) -> dict[str, int]:
        """Exits per reason; the most frequent reason comes first."""
        return self._sum(lambda line: line.reason)

    def by_device(self) -> dict[str, int]:
        """Port and MMIO exits per device; the most frequent device comes first."""
        return self._sum(lambda line: (line.device or "nobody") if line.is_access else line.reason)

    def by_name(self) -> dict[str, int]:
        """Port and MMIO exits per register, by full name: ``serial0 LSR``."""
        return self._sum(lambda line: (line.name or "nobody") if line.is_access else line.reason)

    def _sum(self, key: Callable[[Line], str]) -> dict[str, int]:
        out: dict[str, int] = {}
        for line in self.lines:
            if not line.count:
                continue  # only the time of an exit that the phase before has counted
            name = key(line)
            out[name] = out.get(name, 0) + line.count
        return dict(sorted(out.items(), key=lambda item: -item[1]))

    def as_dict(self) -> dict[str, object]:
        """The ledger for JSON (docs/report.md)."""
        return {
            "kvm_run_returns": self.total,
            "by_reason": self.by_reason(),
            "by_device": self.by_device(),
            "by_name": self.by_name(),
            "lines": [line.as_dict() for line in self.lines],
        }
