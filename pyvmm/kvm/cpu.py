"""``--cpu``: how the guest's CPU differs from the host's."""

from __future__ import annotations

import struct

from pyvmm.errors import UsageError, did_you_mean
from pyvmm.spec.cpuid import (
    ALIASES,
    AMD_EDX_COPIES,
    EAX,
    EBX,
    ECX,
    EDX,
    HYPERVISOR_LEAVES,
    NAMES,
    VENDORS,
)

#: The host's CPU, by the two names that QEMU has for it.
BASES = ("host", "max")
ON, OFF = ("on", "yes", "true", "y"), ("off", "no", "false", "n")
#: What the machine decides and KVM keeps.
FIXED = ("apic", "ht")
#: Names that stand for whole leaves: KVM's own, and those of the performance counters.
KVM, PMU = "kvm", "pmu"


class Cpu:
    """The guest's CPU: the host's, with features hidden. Text form: ``host[,-FEATURE][,+FEATURE]
    [,FEATURE=on|off][,vendor=NAME][,phys-bits=N]``.

    :ivar hidden: names of features that the guest must not see.
    :ivar wanted: names of features that it must see.
    :ivar vendor: twelve characters; empty: the host's.
    :ivar phys_bits: of guest-physical addresses; 0: the host's.
    :raises UsageError: the text is malformed, or knows a feature that has no name here.
    """

    def __init__(self, text: str = "host") -> None:
        self.hidden: set[str] = set()
        self.wanted: set[str] = set()
        self.vendor, self.phys_bits = "", 0
        base, *parts = text.split(",")
        if base not in BASES:
            raise UsageError(
                f"--cpu {base}: the CPU is always the host's",
                f"did you mean --cpus {base}?"
                if base.isdecimal()
                else "write host or max, then what differs, as in --cpu host,-x2apic",
            )
        for part in parts:
            self._take(part)

    def _take(self, part: str) -> None:
        name, equals, value = part.partition("=")
        if name == "vendor" and equals:
            if value not in VENDORS:
                raise UsageError(f"--cpu {part}", f"use one of {', '.join(VENDORS)}")
            self.vendor = value
        elif name == "phys-bits" and equals:
            if not value.isdecimal() or not 32 <= int(value) <= 52:
                raise UsageError(f"--cpu {part}", "use 32 to 52")
            self.phys_bits = int(value)
        elif name[:1] in "+-" and len(name) > 1 and not equals:
            self._set(name[1:], name[0] == "+")
        elif equals and value in ON + OFF:
            self._set(name, value in ON)
        else:
            raise UsageError(
                f"--cpu: {part!r} says nothing", "write -FEATURE, +FEATURE or FEATURE=on|off"
            )

    def _set(self, name: str, on: bool) -> None:
        """Hide a feature, or demand it.

        :raises UsageError: there is no such feature, or the machine decides about it.
        """
        name = canonical(name)
        if name not in _places() and name not in (KVM, PMU):
            meant = did_you_mean(name, [*_places(), KVM, PMU])
            raise UsageError(
                f"--cpu: unknown feature {name!r}", f"{meant}docs/cpu.md says which there are"
            )
        if name in FIXED:
            raise UsageError(f"--cpu: {name} is the machine's own", "leave it out")
        (self.wanted if on else self.hidden).add(name)
        (self.hidden if on else self.wanted).discard(name)

    @property
    def counters(self) -> bool:
        """Whether the guest's CPUID tells of performance counters."""
        return PMU in self.wanted

    def apply(self, rows: list[list[int]]) -> None:
        """Hide what is to be hidden from the rows of a CPUID table.

        :raises UsageError: the host lacks what the guest must see.
        """
        missing = sorted(self.wanted - {KVM, PMU} - present(rows))
        if missing:
            raise UsageError(
                f"--cpu: this host's KVM has no {', '.join(missing)}",
                "leave it out, or use another host (--host testbed)",
            )
        amd = self._set_vendor(rows)
        for name in self.hidden - {KVM, PMU}:
            for (function, index, column), mask in _places()[name].items():
                for row in rows:
                    if tuple(row[:2]) == (function, index):
                        row[column] &= ~mask
                    elif amd and (row[0], function, column) == (0x80000001, 1, EDX):
                        row[EDX] &= ~(mask & AMD_EDX_COPIES)
        if "xsave" in self.hidden:
            for row in rows:
                if row[0] == 0xD:
                    row[EAX:] = 0, 0, 0, 0
        if KVM in self.hidden:
            rows[:] = [row for row in rows if row[0] not in HYPERVISOR_LEAVES]
        if self.phys_bits:
            self._set_phys_bits(rows)

    def _set_vendor(self, rows: list[list[int]]) -> bool:
        """Write the vendor; returns whether the guest's CPU is AMD's or like it."""
        name = b""
        for row in rows:
            if row[0] == 0 or (row[0] == 0x80000000 and row[EBX]):
                if self.vendor:
                    row[EBX], row[EDX], row[ECX] = struct.unpack("<III", self.vendor.encode())
                name = struct.pack("<III", row[EBX], row[EDX], row[ECX])
        return name in (b"AuthenticAMD", b"HygonGenuine")

    def _set_phys_bits(self, rows: list[list[int]]) -> None:
        for row in rows:
            if row[0] == 0x80000008:
                if self.phys_bits > row[EAX] & 0xFF:
                    raise UsageError(
                        f"--cpu phys-bits={self.phys_bits}: the host has {row[EAX] & 0xFF}",
                        "use at most as many",
                    )
                row[EAX] = row[EAX] & ~0xFF | self.phys_bits


def canonical(name: str) -> str:
    """A feature's name as ``NAMES`` has it, from any way to write it."""
    name = name.strip().lower().replace("_", "-")
    if name not in _places():
        dashed = name.replace(".", "-")
        name = _dashed().get(dashed, dashed)
    return ALIASES.get(name, name)


_made: dict[str, dict[tuple[int, int, int], int]] = {}


def _places() -> dict[str, dict[tuple[int, int, int], int]]:
    """Feature -> (function, index, column) -> its bits there."""
    if not _made:
        for place, names in NAMES.items():
            for bit, name in enumerate(names.split()):
                if name != "-":
                    places = _made.setdefault(name, {})
                    places[place] = places.get(place, 0) | 1 << bit
    return _made


def _dashed() -> dict[str, str]:
    return {name.replace(".", "-"): name for name in _places()}


def present(rows: list[list[int]]) -> set[str]:
    """The names of the features that a CPUID table has."""
    values = {(row[0], row[1], column): row[column] for row in rows for column in range(EAX, 7)}
    return {
        name
        for name, places in _places().items()
        if any(values.get(place, 0) & mask for place, mask in places.items())
    }
