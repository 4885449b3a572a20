"""The programs and files of the testbed: QEMU, virtiofsd, Debian's cloud kernel as vmlinux, and an
initramfs with the agent.

The boot files are built once per kernel version and kept in the cache. Their directory's name holds
the hash of all inputs. It appears atomically, so several processes may build at once.
"""

from __future__ import annotations

import os
import re
import shutil
import sys

from pyvmm.errors import HostError, TestbedError
from pyvmm.host import qemu
from pyvmm.host.paths import cache_dir
from pyvmm.programs import install, which

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

#: Modules in the initramfs; each is loaded after the modules that it needs. EARLY ones are loaded
#: first because mounting the root needs them, LATE ones while the agent starts. Any other module
#: comes by modprobe from the shared root.
EARLY = ["virtio_pci", "virtiofs", "overlay", "virtio_console"]
KVM = "kvm_amd"
LATE = [KVM, "tun", "vhost_net", "vhost_vsock"]
#: The kernel whose figures the documentation quotes; preferred to others that are there.
DEFAULT_KERNEL = "6.1"
#: How the names of kernels for virtual machines end: Debian's, Ubuntu's (images/default.toml).
FLAVOURS = ("-cloud-amd64", "-generic")
#: Boot files that nobody has used for so many seconds are removed.
UNUSED = 14 * 86400.0
SETUP_HINT = "run: pyvmm testbed setup"


class Virtiofsd:
    """A virtiofsd, which exports the host's files to L1.

    :ivar path: of the program. :ivar package: Debian's package that has it.
    :ivar fresh: seconds after which L1 asks anew for names and attributes, where it must.
    """

    def __init__(
        self,
        path: str,
        package: str,
        fresh: float,
        argv: list[str],
        fixed: list[str],
        changing: list[str],
    ) -> None:
        self.path, self.package, self.fresh = path, package, fresh
        self._argv, self._fixed, self._changing = argv, fixed, changing

    def argv(self, fd: int, *, changing: bool) -> list[str]:
        """The command.

        :param fd: a listening socket.
        :param changing: files that change while L1 runs are exported; else L1 may cache for ever.
        """
        cache = self._changing if changing else self._fixed
        return [self.path, f"--fd={fd}", *self._argv, *cache]


#: Debian 13 has the program in Rust, whose times of caching are fixed and which shows mount points
#: as such, where an overlay does not look below. Debian 12 has the one in C; that path leads to the
#: other program in Debian 13.
VIRTIOFSDS = (
    Virtiofsd(
        "/usr/libexec/virtiofsd",
        "virtiofsd",
        1.0,
        [
            *("--shared-dir=/", "--sandbox=chroot", "--xattr", "--log-level=warn"),
            "--no-announce-submounts",
        ],
        ["--cache=always"],
        ["--cache=auto"],
    ),
    Virtiofsd(
        "/usr/lib/qemu/virtiofsd",
        "qemu-system-common",
        0.1,
        ["-osource=/", "-osandbox=chroot", "-oxattr", "-olog_level=warn"],
        ["-ocache=always"],
        ["-ocache=always", "-otimeout=0.1"],
    ),
)

# What every /init does at its end; $n is the directory of the new root.
MOUNTS = """\
$b ln -s /proc/self/fd $n/dev/fd
for i in 0:stdin 1:stdout 2:stderr; do $b ln -s fd/${i%:*} $n/dev/${i#*:}; done
$b mkdir -p $n/dev/pts $n/dev/shm
$b mount -t devpts -o ptmxmode=666 devpts $n/dev/pts; $b mount -t tmpfs shm $n/dev/shm
$b mount -t debugfs debugfs $n/sys/kernel/debug
$b mount -t tracefs tracefs $n/sys/kernel/tracing
$b mount -t cgroup2 cgroup2 $n/sys/fs/cgroup
$b ip link set lo up; $b hostname l1
"""

# The script that busybox runs as /init under QEMU. At its end it executes the agent.
INIT = """\
#!/busybox sh
b=/busybox r=/run/pyvmm
$b mount -t proc proc /proc; $b mount -t sysfs sys /sys; $b mount -t devtmpfs dev /dev
for m in $($b cat /early); do $b insmod /m/$m || $b echo "L1: cannot load $m"; done
$b mkdir -p /lo /work /ov /new
$b mount -t virtiofs root /lo || $b echo "L1: cannot mount the root"
$b mount -t virtiofs work /work || $b echo "L1: cannot mount the working directories"
$b mount -t tmpfs ov /ov; $b mkdir /ov/u /ov/w
o=lowerdir=/lo,upperdir=/ov/u,workdir=/ov/w
$b mount -t overlay -o $o root /new || $b echo "L1: cannot mount the overlay"
$b mount -t tmpfs run /new/run; $b mkdir /new$r /new/run/lock
$b cp /busybox /m/* /late.sh /agent.pyc /protocol.pyc /new$r/
for k in $($b cat /proc/cmdline); do case $k in l1kvm=*) q=${k#l1kvm=};; esac; done
$b chroot /new $r/busybox sh $r/late.sh $($b echo $q | $b tr , ' ') &
for d in proc sys dev; do $b mount --move /$d /new/$d; done
$b mkdir -p /new/.work; $b mount --move /work /new/.work
n=/new
""" + MOUNTS + """\
for k in $($b cat /new/proc/cmdline); do case $k in l1python=*) p=${k#l1python=};; esac; done
exec $b switch_root /new $p -I -S -B $r/agent.pyc
"""  # fmt: skip


class Kernel:
    """One of Debian's or Ubuntu's kernels for virtual machines.

    :ivar image: the path of its bzImage.
    :ivar root: the directory that has lib/modules/VERSION; empty for the system's root.
    """

    def __init__(self, version: str, image: str, root: str) -> None:
        self.version, self.image, self.root = version, image, root


def kernels() -> list[Kernel]:
    """All such kernels that are installed or unpacked in the cache, the newest first."""
    found = {}
    base = cache_dir("kernel")
    # The cache comes last: a kernel there may have modules that were built for it.
    for root in ["", *(f"{base}/{name}" for name in sorted(os.listdir(base)))]:
        boot = f"{root}/boot"
        for name in os.listdir(boot) if os.path.isdir(boot) else ():
            version = name.removeprefix("vmlinuz-")
            if (
                version != name
                and version.endswith(FLAVOURS)
                and os.path.exists(f"{root}/lib/modules/{version}/modules.dep")
                and os.access(f"{boot}/{name}", os.R_OK)
            ):
                found[version] = Kernel(version, f"{boot}/{name}", root)
    return sorted(found.values(), key=lambda k: qemu.version(k.version), reverse=True)


def find_kernel(version: str | None, setup: str = SETUP_HINT) -> Kernel:
    """The newest kernel whose version starts with ``version``. If ``version`` is None, 6.1 is
    preferred to other versions.

    :param setup: the remedy, which fetches 6.1.
    :raises TestbedError: there is no such kernel.
    """
    have = kernels()
    for wanted in [version] if version else [DEFAULT_KERNEL, ""]:
        for k in have:
            if k.version == wanted or k.version.startswith(f"{wanted}.") or not wanted:
                return k
    hint = f"{setup}{f' --kernel-version {version}' if version else ''}"
    raise TestbedError(f"there is no Debian cloud kernel{f' {version}' if version else ''}", hint)


def virtiofsd() -> Virtiofsd | None:
    """The virtiofsd of this machine."""
    return next((one for one in VIRTIOFSDS if os.access(one.path, os.X_OK)), None)


def missing() -> list[tuple[str, str]]:
    """The things that the testbed needs and this machine lacks, each with its remedy."""
    lacks = []
    if not qemu.unpacked() and not which(qemu.NAME):
        lacks.append((qemu.NAME, install("qemu-system-x86")))
    if not virtiofsd():
        lacks.append(("virtiofsd", install("|".join(one.package for one in VIRTIOFSDS))))
    if not busybox():
        lacks.append(("a static busybox", install("busybox-static")))
    if not kernels():
        if not _depmod():
            lacks.append(("depmod", install("kmod")))
        lacks.append(("Debian's cloud kernel", SETUP_HINT))
    return lacks


def _depmod() -> str | None:
    return which("depmod", "/usr/sbin:/sbin")


def setup(progress: Callable[[str], None], version: str | None = None) -> None:
    """Fetch what can be had without root (the kernel, and QEMU from backports), and build the boot
    files.

    :param version: a prefix of the kernel's version, such as "6.1" or "6.12".
    :raises TestbedError: a system package is missing, or a download failed.
    """
    lacks = [f"{what} is missing ({hint})" for what, hint in missing() if hint != SETUP_HINT]
    if lacks:
        raise TestbedError("; ".join(lacks))
    try:
        _fetch(progress, version)
    except HostError as e:
        raise TestbedError(e.cause, e.hint) from None
    boot_files(find_kernel(version), progress)


def _fetch(progress: Callable[[str], None], version: str | None) -> None:
    """Fetch QEMU if the installed one supports one vCPU only, and the kernel if it is missing."""
    best = qemu.qemus()
    if best and best[0].max_cpus < 2:
        from pyvmm.host.apt import codename

        if codename():
            _fetch_qemu(progress)
        else:
            progress(f"{best[0]} is old, and only Debian has backports: the testbed has one vCPU")
    try:
        find_kernel(version)
    except TestbedError:
        fetch_kernel(version, progress)


def _fetch_qemu(progress: Callable[[str], None]) -> None:
    """Unpack the QEMU of backports into the cache. It uses the libraries of the installed QEMU."""
    import subprocess
    from pathlib import Path

    from pyvmm.host.apt import Apt

    apt = Apt("backports", progress)
    packages = ["qemu-system-x86", "qemu-system-data", "seabios"]
    version = apt.resolve(packages)[0].version
    number = re.match(r"(?:\d+:)?(\d+(?:\.\d+)+)", version)
    if not number:
        raise TestbedError(
            f"backports have a QEMU of version {version}", "install QEMU 8.1 or newer"
        )
    target = f"{cache_dir('qemu')}/{number[1]}"
    apt.install(packages, Path(target))
    try:
        subprocess.run([f"{target}/{qemu.PROGRAM}", "--version"], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as e:
        shutil.rmtree(target)
        progress(f"QEMU {number[1]} does not start here ({e}): the testbed has one vCPU")


def fetch_kernel(version: str | None, progress: Callable[[str], None]) -> None:
    """Unpack the newest cloud kernel of ``version`` into the cache. It comes from this Debian
    release, from backports or from a newer release; None for the release's own.
    """
    import subprocess
    from pathlib import Path

    from pyvmm.host.apt import find_kernel_package
    from pyvmm.images.sources import recipe

    apt, names = find_kernel_package(recipe()["kernel"], version, progress)
    number = names[0].removeprefix("linux-image-")
    target = f"{cache_dir('kernel')}/{number}"
    apt.install(names, Path(target))
    if os.path.isdir(f"{target}/usr/lib/modules"):  # packages of a merged /usr have no /lib
        os.makedirs(f"{target}/lib", exist_ok=True)
        os.rename(f"{target}/usr/lib/modules", f"{target}/lib/modules")
    image = f"{target}/lib/modules/{number}/vmlinuz"
    if os.path.exists(image):  # where Debian 14 has it
        os.makedirs(f"{target}/boot", exist_ok=True)
        os.rename(image, f"{target}/boot/vmlinuz-{number}")
    depmod = _depmod()
    if not depmod or subprocess.run([depmod, "-b", target, number], capture_output=True).returncode:
        shutil.rmtree(target)
        raise TestbedError("depmod is missing, or it failed", "install kmod")


def boot_files(kernel: Kernel, progress: Callable[[str], None]) -> tuple[str, str]:
    """The paths of vmlinux and initramfs for ``kernel``. They are built if necessary.

    :raises PyvmmError: a tool is missing, or the kernel image is not in the expected form.
    """

    def build(into: str) -> None:
        with open(f"{into}/vmlinux", "wb") as f:
            f.write(vmlinux(kernel))
        with open(f"{into}/initrd", "wb") as f:
            f.write(initramfs(kernel))

    inputs = [INIT, EARLY, LATE, sys.version, stamp(kernel.image), *map(content, agent_sources())]
    target = kept(kernel.version, inputs, build, progress)
    return f"{target}/vmlinux", f"{target}/initrd"


def vmlinux(kernel: Kernel) -> bytes:
    """The kernel as ELF. Unpacking it here is faster than letting it unpack itself under emulation.

    :raises BuildError: the kernel image is not in the expected form.
    """
    from pyvmm.images.kernel import extract_vmlinux

    return extract_vmlinux(content(kernel.image))


def kept(
    name: str,
    inputs: Iterable[object],
    build: Callable[[str], None],
    progress: Callable[[str], None],
) -> str:
    """A directory in the cache whose files are made of ``inputs``. It is built if necessary.

    :param name: the beginning of the directory's name, which a hash of the inputs follows.
    :param build: called with an empty directory, into which it writes the files.
    """
    import hashlib
    import time

    digest = hashlib.sha256(repr(list(inputs)).encode()).hexdigest()
    base = cache_dir("boot")
    target = f"{base}/{name}-{digest[:12]}"
    if not os.path.isdir(target):
        progress(f"preparing {name}")
        work = f"{target}.{os.getpid()}"
        os.mkdir(work)
        try:
            build(work)
            try:
                os.rename(work, target)
            except OSError:  # another process was faster
                if not os.path.isdir(target):
                    raise
        finally:
            shutil.rmtree(work, ignore_errors=True)
        for old in os.listdir(base):
            if time.time() - os.stat(f"{base}/{old}").st_mtime > UNUSED:
                shutil.rmtree(f"{base}/{old}", ignore_errors=True)
    os.utime(target)
    return target


def stamp(path: str) -> str:
    """A text by which a changed file is known."""
    info = os.stat(path)
    return f"{path} {info.st_size} {info.st_mtime_ns}"


def initramfs(kernel: Kernel) -> bytes:
    """L1's initramfs as a cpio archive: busybox, the modules in load order, the agent, and an init
    that starts the agent.
    """
    from pathlib import Path

    from pyvmm.images.cpio import Archive
    from pyvmm.images.kernel import Modules

    archive = Archive()
    for path in ("/proc", "/sys", "/dev"):
        archive.directory(path)
    archive.file("/busybox", content(busybox()), 0o755)
    archive.file("/init", INIT.encode(), 0o755)
    modules = Modules(Path(f"{kernel.root}/lib/modules/{kernel.version}"))
    early = modules.closure(EARLY)
    late = {name: found for name, found in modules.closure(LATE).items() if name not in early}
    for name, (_, _, data) in {**early, **late}.items():
        archive.file(f"/m/{name}.ko", data)
    archive.file("/early", "".join(f"{name}.ko\n" for name in early).encode())
    load = "".join(
        f"$r/busybox insmod $r/{name}.ko{' $*' if name == KVM else ''}\n" for name in late
    )
    archive.file("/late.sh", f"r=/run/pyvmm\n{load}$r/busybox touch $r/loaded\n".encode())
    for name, data in agent_files():
        archive.file(f"/{name}", data)
    return archive.pack()


def agent_sources() -> list[str]:
    """The paths of the agent's modules."""
    here = os.path.dirname(os.path.abspath(__file__))
    return [f"{here}/agent.py", f"{here}/protocol.py"]


def agent_files() -> list[tuple[str, bytes]]:
    """The agent's modules as bytecode, each with the name of its file."""
    import py_compile
    import tempfile

    files = []
    with tempfile.TemporaryDirectory() as work:
        for source in agent_sources():
            name = os.path.basename(source)
            py_compile.compile(source, f"{work}/{name}c", dfile=name, doraise=True)
            files.append((f"{name}c", content(f"{work}/{name}c")))
    return files


def busybox() -> str:
    """The path of a statically linked busybox; empty if there is none."""
    for path in (which("busybox"), "/bin/busybox"):
        if path and os.access(path, os.R_OK):
            with open(path, "rb") as f:
                head = f.read(4096)
            # A static program has no program header of type PT_INTERP (3). Every ``pyvmm run``
            # comes here, so we look ourselves instead of importing an ELF library.
            at = int.from_bytes(head[32:40], "little")
            size, count = head[54], head[56]
            kinds = [head[at + i * size] for i in range(count)]
            if head[:4] == b"\x7fELF" and 3 not in kinds:
                return path
    return ""


def content(path: str) -> bytes:
    """The bytes of a file."""
    with open(path, "rb") as f:
        return f.read()
