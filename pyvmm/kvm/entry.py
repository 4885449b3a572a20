"""A failed entry to the guest (KVM_EXIT_FAIL_ENTRY) in words."""

from __future__ import annotations

from pyvmm.spec.vmx import (
    ENTRY_FAILED,
    ENTRY_FAILURES,
    SVM_EXIT_ERR,
    VM_INSTRUCTION_ERRORS,
)

REMEDY = "as root: echo Y >/sys/module/{module}/parameters/{option}, run it again, and see dmesg"
INTEL = REMEDY.format(module="kvm_intel", option="dump_invalid_vmcs")
AMD = REMEDY.format(module="kvm_amd", option="dump_invalid_vmcb")


def entry_failure(reason: int) -> str:
    """What the processor refused, and where its reason is to be looked for.

    :param reason: ``hardware_entry_failure_reason`` of ``struct kvm_run``: on Intel an exit reason
        with ``ENTRY_FAILED``, or the number of a VM-instruction error; on AMD the exit code.
    """
    if reason & SVM_EXIT_ERR == SVM_EXIT_ERR:
        return f"VMRUN with an invalid control block ({AMD})"
    if reason & ENTRY_FAILED:
        why = ENTRY_FAILURES.get(reason & 0xFFFF, "for a reason that the manual does not have")
        return f"VM entry failed: {why} ({INTEL})"
    if reason in VM_INSTRUCTION_ERRORS:
        return f"VM-instruction error {reason}: {VM_INSTRUCTION_ERRORS[reason]} ({INTEL})"
    return "a reason that no manual has; dmesg may say more"
