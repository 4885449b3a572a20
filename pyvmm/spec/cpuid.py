"""CPUID: which bit is which feature (Intel SDM volume 2A, CPUID; AMD APM volume 3, appendix E;
KVM's own in asm/kvm_para.h). The names are QEMU's and Linux'. Constants only.
"""

EAX, EBX, ECX, EDX = 3, 4, 5, 6  # columns of a row: function, index, flags, eax, ebx, ecx, edx

#: (function, index, column) -> the names of bits 0, 1, ...; "-" for a bit without a name.
NAMES = {
    (1, 0, ECX): "sse3 pclmulqdq dtes64 monitor ds-cpl vmx smx est tm2 ssse3 cid - fma cx16 xtpr"
    " pdcm - pcid dca sse4.1 sse4.2 x2apic movbe popcnt tsc-deadline aes xsave - avx f16c rdrand"
    " hypervisor",
    (1, 0, EDX): "fpu vme de pse tsc msr pae mce cx8 apic - sep mtrr pge mca cmov pat pse36 pn"
    " clflush - ds acpi mmx fxsr sse sse2 ss ht tm ia64 pbe",
    (6, 0, EAX): "- - arat",
    (7, 0, EBX): "fsgsbase tsc-adjust sgx bmi1 hle avx2 fdp-excptn-only smep bmi2 erms invpcid rtm"
    " - zero-fcs-fds mpx - avx512f avx512dq rdseed adx smap avx512ifma - clflushopt clwb intel-pt"
    " avx512pf avx512er avx512cd sha-ni avx512bw avx512vl",
    (7, 0, ECX): "prefetchwt1 avx512vbmi umip pku - waitpkg avx512vbmi2 shstk gfni vaes vpclmulqdq"
    " avx512vnni avx512bitalg tme avx512-vpopcntdq - la57 - - - - - rdpid - bus-lock-detect"
    " cldemote - movdiri movdir64b - sgxlc pks",
    (7, 0, EDX): "- - avx512-4vnniw avx512-4fmaps fsrm - - - avx512-vp2intersect srbds-ctrl"
    " md-clear rtm-always-abort - - serialize hybrid tsx-ldtrk - - arch-lbr ibt - amx-bf16"
    " avx512-fp16 amx-tile amx-int8 spec-ctrl stibp flush-l1d arch-capabilities core-capability"
    " ssbd",
    (7, 1, EAX): "sha512 sm3 sm4 - avx-vnni avx512-bf16 lass cmpccxadd - - fzrm fsrs fsrc - - - -"
    " fred lkgs wrmsrns - amx-fp16 - avx-ifma - - lam",
    (7, 2, EDX): "intel-psfd ipred-ctrl rrsba-ctrl ddpd-u bhi-ctrl mcdt-no",
    (0xD, 1, EAX): "xsaveopt xsavec xgetbv1 xsaves xfd",
    (0x80000001, 0, ECX): "lahf-lm cmp-legacy svm extapic cr8legacy abm sse4a misalignsse"
    " 3dnowprefetch osvw ibs xop skinit wdt - lwp fma4 tce - nodeid-msr - tbm topoext perfctr-core"
    " perfctr-nb - - - perfctr-llc",
    (0x80000001, 0, EDX): "- - - - - - - - - - - syscall - - - - - - - - nx - mmxext - -"
    " fxsr-opt pdpe1gb rdtscp - lm 3dnowext 3dnow",
    (0x80000007, 0, EDX): "- - - - - - - - invtsc",
    (0x80000008, 0, EBX): "clzero - xsaveerptr - rdpru - - - - wbnoinvd - - ibpb - ibrs amd-stibp -"
    " stibp-always-on - - - - - - amd-ssbd virt-ssbd amd-no-ssb - amd-psfd",
    (0x8000000A, 0, EDX): "npt lbrv svm-lock nrip-save tsc-scale vmcb-clean flushbyasid"
    " decodeassists - - pause-filter - pfthreshold avic - v-vmsave-vmload vgif - - - - - - - -"
    " vnmi",
    (0x80000021, 0, EAX): "no-nested-data-bp - lfence-always-serializing - - - null-sel-clr-base -"
    " auto-ibrs",
    (0x40000001, 0, EAX): "kvmclock kvm-nopiodelay kvm-mmu kvmclock kvm-asyncpf kvm-steal-time"
    " kvm-pv-eoi kvm-pv-unhalt - kvm-pv-tlb-flush kvm-asyncpf-vmexit kvm-pv-ipi kvm-poll-control"
    " kvm-pv-sched-yield kvm-asyncpf-int kvm-msi-ext-dest-id - - - - - - - - kvmclock",
}

#: Other names of the same features, as /proc/cpuinfo and QEMU have them; "_" and "." read as "-".
ALIASES = {
    "pni": "sse3",
    "pclmulqdq-ni": "pclmulqdq",
    "tsc-deadline-timer": "tsc-deadline",
    "sha": "sha-ni",
    "lzcnt": "abm",
    "svme": "svm",
    "svm-npt": "npt",
    "ffxsr": "fxsr-opt",
    "i64": "lm",
    "xd": "nx",
    "cet-ss": "shstk",
    "cet-ibt": "ibt",
    "nonstop-tsc": "invtsc",
    "pause-filter-count": "pause-filter",
}
#: AMD repeats these features of leaf 1 in EDX of leaf 0x80000001, at the same bits.
AMD_EDX_COPIES = 0x0183F3FF
VENDORS = ("GenuineIntel", "AuthenticAMD", "HygonGenuine", "CentaurHauls")
#: Leaves that name the hypervisor and its features; software looks for them at each multiple of
#: 0x100.
HYPERVISOR_LEAVES = range(0x40000000, 0x40010000)
