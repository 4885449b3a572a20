"""What the processor's reasons for exits are, on AMD and on Intel: a program that counts them in a
testbed, and the check of what it prints, which is the same for both.

    python -m tests.reasons KICKS-ELF
"""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path
from typing import Any

from pyvmm import Machine, Net
from pyvmm.compare.counters import ExitTrace

KICKS, HALTS = 300, 20
FAST = Path("/sys/kernel/tracing/instances") / f"pyvmm-fast-{os.getpid()}"
EVENT = FAST / "events/kvm/kvm_fast_mmio"


def run(kernel: str, notify: str, count: int) -> dict[str, Any]:
    """Exits of a bare-metal guest that kicks ``count`` times, by the processor's reason; how many
    of them KVM took for fast MMIO; and how many memory accesses and kicks reached the VMM.
    """
    FAST.mkdir()
    try:
        if EVENT.exists():
            (EVENT / "trigger").write_text("hist:keys=common_pid")
        append = f"count={count} control=0 halts={HALTS}"
        with (
            ExitTrace(reasons=True) as trace,
            Machine(
                kernel, memory="4M", append=append, nets=[Net("emulated", notify=notify)]
            ) as vm,
        ):
            vm.start()
            outcome = vm.wait(600)
            assert outcome.status == 0, outcome
            reasons = trace.reasons([vcpu.thread_id for vcpu in vm.vcpus])
            (command,) = (phase for phase in vm.phase_exits() if phase.name == "command")
            names = command.ledger.by_name()
            mmio = sum(line.count for line in vm.ledger().lines if line.reason == "mmio")
        fast = 0
        if EVENT.exists():
            rows = re.findall(r"\} hitcount:\s*(\d+)", (EVENT / "hist").read_text())
            fast = sum(map(int, rows))
            (EVENT / "trigger").write_text("!hist:keys=common_pid")
    finally:
        FAST.rmdir()
    kicks = names.get("net0 queue 1 notify", 0)
    return {"reasons": reasons, "fast": fast, "mmio": mmio, "vmm": kicks}


def check(found: dict[str, Any]) -> dict[str, Any]:
    """What 300 kicks add to each reason, by ``notify``; checked.

    :param found: what the program printed.
    """
    more = {}
    reason = "ept_misconfig" if found["intel"] else "npf"
    for notify, (few, many) in found["runs"].items():
        added = {
            name: many["reasons"].get(name, 0) - few["reasons"].get(name, 0)
            for name in {*few["reasons"], *many["reasons"]}
        }
        more[notify] = {name: count for name, count in added.items() if count}
        assert many["vmm"] - few["vmm"] == (KICKS if notify == "exit" else 0), (notify, few, many)
        assert few["reasons"]["hlt"] >= HALTS
        # A driver polls while the device is reset. These accesses are exits to the VMM.
        by_kvm = added[reason] - (many["mmio"] - few["mmio"])
        expected = 0 if notify == "exit" else KICKS
        fast = many["fast"] - few["fast"]
        if found["intel"]:
            # A page without memory has an entry that cannot be: no page fault has this reason. An
            # ioeventfd of any length needs no look at the instruction.
            assert (by_kvm, fast) == (expected, expected), (notify, few, many)
        else:
            # Page faults of guest memory have the same reason.
            assert abs(by_kvm - expected) <= 20 and fast == 0, (notify, few, many)
    return more


def main() -> None:
    """Print the counts of both kinds of kicks."""
    runs = {
        # The first access to a page is a page fault everywhere.
        notify: [run(sys.argv[1], notify, count) for count in (1, 1 + KICKS)]
        for notify in ("exit", "ioeventfd")
    }
    print(json.dumps({"intel": Path("/sys/module/kvm_intel").is_dir(), "runs": runs}))


if __name__ == "__main__":
    main()
