"""Finds out what this machine can do for pyvmm, and how to get what is missing."""

from __future__ import annotations

import os
from contextlib import closing

from pyvmm.programs import install, which

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Literal

    from pyvmm.kvm import Kvm

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
#: Bytes of a guest's memory unless --memory says otherwise.
DEFAULT_MEMORY = 256 << 20
BUILD = "install pyvmm again; in a checkout: make setup"
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
        *_directories(),
        _image(),
        _memory(),
        _huge_pages(),
        _transparent_huge_pages(),
        *_tools(),
        *_testbed(),
    ]


def verdict() -> tuple[int, str]:
    """Whether and where ``pyvmm run`` runs Linux guests: (exit status of ``pyvmm doctor``, one
    line).
    """
    from pyvmm.errors import PyvmmError
    from pyvmm.testbed.testbed import Testbed

    good, why = can_run_linux_locally()
    if good:
        return 0, "Linux guests run on this machine's own KVM"
    try:
        lacks = Testbed.missing()
    except PyvmmError as e:
        return 1, f"Linux guests cannot run: {why}, and the testbed cannot be used: {e}"
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
        yield Finding("extension", MISSING, f"pyvmm's C extension does not load: {e}", BUILD)
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
        yield _vm(kvm)
        yield Finding(
            "kvm limits", OK, f"{most} vCPUs ({recommended} recommended), {slots} memory slots"
        )


def _vm(kvm: Kvm) -> Finding:
    """Whether KVM makes a VM: another hypervisor may have the processor, or a limit be reached."""
    from pyvmm.errors import PyvmmError
    from pyvmm.kvm.vm import Vm
    from pyvmm.memory import PAGE, GuestMemory

    try:
        with closing(GuestMemory(256 * PAGE)) as memory, closing(Vm(kvm, memory)) as vm:
            vm.settle()
            return Finding("kvm vm", OK, "KVM makes a VM with memory and interrupt controllers")
    except PyvmmError as e:
        remedy = e.hint or "end other hypervisors, and see the kernel's log (dmesg)"
        return Finding("kvm vm", MISSING, f"KVM makes no VM: {e.cause}", remedy)


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
        userns.remedy() if problem else "",
    )
    name = "network namespaces"
    try:
        with netns.Namespace():
            yield Finding(name, OK, "allowed: pyvmm can make taps of its own")
    except PyvmmError as e:
        yield Finding(name, MISSING, f"no tap of pyvmm's own: {e.cause}", e.hint)


def _directories() -> Iterator[Finding]:
    """A file is made in the cache, and a socket where control sockets are: a container may have a
    root that is read-only.
    """
    import socket

    from pyvmm.control.registry import directory
    from pyvmm.errors import PyvmmError
    from pyvmm.host.limits import why_not_writable
    from pyvmm.host.paths import cache_root

    name = "cache"
    try:
        path = cache_root()
        problem = why_not_writable(path)
        without = "no image or testbed can be set up"
        remedy = "set XDG_CACHE_HOME to a directory of your own that has room"
        if problem:
            yield Finding(name, NOTE, f"cannot be written, so {without}: {problem}", remedy)
        else:
            yield Finding(name, OK, path)
    except PyvmmError as e:
        yield Finding(name, MISSING, e.cause, e.hint)
    name = "control sockets"
    try:
        path = directory()
        with socket.socket(socket.AF_UNIX) as probe:
            place = f"{path}/.doctor-{os.getpid()}"
            probe.bind(place)
            os.unlink(place)
        yield Finding(name, OK, path)
    except (PyvmmError, OSError) as e:
        cause, hint = (e.cause, e.hint) if isinstance(e, PyvmmError) else (str(e), "")
        remedy = hint or "set XDG_RUNTIME_DIR to a directory of yours"
        yield Finding(name, NOTE, f"none, so no command finds a running machine: {cause}", remedy)


def _image() -> Finding:
    """What `pyvmm run` boots unless it is told another kernel."""
    from pyvmm import images
    from pyvmm.errors import PyvmmError

    try:
        image = images.find()
        return Finding("guest image", OK, f"Linux {image.version}: {image.directory}")
    except PyvmmError as e:
        remedy = e.hint
        if which("dpkg-deb") is None:
            remedy = "this is no Debian: pyvmm image build --from-host takes this machine's kernel"
        return Finding("guest image", MISSING, e.cause, remedy)


def _memory() -> Finding:
    """How much memory a guest can have here: of the machine, and by control groups."""
    from pyvmm.host.limits import memory_limit

    kilobytes = _read("/proc/meminfo").partition("MemAvailable:")[2].split()[:1]
    free = int(kilobytes[0]) << 10 if kilobytes else 0
    limit = memory_limit()
    text = f"{free >> 20} MiB available"
    if limit is None or limit[0] > free:
        scarce = free < DEFAULT_MEMORY
        remedy = "end other programs, or give guests less: --memory 128M" if scarce else ""
        return Finding("memory", NOTE if scarce else OK, text, remedy)
    text = f"{limit[0] >> 20} MiB by the limit of a control group ({limit[1]})"
    if limit[0] > DEFAULT_MEMORY:
        return Finding("memory", OK, text)
    return Finding(
        "memory",
        NOTE,
        f"{text}: the kernel kills a guest that uses the usual {DEFAULT_MEMORY >> 20} MiB",
        "raise it (docker run --memory), or give guests less: --memory 128M",
    )


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


#: Tool -> (package, its purpose). Each is for some uses only.
TOOLS = {
    "qemu-system-x86_64": ("qemu-system-x86", "the testbed and benchmarks"),
    "gcc": ("gcc", "images with --tiny, and the testbed with an Intel processor"),
    "depmod": ("kmod", "setting up the testbed"),
    "ping": ("iputils-ping", "`pyvmm demo`"),
    "iperf3": ("iperf3", "`pyvmm demo` and `pyvmm compare`"),
}


def _tools() -> Iterator[Finding]:
    for tool, (package, use) in TOOLS.items():
        where = which(tool, "/usr/sbin:/sbin")
        yield Finding(
            tool,
            OK if where else NOTE,
            where or f"missing: for {use}",
            "" if where else install(package),
        )


def _testbed() -> Iterator[Finding]:
    """Both testbeds. The one with an Intel processor is optional, and told if Bochs is there."""
    from pyvmm.errors import PyvmmError
    from pyvmm.host.bochs import find
    from pyvmm.testbed.testbed import Testbed

    try:
        yield from _amd_testbed()
        bochs = find()
    except PyvmmError as e:
        yield Finding("testbed", MISSING, e.cause, e.hint)
        return
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
