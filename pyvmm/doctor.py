"""Finds out what this machine can do for pyvmm, and how to get what is missing."""

from __future__ import annotations

import os

from pyvmm.programs import which

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Literal

    State = Literal["ok", "missing", "note"]

#: KVM's vendor modules: name -> (what it is, whether stock Linux guests run on it).
FLAVOURS = {
    "kvm_intel": ("Intel VMX", True),
    "kvm_amd": ("AMD SVM", True),
    "kvm_pvm": ("software KVM, runs only test kernels and no stock Linux", False),
}
#: Capabilities that pyvmm uses if they exist. The required ones are REQUIRED in pyvmm.kvm.
OPTIONAL = {
    "KVM_CAP_IOEVENTFD_ANY_LENGTH": "doorbells of any width in one descriptor",
    "KVM_CAP_TSC_DEADLINE_TIMER": "the guest's cheapest timer",
    "KVM_CAP_BINARY_STATS_FD": "KVM's own statistics in reports",
    "KVM_CAP_SIGNAL_MSI": "interrupts without a route",
}
OK: State = "ok"
MISSING: State = "missing"
NOTE: State = "note"


class Finding:
    """One line of the doctor's report.

    :ivar state: "ok", "missing", or "note" if something is missing that only some uses need.
    :ivar remedy: what to do; empty if there is nothing to do.
    """

    __slots__ = ("detail", "name", "remedy", "state")

    def __init__(self, name: str, state: State, detail: str, remedy: str = "") -> None:
        self.name, self.state, self.detail, self.remedy = name, state, detail, remedy


def flavour() -> str:
    """The vendor module behind /dev/kvm ("kvm_amd"); an empty string if no module is loaded that
    pyvmm knows.
    """
    # kvm_pvm comes first: hardware virtualisation does not work while it is loaded.
    return next(
        (
            name
            for name in ("kvm_pvm", "kvm_intel", "kvm_amd")
            if os.path.isdir(f"/sys/module/{name}")
        ),
        "",
    )


def can_run_linux_locally() -> tuple[bool, str]:
    """Whether this machine's own KVM runs stock Linux; and why not, if it does not. This is cheap,
    because every ``pyvmm run`` asks.
    """
    if not os.path.exists("/dev/kvm"):
        return False, "there is no /dev/kvm"
    if not os.access("/dev/kvm", os.R_OK | os.W_OK):
        return False, "no permission to open /dev/kvm"
    name = flavour()
    what, good = FLAVOURS.get(name, ("", True))
    return (True, "") if good else (False, f"this KVM is {name} ({what})")


def examine() -> list[Finding]:
    """Check everything; takes well under a second."""
    return [
        *_kvm(),
        _device(
            "vhost-net",
            "/dev/vhost-net",
            "--net vhost-net runs only in the testbed",
            "modprobe vhost_net",
        ),
        *_vdpa(),
        _device("tun", "/dev/net/tun", "no tap devices, so no network cards", "modprobe tun"),
        *_namespaces(),
        _huge_pages(),
        _transparent_huge_pages(),
        *_tools(),
        *_testbed(),
    ]


def verdict() -> tuple[int, str]:
    """Whether and where ``pyvmm run`` runs Linux guests: (exit status of ``pyvmm doctor``, one
    line).
    """
    from pyvmm.testbed.testbed import Testbed

    good, why = can_run_linux_locally()
    if good:
        return 0, "Linux guests run on this machine's own KVM"
    lacks = Testbed.missing()
    if not lacks:
        return 3, f"Linux guests run in the testbed: {why}"
    return (
        1,
        f"Linux guests cannot run: {why}, and the testbed is not set up (run: pyvmm testbed setup)",
    )


def _kvm() -> Iterator[Finding]:
    name = flavour()
    what, good = FLAVOURS.get(name, ("no vendor module that pyvmm knows", True))
    try:
        from pyvmm import kvm as api
        from pyvmm.errors import PyvmmError
    except ImportError as e:
        yield Finding("extension", MISSING, f"pyvmm's C extension does not load: {e}", "make setup")
        return
    yield Finding("extension", OK, "pyvmm's C extension loads")
    try:
        kvm = api.Kvm()
    except PyvmmError as e:
        yield Finding("kvm", MISSING, e.cause, e.hint)
        return
    with kvm:
        nested = _read(f"/sys/module/{name}/parameters/nested") in ("1", "Y")
        yield Finding(
            "kvm", OK, f"/dev/kvm, API version {api.ioctl(kvm.fileno(), 'KVM_GET_API_VERSION')}"
        )
        yield Finding(
            "kvm flavour",
            OK if good else NOTE,
            f"{name or 'unknown'}: {what}{', nested' if nested else ''}",
            "" if good else "Linux guests run in the testbed",
        )
        lacks = [cap for cap in api.REQUIRED if not kvm.extension(cap)]
        yield Finding(
            "kvm extensions",
            MISSING if lacks else OK,
            f"lacks {', '.join(lacks)}" if lacks else f"all {len(api.REQUIRED)} that pyvmm needs",
            "use a newer kernel, or the testbed" if lacks else "",
        )
        for cap, use in OPTIONAL.items():
            if not kvm.extension(cap):
                yield Finding("kvm extensions", NOTE, f"no {cap} ({use})")
        recommended, most = kvm.extension("KVM_CAP_NR_VCPUS"), kvm.extension("KVM_CAP_MAX_VCPUS")
        slots = kvm.extension("KVM_CAP_NR_MEMSLOTS")
        yield Finding(
            "kvm limits", OK, f"{most} vCPUs ({recommended} recommended), {slots} memory slots"
        )


def _device(name: str, path: str, without: str, load: str) -> Finding:
    if not os.path.exists(path):
        return Finding(
            name, NOTE, f"no {path}: {without}", f"run as root: {load}, or use the testbed"
        )
    if not os.access(path, os.R_OK | os.W_OK):
        return Finding(
            name, NOTE, f"no permission for {path}: {without}", "join its group, or use the testbed"
        )
    return Finding(name, OK, path)


def _vdpa() -> Iterator[Finding]:
    """Each vDPA device, and whether pyvmm can make one itself."""
    without = "--net vhost-vdpa runs only in the testbed, with --kernel-version 6.12"
    if not os.path.isdir("/sys/bus/vdpa"):
        yield Finding(
            "vdpa", NOTE, f"no vDPA in the kernel: {without}", "run as root: modprobe vhost_vdpa"
        )
        return
    from pyvmm.datapath.vdpa_device import find, names
    from pyvmm.errors import PyvmmError

    for name in names():
        try:
            path = find(name)[0]
        except PyvmmError as e:
            yield Finding("vdpa", NOTE, e.cause, e.hint)
            continue
        allowed = os.access(path, os.R_OK | os.W_OK)
        yield Finding(
            "vdpa",
            OK if allowed else NOTE,
            f"{name}: {path}" if allowed else f"{name}: no permission for {path}",
            "" if allowed else f"run as root: chown $USER {path}",
        )
    yield _device(
        "vduse",
        "/dev/vduse/control",
        "--net vhost-vdpa needs device=",
        "modprobe vduse",
    )


def _namespaces() -> Iterator[Finding]:
    """Go the whole way that a card goes, up to a tap: limits, sysctls, seccomp filters and security
    modules can each forbid a part of the way.
    """
    from pyvmm.errors import PyvmmError
    from pyvmm.hostnet import netns, userns

    problem = netns.why_no_user_namespace()
    yield Finding(
        "user namespaces",
        NOTE if problem else OK,
        f"not allowed: {problem}" if problem else "allowed",
        f"run as root: {userns.remedy()}" if problem else "",
    )
    name = "network namespaces"
    try:
        with netns.Namespace():
            yield Finding(name, OK, "allowed: pyvmm can make taps of its own")
    except PyvmmError as e:
        yield Finding(name, MISSING, f"no tap of pyvmm's own: {e.cause}", e.hint)


def _huge_pages() -> Finding:
    base = "/sys/kernel/mm/hugepages/hugepages-2048kB"
    total, free = _read(f"{base}/nr_hugepages"), _read(f"{base}/free_hugepages")
    if total in ("", "0"):
        return Finding(
            "huge pages", NOTE, "none reserved", "run as root: sysctl vm.nr_hugepages=512"
        )
    return Finding("huge pages", OK, f"{free} of {total} free, 2 MiB each")


def _transparent_huge_pages() -> Finding:
    """Whether guest memory, which is shared memory, gets huge pages by madvise(2)."""
    name, path = "transparent huge pages", "/sys/kernel/mm/transparent_hugepage/shmem_enabled"
    choice = _read(path).partition("[")[2].partition("]")[0]
    if not choice:
        return Finding(name, NOTE, "this kernel has none for shared memory")
    if choice in ("never", "deny"):
        return Finding(
            name,
            NOTE,
            "not for shared memory: guests boot slower",
            f"run as root: echo advise > {path}",
        )
    return Finding(name, OK, f"for guest memory ({choice})")


#: Tool -> (package, its purpose, whether ``make demo`` needs it).
TOOLS = {
    "qemu-system-x86_64": ("qemu-system-x86", "the testbed and benchmarks", False),
    "gcc": ("gcc", "the C extension and test kernels", True),
    "ip": ("iproute2", "taps", True),
    "dpkg-deb": ("dpkg", "unpacking Debian's kernel for images", True),
    "depmod": ("kmod", "modules of a downloaded kernel", True),
    "ping": ("iputils-ping", "`pyvmm demo`", True),
    "iperf3": ("iperf3", "`pyvmm demo` and throughput tests", True),
}


def _tools() -> Iterator[Finding]:
    for tool, (package, use, needed) in TOOLS.items():
        where = which(tool, "/usr/sbin:/sbin")
        yield Finding(
            tool,
            OK if where else MISSING if needed else NOTE,
            where or f"missing: for {use}",
            "" if where else f"run as root: apt-get install {package}",
        )


def _testbed() -> Iterator[Finding]:
    """Both testbeds. The one with an Intel processor is optional, and told if Bochs is there."""
    from pyvmm.host.bochs import find
    from pyvmm.testbed.testbed import Testbed

    yield from _amd_testbed()
    bochs = find()
    if bochs is not None:
        up = "up" if Testbed(cpu="intel").is_up() else "down"
        yield Finding("testbed", OK, f"set up with --cpu intel: {bochs}; {up}")


def _amd_testbed() -> Iterator[Finding]:
    from pyvmm.host.qemu import newest
    from pyvmm.testbed import assets
    from pyvmm.testbed.testbed import Testbed

    lacks = assets.missing()
    state: State = NOTE if can_run_linux_locally()[0] else MISSING
    for what, remedy in lacks:
        yield Finding("testbed", state, f"{what} is missing", remedy)
    if lacks:
        return
    qemu, kernel = newest(), assets.find_kernel(None)
    up = "up" if Testbed().is_up() else "down"
    yield Finding("testbed", OK, f"set up: Linux {kernel.version}, {qemu}; {up}")
    if qemu.max_cpus < 2:
        yield Finding(
            "testbed",
            NOTE,
            f"{qemu} hangs with two vCPUs, so the testbed has one",
            "run: pyvmm testbed setup",
        )


def _read(path: str) -> str:
    try:
        with open(path, encoding="ascii") as f:
            return f.read().strip()
    except OSError:
        return ""
