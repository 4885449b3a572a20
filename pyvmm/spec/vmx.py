"""Why an entry to a guest fails: VM-instruction errors (Intel SDM volume 3C, 31.4, "VM instruction
error numbers"), basic exit reasons (volume 3D, appendix C) and AMD's exit code (APM volume 2,
appendix C). Constants only.
"""

VM_INSTRUCTION_ERRORS = {
    1: "VMCALL executed in VMX root operation",
    2: "VMCLEAR with invalid physical address",
    3: "VMCLEAR with VMXON pointer",
    4: "VMLAUNCH with non-clear VMCS",
    5: "VMRESUME with non-launched VMCS",
    6: "VMRESUME after VMXOFF",
    7: "VM entry with invalid control fields",
    8: "VM entry with invalid host-state fields",
    9: "VMPTRLD with invalid physical address",
    10: "VMPTRLD with VMXON pointer",
    11: "VMPTRLD with incorrect VMCS revision identifier",
    12: "VMREAD or VMWRITE of an unsupported component",
    13: "VMWRITE to a read-only component",
    15: "VMXON in VMX root operation",
    16: "VM entry with invalid executive-VMCS pointer",
    17: "VM entry with non-launched executive VMCS",
    18: "VM entry with executive-VMCS pointer that is not VMXON pointer",
    19: "VMCALL with non-clear VMCS",
    20: "VMCALL with invalid VM-exit control fields",
    22: "VMCALL with incorrect MSEG revision identifier",
    23: "VMXOFF under dual-monitor treatment",
    24: "VMCALL with invalid SMM-monitor features",
    25: "VM entry with invalid VM-execution control fields in executive VMCS",
    26: "VM entry with events blocked by MOV SS",
    28: "invalid operand to INVEPT or INVVPID",
}
ENTRY_FAILED = 1 << 31  # bit of an exit reason
ENTRY_FAILURES = {
    33: "invalid guest state",
    34: "a machine-specific register could not be loaded",
    41: "a machine-check event",
}
SVM_EXIT_ERR = 0xFFFFFFFF  # VMEXIT_INVALID; the lower half of its 64 bits
