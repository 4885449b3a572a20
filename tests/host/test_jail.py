"""A jail, from outside and from inside: what a process in it is, sees and can reach, what it takes
from the host, and what is left of it.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pyvmm import jail
from pyvmm.diskopt import Disk
from pyvmm.errors import DiskError, ShareError, UsageError
from pyvmm.host import cgroup, storage_daemon, virtiofsd
from pyvmm.hostnet import isolate, links
from pyvmm.jailopt import Jail
from tests.driver import wait_for
from tests.host.taps import own_tap
from tests.host.test_confined import status_of, threads
from tests.host.test_sandbox import ask, busy, running
from tests.inject import EXECVE
from tests.strangers import BECOME, need_readable_checkout, open_directory
from tests.unit.test_disk import qcow2_image, raw_image, with_backing

ROOT = Path(__file__).parents[2]
Guest = Callable[[str], str]
PATIENCE = 60.0
PYVMM = [sys.executable, "-m", "pyvmm"]
#: Nobody else's user and group.
USER, GROUP = 65431, 65432
OPTION = ["--jail", f"{USER}:{GROUP}"]

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root makes jails")


def run(*args: str, command: str = "run") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*PYVMM, command, "--host", "local", *OPTION, *args],
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=PATIENCE * 3,
    )


def hello(guest: Guest, *args: str) -> list[str]:
    return ["--kernel", guest("hello"), "--memory", "4M", *args]


def below(pid: int) -> list[int]:
    """A process's descendants, parents first."""
    found = []
    for children in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            for child in map(int, children.read_text().split()):
                found += [child, *below(child)]
    return found


def vmm(pid: int) -> int:
    """The process in the jail that has the vCPUs, once it is confined; else 0."""
    with contextlib.suppress(OSError):
        for child in below(pid):
            if "vcpu0" in threads(child) and status_of(child, "Seccomp") == "2":
                return child
    return 0


@contextlib.contextmanager
def jailed(guest: Guest, *args: str) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """A machine in a jail that sends packets without end; and its process."""
    with running(*busy(guest, *OPTION, *args)) as outside:
        found = [0]

        def runs() -> bool:
            found[0] = vmm(outside.pid)
            return found[0] != 0

        assert wait_for(runs), outside.poll()
        yield outside, found[0]


def mounted(*places: Path) -> list[str]:
    """This process's mounts of something in these places, and where jails and disks are made: other
    mounts come and go by themselves.
    """
    lines = Path("/proc/self/mountinfo").read_text().splitlines()
    top = [line for line in lines if line.split()[4] == isolate.STAGE]
    return [*top, *(line for line in lines if any(str(place) in line for place in places))]


def names(directory: str) -> set[str]:
    return {path.name for path in Path(directory).iterdir()}


def status_line(pid: int, field: str) -> list[str]:
    text = Path(f"/proc/{pid}/status").read_text()
    return next(line.split()[1:] for line in text.splitlines() if line.startswith(f"{field}:"))


def test_what_its_processes_are(guest: Guest) -> None:
    """Each is an ordinary user's without any capability, in namespaces of its own."""
    with jailed(guest) as (outside, pid):
        processes = below(outside.pid)
        assert len(processes) == 3 and pid in processes, "process 1, the VMM, its helper"
        for one in processes:
            assert status_line(one, "Uid") == [str(USER)] * 4
            assert status_line(one, "Gid") == [str(GROUP)] * 4
            assert status_line(one, "Groups") == []
            for field in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"):
                assert status_line(one, field) == ["0" * 16], field
            assert status_line(one, "NoNewPrivs") == ["1"]
            for kind in ("mnt", "pid", "ipc", "uts", "net", "cgroup"):
                ours, theirs = (Path(f"/proc/{p}/ns/{kind}").readlink() for p in ("self", one))
                assert ours != theirs, kind
            assert Path(f"/proc/{one}/ns/user").readlink() == Path("/proc/self/ns/user").readlink()
            limits = Path(f"/proc/{one}/limits").read_text()
            assert "Max core file size        0                    0" in limits
            assert os.getsid(one) != os.getsid(0), "no terminal"
        assert [status_line(one, "NSpid")[-1] for one in processes[:2]] == ["1", "2"]
        assert Path(f"/proc/{pid}/root/proc/sys/kernel/hostname").exists()


def test_what_its_root_has(guest: Guest) -> None:
    """A file system in memory, places that can only be read, and no device but a few."""
    with jailed(guest) as (_, pid):
        mounts = {}
        for line in Path(f"/proc/{pid}/mountinfo").read_text().splitlines():
            left, _, right = line.partition(" - ")
            mounts[left.split()[4]] = (right.split()[0], set(left.split()[5].split(",")))
        root = f"/proc/{pid}/root"
        top = names(root)
        devices = {str(p)[len(root) :] for p in Path(root, "dev").rglob("*") if not p.is_dir()}
        for device in devices:
            info = Path(root + device).stat()
            assert (info.st_uid, info.st_mode & 0o7777) == (USER, 0o600)
    assert mounts["/"][0] == "tmpfs" and "ro" in mounts["/"][1]
    assert mounts.pop("/proc")[0] == "proc" and mounts["/.pyvmm"][0] == "tmpfs"
    writable = {name for name, (_, options) in mounts.items() if "rw" in options}
    assert writable == {"/.pyvmm"}
    assert all(
        {"nosuid", "nodev"} <= options for name, (_, options) in mounts.items() if name != "/"
    )
    assert devices <= {"/dev/kvm", "/dev/net/tun", "/dev/vhost-net", "/dev/null"}
    assert {"/dev/kvm", "/dev/null"} <= devices
    assert not top & {"home", "root", "var", "boot", "mnt", "opt", "srv", "run"}, top
    bound = set(mounts) - {"/", "/.pyvmm"}
    allowed = ("/usr", "/etc/ld.so.cache", "/etc/localtime", "/sys/", str(ROOT), sys.base_prefix)
    venv, zone = os.path.realpath(sys.prefix), os.path.realpath("/etc/localtime")
    modules = [os.path.realpath(path) for path in sys.path]
    assert all(m.startswith((*allowed, *modules, venv, zone)) for m in bound), bound


INSIDE = """
import ctypes, errno, mmap, os, signal, socket, subprocess, sys
from pyvmm.jail import Cell
from pyvmm.jailopt import Jail
libc = ctypes.CDLL(None, use_errno=True)
def call(name, *args):
    if getattr(libc, name)(*args) < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
def body():
    try:
        {}
    except OSError as e:
        print(errno.errorcode[e.errno])
    return 0
with Cell(Jail(sys.argv[1])) as cell:
    sys.exit(cell.run(body, files=sys.argv[2:], keep=()))
"""


def inside(deed: str, *files: str, **more: object) -> subprocess.CompletedProcess[str]:
    """Have a process of a jail, not confined any further, do something."""
    argv = [sys.executable, "-c", INSIDE.format(deed), str(USER), *files]
    more = {"stdin": subprocess.DEVNULL, "cwd": ROOT, **more}
    return subprocess.run(argv, capture_output=True, text=True, timeout=PATIENCE, **more)  # type: ignore[call-overload,no-any-return]


@pytest.mark.parametrize(
    ("deed", "answer"),
    [
        ("print(os.getpid(), os.getuid(), os.getgid(), os.getgroups())", f"2 {USER} {USER} []"),
        ("print(sorted(filter(str.isdigit, os.listdir('/proc'))))", "['1', '2']"),
        ("print(socket.gethostname(), [n for _, n in socket.if_nameindex()])", "pyvmm ['lo']"),
        ("print(sorted(map(int, os.listdir('/proc/self/fd')))[:-1])", "[0, 1, 2]"),
        ("open('/etc/hostname')", "ENOENT"),
        ("open('/etc/passwd')", "ENOENT"),
        ("os.listdir('/root')", "ENOENT"),
        ("os.listdir('/home')", "ENOENT"),
        ("os.listdir('/tmp')", "ENOENT"),
        ("open('/x', 'w')", "EROFS"),
        ("open('/usr/x', 'w')", "EROFS"),
        ("open('/.pyvmm/x', 'wb').write(bytes(17 << 20))", "ENOSPC"),
        ("os.listdir('/proc/self/root/root')", "ENOENT"),
        ("os.listdir('/proc/1/root')", "EACCES"),
        ("call('ptrace', 16, 1, None, None)", "EPERM"),  # PTRACE_ATTACH
        ("os.setuid(0)", "EPERM"),
        ("os.setgroups([0])", "EPERM"),
        ("os.chroot('/usr')", "EPERM"),
        ("os.mknod('/.pyvmm/d', 0o20600, os.makedev(1, 1))", "EPERM"),
        ("call('mount', b'proc', b'/.pyvmm', b'proc', 0, None)", "EPERM"),
        ("call('umount2', b'/usr', 2)", "EPERM"),
        ("call('pivot_root' if hasattr(libc, 'pivot_root') else 'chroot', b'/', b'/')", "EPERM"),
        ("call('setns', os.open('/proc/self/ns/net', 0), 0)", "EPERM"),
        ("call('unshare', 0x00020000)", "EPERM"),  # CLONE_NEWNS
        ("call('reboot', 0)", "EPERM"),
        ("socket.sethostname('x')", "EPERM"),
        ("os.kill({outside}, 0)", "ESRCH"),
        ("open('/proc/{outside}/status')", "ENOENT"),
        ("os.execv('/usr/bin/su', ['su', '-c', 'true'])", "refused"),
        ("open('/dev/kvm', 'r+b', buffering=0); print('kvm')", "kvm"),
        ("open('/dev/mem')", "ENOENT"),
        ("open('/dev/tty')", "ENOENT"),
        ("open('/sys/class/net')", "ENOENT"),
        ("open('/sys/fs/cgroup')", "ENOENT"),
    ],
)
def test_what_a_process_there_can_do(deed: str, answer: str) -> None:
    for directory in ("/root", "/home", "/tmp"):
        if deed == f"os.listdir({directory!r})" and str(ROOT).startswith(f"{directory}/"):
            # The ways to the checkout and to Python are there, and nothing beside them.
            ways = {
                path.split("/")[2]
                for path in (str(ROOT), sys.prefix)
                if path.startswith(f"{directory}/")
            }
            deed, answer = f"print({deed})", str(sorted(ways))
    run = inside(deed.replace("{outside}", str(os.getpid())))
    if answer == "refused":  # su that is no longer set-user-ID
        assert run.returncode != 0, run
        return
    assert (run.stdout.strip(), run.returncode) == (answer, 0), run


def test_nobody_can_be_connected_to() -> None:
    """Neither a port of the host, nor a socket with an abstract name or a path."""
    name = f"pyvmm-test-{os.getpid()}"
    with socket.socket() as tcp, socket.socket(socket.AF_UNIX) as abstract:
        tcp.bind(("127.0.0.1", 0))
        tcp.listen()
        abstract.bind(f"\0{name}")
        abstract.listen()
        port = tcp.getsockname()[1]
        deed = f"socket.create_connection(('127.0.0.1', {port}), 5)"
        assert inside(deed).stdout.strip() in ("ENETUNREACH", "ECONNREFUSED")
        deed = f"socket.socket(socket.AF_UNIX).connect('\\0{name}')"
        assert inside(deed).stdout.strip() == "ECONNREFUSED"


def test_only_what_is_named_is_there(tmp_path: Path) -> None:
    """A named file can be read, its neighbours are not there, whatever links lead to it; what only
    root may read stays so.
    """
    (tmp_path / "real").mkdir()
    for name in ("named", "other", "private"):
        (tmp_path / "real" / name).write_text(name)
    (tmp_path / "real" / "private").chmod(0o600)
    (tmp_path / "link").symlink_to("real")
    files = [str(tmp_path / "link" / name) for name in ("named", "private")]
    deed = f"print(open({files[0]!r}).read(), sorted(os.listdir({str(tmp_path / 'real')!r})))"
    assert inside(deed, *files).stdout.strip() == "named ['named', 'private']"
    assert inside(f"open({files[1]!r})", *files).stdout.strip() == "EACCES"
    assert inside(f"open({files[0]!r}, 'w')", *files).stdout.strip() == "EROFS"


SHARED = """
import ctypes, errno, os, sys
from pyvmm.hostnet import isolate
from pyvmm.jail import Cell
from pyvmm.jailopt import Jail
directory, writable = sys.argv[2], sys.argv[3] == "rw"
def say(deed):
    try:
        print(deed())
    except OSError as e:
        print(errno.errorcode[e.errno])
def body():
    print(os.path.exists(directory), os.fstat(mount).st_uid)
    say(lambda: sorted(os.listdir(f"/proc/self/fd/{mount}/..")))
    isolate.stage(mount, writable=writable)
    here = isolate.SHARED
    say(lambda: sorted(os.listdir(here)))
    say(lambda: os.listdir(f"{here}/mounted"))
    say(lambda: open(f"{here}/public").read())
    say(lambda: open(f"{here}/private").read())
    say(lambda: open(f"{here}/link").read())
    say(lambda: open(f"{here}/own", "w").write("written"))
    say(lambda: open("/.pyvmm/x", "w"))
    clear = {"attr_clr": isolate.lib.MOUNT_ATTR_RDONLY | isolate.lib.MOUNT_ATTR_NODEV}
    say(lambda: isolate.set_attr(here, clear, 0))
    say(lambda: ctypes.CDLL(None).umount2(here.encode(), 2))
    return 0
mount = isolate.detach(directory, writable=writable)
with Cell(Jail(sys.argv[1])) as cell:
    sys.exit(cell.run(body, files=(), keep=(), mounts=[mount]))
"""


@pytest.fixture
def directory_of_all_sorts(tmp_path: Path) -> Iterator[Path]:
    """With files of root's and of the jail's user, a link out of it, and a mount below."""
    directory = tmp_path / "shared"
    for name in ("public", "private", "own", "mounted/covered"):
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_text(name)
    (directory / "private").chmod(0o600)
    os.chown(directory / "own", USER, GROUP)
    (tmp_path / "outside").write_text("outside")
    (directory / "link").symlink_to(tmp_path / "outside")
    mount = ["mount", "-t", "tmpfs", "none", str(directory / "mounted")]
    subprocess.run(mount, check=True)
    try:
        (directory / "mounted" / "inner").write_text("inner")
        yield directory
    finally:
        subprocess.run(["umount", str(directory / "mounted")], check=True)


@pytest.mark.parametrize("access", ["ro", "rw"])
def test_what_a_back_end_there_has_of_a_directory(
    directory_of_all_sorts: Path, access: str
) -> None:
    """The directory alone, with its user's rights, and none of what is mounted in it. Nobody else
    in the jail has it, and the write protection stays.
    """
    argv = [sys.executable, "-c", SHARED, str(USER), str(directory_of_all_sorts), access]
    done = subprocess.run(
        argv,
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    names = ["link", "mounted", "own", "private", "public"]
    assert done.stdout.splitlines() == [
        "False 0",
        str(names),  # above the mount, there is the mount
        str(names),
        "['covered']",
        "public",
        "EACCES",
        "ENOENT",
        "7" if access == "rw" else "EROFS",
        "EROFS",
        "EPERM",
        "-1",
    ], done
    assert (directory_of_all_sorts / "own").read_text() == ("written" if access == "rw" else "own")


def directories_open(pid: int) -> list[str]:
    """The directories that a process has open: by descriptors. A process may end, and close
    descriptors, meanwhile.
    """
    found = []
    with contextlib.suppress(FileNotFoundError):
        for fd in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(FileNotFoundError):
                if fd.is_dir():
                    found.append(str(fd.readlink()))
    return found


def named(pid: int) -> str:
    """The name of a process; empty if it has ended."""
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        return Path(f"/proc/{pid}/comm").read_text().strip()
    return ""


@contextlib.contextmanager
def few_descriptors() -> Iterator[int]:
    """Processes that start meanwhile have a low soft limit of descriptors; gives the hard one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
    try:
        yield hard
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.parametrize("where", ["directory", "root"])
def test_who_serves_a_directory(guest: Guest, directory_of_all_sorts: Path, where: str) -> None:
    """A process of the jail's user in the jail, which has the directory as its root, and no other
    process of the jail has that directory. It may open as many files as the host allows.
    """
    try:
        virtiofsd.find()
    except ShareError as e:
        pytest.skip(str(e))
    share = {
        "directory": ["--share", f"{directory_of_all_sorts}:/data:rw"],
        "root": ["--root", "/"],
    }
    args = ["--sandbox", "on", "--memory", "32M", *share[where]]
    with few_descriptors() as most, jailed(guest, *args) as (outside, pid):
        processes = below(outside.pid)
        (server,) = [p for p in processes if named(p) == "virtiofsd"]
        assert wait_for(lambda: status_of(server, "Seccomp") == "2"), "it confines itself"
        assert status_line(server, "Uid") == [str(USER)] * 4
        assert status_line(server, "Gid") == [str(GROUP)] * 4
        assert status_line(server, "Groups") == []
        limits = Path(f"/proc/{server}/limits").read_text()
        (files,) = [line.split()[3:5] for line in limits.splitlines() if "Max open files" in line]
        assert min(map(int, files)) >= min(most, 1_000_000), "virtiofsd asks for no more"
        assert Path(f"/proc/{server}/uid_map").read_text().split() == ["0", str(USER), "1"]
        for kind in ("pid", "ipc", "uts", "net", "cgroup"):
            ours, theirs = (Path(f"/proc/{p}/ns/{kind}").readlink() for p in (pid, server))
            assert ours == theirs, kind
        assert Path(f"/proc/{server}/ns/mnt").readlink() != Path(f"/proc/{pid}/ns/mnt").readlink()
        root = Path(f"/proc/{server}/root")
        if where == "directory":
            assert sorted(names(str(root))) == ["link", "mounted", "own", "private", "public"]
            assert names(str(root / "mounted")) == {"covered"}
        else:
            assert root.samefile("/")
            assert not names(str(root / "proc")) and not names(str(root / "sys"))
        for one in processes:
            if one != server:
                assert not directories_open(one), one
        mounted = Path(f"/proc/{pid}/mountinfo").read_text()
        assert str(directory_of_all_sorts) not in mounted
    assert (directory_of_all_sorts / "public").read_text() == "public"


DISK = """
import os, sys
from pyvmm.diskopt import Disk
from pyvmm.jail import Cell
from pyvmm.jailopt import Jail
from tests.unit.test_disk import Asking, content
jail = Jail(sys.argv[1])
user = jail.uid, jail.gid
disk = Disk.parse(sys.argv[2], user)
mounts = disk.detach(user)
def body():
    print(os.path.exists(disk.file))
    disk.begin()
    with Asking(disk) as guest:
        print(guest.read(3) == content(3))
        print(guest.write(5, b"new!" * 128), guest.read(5) == b"new!" * 128)
    return 0
with Cell(jail) as cell:
    sys.exit(cell.run(body, files=(), keep=(), mounts=mounts))
"""
needs_daemon = pytest.mark.skipif(
    not any(os.access(path, os.X_OK) for path in storage_daemon.PLACES),
    reason="needs qemu-storage-daemon",
)


def ask_disk(option: str) -> subprocess.CompletedProcess[str]:
    """A driver in a jail asks a disk."""
    return subprocess.run(
        [sys.executable, "-c", DISK, f"{USER}:{GROUP}", option],
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )


@pytest.fixture
def images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A directory that only root may enter, with images: ``own`` is the jail's user's, everybody
    may read ``public``, and only root ``private``. Temporary files are made where only root may,
    and none of them is left.
    """
    monkeypatch.setenv("TMPDIR", str(tmp_path / "scratch"))
    directory = tmp_path / "images"
    for path in (directory, tmp_path / "scratch"):
        path.mkdir(mode=0o700)
    for name in ("own.raw", "public.raw", "private.raw"):
        raw_image(directory / name)
    os.chown(directory / "own.raw", USER, GROUP)
    (directory / "own.raw").chmod(0o600)
    (directory / "private.raw").chmod(0o600)
    yield directory
    assert not names(str(tmp_path / "scratch"))


@needs_daemon
@pytest.mark.parametrize(
    ("option", "written", "kept"),
    [
        ("own.raw", 0, True),
        ("own.raw,ro=on", 1, False),
        ("own.raw,snapshot=on", 0, False),
        ("public.raw,ro=on", 1, False),
        ("public.raw,snapshot=on", 0, False),
    ],
)
def test_what_a_guest_there_has_of_a_disk(
    images: Path, option: str, written: int, kept: bool
) -> None:
    """What the jail's user may do with the image, wherever the image is."""
    name = option.partition(",")[0]
    before = (images / name).read_bytes()
    done = ask_disk(f"{images}/{option}")
    assert done.stdout.splitlines() == ["False", "True", f"{written} {not written}"], done
    after = (images / name).read_bytes()
    assert after[:2560] == before[:2560] and after[3072:] == before[3072:]
    assert after[2560:3072] == (b"new!" * 128 if kept else before[2560:3072])


@needs_daemon
def test_a_chain_of_images_in_a_jail(images: Path) -> None:
    """The user finds backing files by their names, because these names are an image's."""
    with open_directory() as theirs:
        top = theirs / "top.qcow2"
        (theirs / "link.raw").symlink_to("base.raw")
        for name in (b"base.raw", b"link.raw"):
            base = raw_image(theirs / "base.raw")
            qcow2_image(top, with_backing(name, b"raw"))
            os.chown(top, USER, GROUP)
            before = base.read_bytes()
            done = ask_disk(f"{top},backing=on")
            assert done.stdout.splitlines() == ["False", "True", "0 True"], done
            assert base.read_bytes() == before
            base.chmod(0o600)
            done = ask_disk(f"{top},backing=on")
            assert (
                f"base.raw': Permission denied for user {USER}; put it there, or allow it"
                in done.stderr
            ), done
            base.unlink()
        for other in ("public.raw", "private.raw"):
            qcow2_image(top, with_backing(str(images / other).encode(), b"raw"))
            done = ask_disk(f"{top},backing=on")
            assert f"{other}': Permission denied for user {USER}" in done.stderr, done
            assert not done.stdout


@pytest.mark.parametrize(
    ("option", "remedy"),
    [
        ("public.raw", f"allow it by chown {USER} or chmod, or add ro=on or snapshot=on"),
        ("private.raw", f"allow it by chown {USER} or chmod"),
        ("private.raw,ro=on", f"allow it by chown {USER} or chmod"),
        ("private.raw,snapshot=on", f"allow it by chown {USER} or chmod"),
    ],
)
def test_an_image_that_the_user_may_not_have(
    guest: Guest, images: Path, option: str, remedy: str
) -> None:
    done = run(*hello(guest, "--disk", f"{images}/{option}", "--report", f"{images}/r.json"))
    name = option.partition(",")[0]
    line = f"pyvmm: --disk {images}/{name}: Permission denied for user {USER}; {remedy}\n"
    assert (done.returncode, done.stderr) == (133, line), done
    assert not (images / "r.json").exists()


def test_a_snapshot_without_a_place(
    guest: Guest, images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", "/no/such")
    done = run(*hello(guest, "--disk", f"{images}/public.raw,snapshot=on"))
    assert (done.returncode, done.stderr.count("\n")) == (133, 1), done
    assert "no directory /no/such for a snapshot; set TMPDIR to another one" in done.stderr


@needs_daemon
@pytest.mark.parametrize("key", ["", ",snapshot=on"])
def test_who_serves_a_disk(guest: Guest, images: Path, key: str) -> None:
    """A process of the jail's user in the jail, confined as without one, whose root directory has
    the image. No other process of the jail has the image open or mounted.
    """
    disk = ["--disk", f"{images}/own.raw{key}"]
    with jailed(guest, "--sandbox", "on", *disk) as (outside, pid):
        processes = below(outside.pid)
        (server,) = [p for p in processes if named(p) == "qemu-storage-da"]
        assert wait_for(lambda: status_of(server, "Seccomp") == "2")
        assert status_line(server, "Uid") == [str(USER)] * 4
        assert status_line(server, "Gid") == [str(GROUP)] * 4
        assert status_line(server, "Groups") == []
        for field in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"):
            assert status_line(server, field) == ["0" * 16], field
        assert status_line(server, "NoNewPrivs") == ["1"]
        assert Path(f"/proc/{server}/uid_map").read_text().split() == ["0", str(USER), "1"]
        for kind in ("pid", "uts", "cgroup", "mnt", "net", "ipc", "user"):
            ours, theirs = (Path(f"/proc/{p}/ns/{kind}").readlink() for p in (pid, server))
            assert (ours == theirs) == (kind in ("pid", "uts", "cgroup")), kind
        root = f"/proc/{server}/root"
        overlay = {"overlay"} if key else set()
        system = {"usr", "lib", "lib64", "dev", "etc"}
        assert names(root) - system == {"image"} | overlay
        with pytest.raises(OSError, match="Read-only file system"):
            Path(root, "new").touch()
        for name in overlay:
            info = Path(root, name).stat()
            assert (info.st_uid, info.st_gid, info.st_mode & 0o777) == (USER, GROUP, 0o600)
            assert info.st_nlink == 0
        if key:
            with pytest.raises(OSError, match="Read-only file system"):
                os.truncate(f"{root}/image", 0)
        for one in processes:
            assert not directories_open(one), one
            if one != server:
                held = [str(fd.readlink()) for fd in Path(f"/proc/{one}/fd").iterdir()]
                assert not any(name.endswith(("image", "own.raw")) for name in held), held
                assert not {"image"} & names(f"/proc/{one}/root")
                assert "own.raw" not in Path(f"/proc/{one}/mountinfo").read_text()


OTHERS = """
import errno, os, sys
from pyvmm import Machine
from pyvmm.diskopt import Disk
from pyvmm.jail import Cell
from pyvmm.jailopt import Jail
_, option, kernel, image, sandbox = sys.argv
jail = Jail(option)
disk = Disk(image, jailed=(jail.uid, jail.gid))
mounts = disk.detach((jail.uid, jail.gid))
def body():
    with Machine(kernel, memory="4M", sandbox=sandbox, disks=[disk]) as vm:
        vm.start()
        vm.wait(60)
        daemon = f"/proc/{disk._connector._child.pid}"
        for name in ("root/image", "mem"):
            try:
                os.close(os.open(f"{daemon}/{name}", os.O_RDWR))
                print("opened")
            except OSError as e:
                print(errno.errorcode[e.errno])
    return 0
with Cell(jail) as cell:
    sys.exit(cell.run(body, files=[kernel], keep=(), mounts=mounts))
"""


@needs_daemon
@pytest.mark.parametrize(("sandbox", "answer"), [("on", "EACCES"), ("off", "opened")])
def test_what_other_processes_of_a_jail_have_of_a_disk(
    guest: Guest, images: Path, sandbox: str, answer: str
) -> None:
    """All are one user's, so that it takes the sandbox to keep them apart."""
    argv = [f"{USER}:{GROUP}", guest("hello"), f"{images}/own.raw", sandbox]
    done = subprocess.run(
        [sys.executable, "-c", OTHERS, *argv],
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert done.stdout.splitlines()[-2:] == [answer, answer], done


@needs_daemon
def test_a_daemon_that_is_killed_is_told(guest: Guest, images: Path) -> None:
    """The guest goes on, and the verdict says it."""
    name = f"jail-{os.getpid()}"
    with jailed(guest, "--name", name, "--disk", f"{images}/own.raw") as (outside, _):
        (server,) = [p for p in below(outside.pid) if named(p) == "qemu-storage-da"]
        os.kill(server, signal.SIGKILL)
        assert wait_for(lambda: not Path(f"/proc/{server}").exists())
        argv = [*PYVMM, "quit", "--host", "local", name]
        subprocess.run(argv, cwd=ROOT, check=True, capture_output=True)
        _, err = outside.communicate(timeout=PATIENCE)
    what = "has broken off: qemu-storage-daemon was killed by SIGKILL"
    assert f"the disk {images}/own.raw {what}" in err and outside.returncode == 133, err


@needs_daemon
@pytest.mark.parametrize("whom", ["outside", "first", "vmm"])
def test_a_daemon_ends_with_the_jail(guest: Guest, images: Path, whom: str) -> None:
    before = mounted(images.parent)
    disk = ["--disk", f"{images}/own.raw,snapshot=on"]
    with jailed(guest, *disk) as (outside, pid):
        processes = below(outside.pid)
        assert "qemu-storage-da" in map(named, processes)
        os.kill({"outside": outside.pid, "first": processes[0], "vmm": pid}[whom], signal.SIGKILL)
        outside.communicate(timeout=PATIENCE)
        assert wait_for(lambda: not any(Path(f"/proc/{p}").exists() for p in processes))
    assert mounted(images.parent) == before


def test_an_image_that_is_replaced_after_the_look(images: Path) -> None:
    """What another file has got the name of is not given to the jail: no link, and no other file
    that the user may not have.
    """
    image = images / "own.raw"
    disk = Disk(image, jailed=(USER, GROUP))
    image.rename(images / "before")
    image.symlink_to(images / "private.raw")
    with pytest.raises(OSError, match="has been replaced"):
        disk.detach((USER, GROUP))
    image.unlink()
    image.hardlink_to(images / "private.raw")
    with pytest.raises(DiskError, match=f"Permission denied for user {USER}"):
        disk.detach((USER, GROUP))


OPENING = """
import os, sys
seen = os.open(sys.argv[2], os.O_WRONLY | os.O_APPEND)
def hook(event, args):
    if event == "open" and isinstance(args[0], str) and sys.argv[1] in (path := places(args[0])):
        how = "named" if args[2] & os.O_PATH else "opened"
        os.write(seen, f"{how} {os.geteuid()} {path}\\n".encode())
def places(path):
    return os.readlink(path) if path.startswith("/proc/self/fd/") else path
from pyvmm.cli import main
sys.addaudithook(hook)
sys.exit(main(sys.argv[3:]))
"""


def opens(guest: Guest, directory: Path, option: str) -> tuple[list[list[str]], str]:
    """How files below ``directory`` are opened in a run with a disk: whether only to name them, by
    which user, which; and the error.
    """
    with tempfile.NamedTemporaryFile() as seen:
        argv = [sys.executable, "-c", OPENING, str(directory), seen.name, "run", "--host", "local"]
        argv += [*OPTION, *hello(guest, "--disk", option)]
        done = subprocess.run(
            argv, cwd=ROOT, stdin=subprocess.DEVNULL, capture_output=True, text=True
        )
        return [line.split(" ", 2) for line in seen.read().decode().splitlines()], done.stderr


def test_whoever_opens_an_image_is_the_jails_user(guest: Guest, images: Path) -> None:
    """From the first look on; root only names the one file that the command line names."""
    with open_directory() as top:
        theirs = top / "theirs"
        theirs.mkdir()
        os.chown(theirs, USER, GROUP)
        for name, form in ((images / "private.raw", b"raw"), (Path("below.qcow2"), b"qcow2")):
            image = theirs / "top.qcow2"
            qcow2_image(theirs / "below.qcow2", with_backing(bytes(images / "public.raw"), b"raw"))
            qcow2_image(image, with_backing(bytes(name), form))
            for path in (image, theirs / "below.qcow2"):
                os.chown(path, USER, GROUP)
            for place in (theirs, images):
                found, error = opens(guest, place, f"{image},backing=on")
                assert "Permission denied for user" in error, error
                by_user = [str(USER)]
                roots = {(how, path) for how, user, path in found if [user] != by_user}
                assert roots <= {("named", str(image))}, found
                assert place == images or ["opened", str(USER), str(image)] in found, found
        found, error = opens(guest, images, f"{images}/own.raw")
        assert not error
        assert {(how, user) for how, user, _ in found} == {
            ("named", "0"),
            ("opened", str(USER)),
        }


LOOK = """
import ctypes, os, sys
from pyvmm.diskopt import Disk
libc, number = ctypes.CDLL(None), ctypes.c_int()
libc.prctl(1, 9)  # PR_SET_PDEATHSIG
user = int(sys.argv[2]), int(sys.argv[2])
os.close(Disk(sys.argv[1], jailed=user).detach(user)[0])
libc.prctl(2, ctypes.byref(number))
print(number.value, libc.prctl(3), os.getresuid(), os.getresgid())  # PR_GET_DUMPABLE
"""


def test_root_s_process_stays_as_it_was(images: Path) -> None:
    """A change of its user would end with the protection that it had."""
    done = subprocess.run(
        [sys.executable, "-c", LOOK, str(images / "own.raw"), str(USER)],
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    assert done.stdout == "9 1 (0, 0, 0) (0, 0, 0)\n", done


def test_a_link_of_somebody_else_s_leads_nowhere(guest: Guest, images: Path) -> None:
    """The user gets no file of root's whose directory is closed to the user, by a link that the
    user may have made, whatever names the file.
    """
    options: list[Callable[[str], list[str]]] = [
        lambda name: hello(guest, "--disk", f"{name}.raw,ro=on"),
        lambda name: hello(guest, "--share", f"{name}.d:/mnt"),
        lambda name: hello(guest, "--root", f"{name}.d"),
        lambda name: ["--kernel", f"{name}.elf", "--memory", "4M"],
        lambda name: hello(guest, "--initrd", f"{name}.raw"),
        lambda name: hello(guest, "--add", f"{name}.d"),
        lambda name: hello(guest, "--modules", f"{name}.d"),
        lambda name: hello(guest, "--vmlinux", f"{name}.elf"),
        lambda name: hello(guest, "--net", f"vhost-vdpa,device={name}.raw"),
    ]
    shutil.copy(guest("hello"), images / "x.elf")
    (images / "x.d").mkdir()
    with open_directory() as top:
        for name in ("x.elf", "x.d"):
            (top / name).symlink_to(images / name)
        (top / "x.raw").symlink_to(images / "public.raw")
        places = ((USER, 0o755, True), (USER, 0o755, False), (0, 0o777, False), (0, 0o1777, True))
        for owner, mode, link in places:
            os.chown(top, owner, -1)
            top.chmod(mode)
            for name in ("x.elf", "x.d", "x.raw"):
                os.chown(top / name, USER if link else 0, -1, follow_symlinks=False)
            for option in options if owner and link else options[:1]:
                done = run(*option(f"{top}/x"))
                assert (done.returncode, done.stderr.count("\n")) == (2, 1), (option, done)
                assert "others than root may have put the link" in done.stderr, done
            told = inside(f"print(open({str(top)!r} + '/x.raw').read(1))", f"{top}/x.raw")
            assert "UsageError" in told.stderr and not told.stdout, told
        name = f"{top}/x.raw"
        os.chown(name, 0, -1, follow_symlinks=False)
        for mode in (0o1777, 0o755):  # root's links, where nobody else can have put them
            top.chmod(mode)
            assert inside(f"print(len(open({name!r}).read(8)))", name).stdout == "8\n"
            assert Disk(name, readonly=True, jailed=(USER, GROUP)).file == f"{images}/public.raw"


def test_root_of_a_testbed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In an ordinary user's, the files of the host's root are nobody's."""
    link = tmp_path / "link"
    link.symlink_to("file")
    (tmp_path / "file").touch()
    tmp_path.chmod(0o775)
    for owner, inside, good in (
        (links.NOBODY, True, True),
        (links.NOBODY, False, False),
        (USER, True, False),
    ):
        for path in (link, tmp_path):
            os.chown(path, owner, owner, follow_symlinks=False)
        with monkeypatch.context() as patch:
            patch.delenv("PYVMM_IN_TESTBED", raising=False)
            if inside:
                patch.setenv("PYVMM_IN_TESTBED", "1")
            refused = pytest.raises(UsageError, match="others than root may have put the link")
            with contextlib.nullcontext() if good else refused:
                assert links.follow(str(link)) == str(tmp_path / "file")


@pytest.mark.parametrize("end", ["/..", "/../link", "/./../link/", "/../link//../images/x"])
def test_a_name_is_followed_as_the_kernel_does(images: Path, end: str) -> None:
    (images.parent / "link").symlink_to("images/../images")
    (images / "x").touch()
    path = f"{images}{end}"
    assert links.follow(path) == os.path.realpath(path)


def test_a_directory_is_no_file(guest: Guest, tmp_path: Path) -> None:
    """A link in the place of a kernel does not give the jail what it leads to."""
    (tmp_path / "all").mkdir()
    (tmp_path / "link").symlink_to("all")
    done = run("--kernel", str(tmp_path / "link"))
    assert done.returncode in (2, 105) and done.stderr.count("\n") == 1, done
    for name in ("link", "all"):
        told = inside("print(1)", str(tmp_path / name))
        assert "is no regular file" in told.stderr and not told.stdout, told
    done = run(*hello(guest, "--initrd", str(tmp_path / "link")))
    assert done.returncode in (2, 105) and done.stderr.count("\n") == 1, done


@pytest.mark.parametrize("path", ["/run/s", "/x.sock", "s", "/var/run/s", "/dev/shm/s", "THEIRS"])
def test_a_socket_among_others_files(guest: Guest, tmp_path: Path, path: str) -> None:
    if path == "THEIRS":
        os.chown(tmp_path, USER + 9, 0)
        path = f"{tmp_path}/s"
    done = run(*hello(guest, "--net", f"vhost-user,socket={path}"))
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done
    assert "put the socket into a directory of its own" in done.stderr, done


def test_little_of_the_environment(guest: Guest) -> None:
    """Neither in os.environ, nor in libc's, nor in /proc/PID/environ."""
    deed = (
        "print(open('/proc/self/environ').read().strip(chr(0)) or 'none',"
        " subprocess.check_output('/usr/bin/env', text=True).split())"
    )
    run = inside(deed, env={**os.environ, "TOKEN": "secret-token", "PYVMM_X": "y", "HOME": "/root"})
    first, _, rest = run.stdout.partition(" ")
    assert first == "none" and "TOKEN" not in rest, run
    assert "'PYVMM_X=y'" in rest and "'HOME=/'" in rest and "'PATH=" in rest, run


def test_many_files(tmp_path: Path) -> None:
    """More than descriptors at a time; the limit is as before afterwards."""
    files = []
    for number in range(300):
        (tmp_path / str(number)).write_text("x")
        files.append(str(tmp_path / str(number)))
    argv = [sys.executable, "-c", INSIDE.format(
        f"import resource; print(len(os.listdir({str(tmp_path)!r})), resource.getrlimit(7))"
    ), str(USER), *files]  # fmt: skip
    shell = ["sh", "-c", 'ulimit -S -n 256; exec "$@"', "sh"]
    done = subprocess.run(
        [*shell, *argv], cwd=ROOT, stdin=subprocess.DEVNULL, capture_output=True, text=True
    )
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    assert done.stdout == f"300 (256, {hard})\n", done


def test_modules_that_the_user_may_not_read(tmp_path: Path) -> None:
    copy = tmp_path / "pyvmm"
    shutil.copytree(ROOT / "pyvmm", copy, ignore=shutil.ignore_patterns("__pycache__"))
    copy.chmod(0o700)
    env = {**os.environ, "PYTHONPATH": str(tmp_path)}
    run = inside("print(1)", env=env, cwd=tmp_path)
    assert "JailError" in run.stderr and not run.stdout, run
    assert f"user {USER} may not use {copy}" in run.stderr, run


@pytest.mark.parametrize("data", [b"1_0", b"99999", b"ok", b"-", b" 1"])
def test_a_message_of_somebody_else_s(data: bytes) -> None:
    """Whoever has taken process 1 over gets no other status, and no traceback of root's."""
    assert jail.STATUS.fullmatch(data) is None
    assert all(jail.STATUS.fullmatch(b"%d" % n) for n in (0, 255, -9))


def test_no_descriptor_comes_along(tmp_path: Path) -> None:
    """What the caller of pyvmm has open stays outside; a directory is never kept."""
    fd = os.open("/", os.O_RDONLY)
    try:
        run = inside(f"os.listdir({fd})", pass_fds=[fd])
        assert run.stdout.strip() == "EBADF", run
        kept = INSIDE.replace("keep=()", f"keep=[{fd}]").format("print(1)")
        run = subprocess.run(
            [sys.executable, "-c", kept, str(USER)],
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            pass_fds=[fd],
            capture_output=True,
            text=True,
        )
        assert f"descriptor {fd} is a directory of the host" in run.stderr and not run.stdout, run
    finally:
        os.close(fd)


def test_a_stopped_thread(guest: Guest) -> None:
    """The sandbox is in force there as without a jail."""
    with jailed(guest, "--sandbox", "on") as (outside, pid):
        assert status_of(pid, "Seccomp_filters") == "1"
        assert wait_for(lambda: ask(pid, "vcpu0", EXECVE))
        _, err = outside.communicate(timeout=PATIENCE)
    assert outside.returncode == 128, err
    assert "vcpu0 asked for execve(), which it may not have" in err, err


def test_a_run_is_as_any_other(guest: Guest, tmp_path: Path) -> None:
    """Results are written, empty ones removed; the status is the guest's."""
    report, verdict, log = tmp_path / "r.json", tmp_path / "v.json", tmp_path / "log"
    pcap = tmp_path / "pcap"
    files = ["--report", str(report), "--json", str(verdict), "--log", str(log)]
    done = run(*hello(guest, *files, "-v"))
    assert (done.returncode, done.stdout.splitlines()[:2]) == (
        0,
        ["hello, stdout", "hello, console"],
    ) or (done.returncode == 0 and "hello, stdout" in done.stdout), done
    assert f"pyvmm: jail: {USER}:{GROUP}\n" in done.stderr and "pyvmm: sandbox: on\n" in done.stderr
    assert json.loads(report.read_text())["verdict"]["kind"] == "passed"
    assert json.loads(verdict.read_text())["verdict"] == "passed"
    assert "hello, console" in log.read_text()
    bad = tmp_path / "bad"
    bad.write_bytes(b"no kernel")
    done = run("--kernel", str(bad), "--pcap", str(pcap))
    assert done.returncode == 105 and done.stderr.count("\n") == 1, done
    assert not pcap.exists()
    assert run("--kernel", str(tmp_path / "none")).returncode == 105


def test_it_is_found_and_ended_from_outside(guest: Guest) -> None:
    """By the control socket, which root's own commands find; and by signals."""
    name = f"jail-{os.getpid()}"
    with jailed(guest, "--name", name) as (outside, _):
        argv = [*PYVMM, "ps", "--host", "local"]
        assert name in subprocess.run(argv, cwd=ROOT, capture_output=True, text=True).stdout
        argv = [*PYVMM, "reset", "--host", "local", name]
        subprocess.run(argv, cwd=ROOT, check=True, capture_output=True)
        argv[-2:] = ["local", name]
        argv[3] = "quit"
        subprocess.run(argv, cwd=ROOT, check=True, capture_output=True)
        _, err = outside.communicate(timeout=PATIENCE)
        assert outside.returncode == 0, err
    assert (
        name not in subprocess.run([*PYVMM, "ps"], cwd=ROOT, capture_output=True, text=True).stdout
    )
    for number in (signal.SIGTERM, signal.SIGINT):
        with jailed(guest) as (outside, pid):
            outside.send_signal(number)
            _, err = outside.communicate(timeout=PATIENCE)
            assert outside.returncode == 128 + number, err
            assert not Path(f"/proc/{pid}").exists()


def test_no_process_of_it_can_write_its_name(guest: Guest) -> None:
    """Root's commands find the socket by a file that stays outside, with its lock."""
    with jailed(guest, "--name", f"jail-{os.getpid()}") as (outside, _):
        for one in below(outside.pid):
            files = [str(fd.readlink()) for fd in Path(f"/proc/{one}/fd").iterdir()]
            assert files and not [file for file in files if file.endswith(".machine")], files


DEAF = (
    "[signal.signal(n, signal.SIG_IGN) for n in (2, 15)]; print('deaf', flush=True); signal.pause()"
)


def test_who_does_not_listen_is_killed() -> None:
    """By a second signal, or some time after the time-out."""
    code = INSIDE.format(DEAF)
    argv = [sys.executable, "-c", code, str(USER)]
    with subprocess.Popen(argv, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=-1) as outside:
        assert outside.stdout is not None and outside.stdout.readline() == b"deaf\n"
        processes = below(outside.pid)
        outside.send_signal(signal.SIGTERM)
        assert not wait_for(lambda: outside.poll() is not None, 1)
        outside.send_signal(signal.SIGTERM)
        assert outside.wait(PATIENCE) == 256 - signal.SIGKILL
    assert len(processes) == 2 and not any(Path(f"/proc/{p}").exists() for p in processes)
    code = code.replace("keep=()", "keep=(), timeout=-12")
    argv = [sys.executable, "-c", code, str(USER)]
    done = subprocess.run(argv, cwd=ROOT, stdin=subprocess.DEVNULL, timeout=PATIENCE)
    assert done.returncode == 256 - signal.SIGKILL


#: ``pyvmm test`` whose process in the jail has forgotten the time-out of its kernel.
FORGOT = (
    "import sys, time; from pyvmm import cli, sandbox; from pyvmm.cli import test; "
    "sandbox.ORDERLY_S = 0.1; test._attend = lambda *args: time.sleep(600); sys.exit(cli.main())"
)


def test_kernels_whose_time_is_over_are_killed(guest: Guest) -> None:
    """By the process outside, however many of them the jail has."""
    argv = [sys.executable, "-c", FORGOT, "test", "--host", "local", *OPTION, "--timeout", "0.5"]
    done = subprocess.run(
        [*argv, guest("hello"), guest("smp")],
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    line = "pyvmm: the process in the jail was killed (SIGKILL)\n"
    assert (done.returncode, done.stderr) == (128 + signal.SIGKILL, line), done


def test_ctrl_c_while_the_jail_is_made(guest: Guest) -> None:
    """It is not lost, and ends the run in order."""
    for part in range(20):
        with running(*busy(guest, *OPTION), session=True) as outside:
            until = time.monotonic() + PATIENCE
            while not below(outside.pid) and time.monotonic() < until:
                time.sleep(0.001)
            time.sleep(0.004 * part)
            os.killpg(outside.pid, signal.SIGINT)
            _, err = outside.communicate(timeout=PATIENCE)
            assert outside.returncode == 130, (part, err)


@pytest.mark.parametrize("whom", ["outside", "first", "vmm"])
def test_nothing_is_left(guest: Guest, whom: str) -> None:
    """Whichever process is killed, the others end with it, and their namespaces, mounts and taps
    with them.
    """
    kernels = Path(guest("hello")).parent
    before = mounted(kernels)
    tap = own_tap("jail")
    with jailed(guest, "--net", f"emulated,tap={tap}") as (outside, pid):
        processes = below(outside.pid)
        assert tap in names("/sys/class/net")
        victim = {"outside": outside.pid, "first": processes[0], "vmm": pid}[whom]
        os.kill(victim, signal.SIGKILL)
        _, err = outside.communicate(timeout=PATIENCE)
        assert wait_for(lambda: not any(Path(f"/proc/{p}").exists() for p in processes))
    if whom == "outside":
        assert outside.returncode == -signal.SIGKILL
    else:
        assert outside.returncode == 128 + signal.SIGKILL
        assert "pyvmm: the process in the jail was killed (SIGKILL)\n" in err, err
    assert wait_for(lambda: tap not in names("/sys/class/net"))
    assert mounted(kernels) == before


def test_a_tap_of_the_host(guest: Guest, tmp_path: Path) -> None:
    """It is opened outside, and there is no other way out of the jail."""
    report = tmp_path / "r.json"
    tap = own_tap("jail")
    done = run("--kernel", guest("pcinet"), "--memory", "4M", "--append", "count=20",
               "--net", f"emulated,tap={tap},host=192.168.100.1/24,mtu=2000",
               "--report", str(report))  # fmt: skip
    assert done.returncode == 0, done
    assert f"there was no tap {tap}; it has been made" in done.stderr
    (nic,) = json.loads(report.read_text())["nets"]
    assert nic["mode"] == "emulated"
    assert tap not in names("/sys/class/net")


def test_back_ends(guest: Guest, tmp_path: Path) -> None:
    """Our own, in the jail, and one outside that is replaced by another one meanwhile."""
    done = run("--kernel", guest("pcinet"), "--memory", "4M", "--append", "count=20",
               "--net", "vhost-user")  # fmt: skip
    assert done.returncode == 0, done
    path = tmp_path / "backend" / "s"
    path.parent.mkdir()
    for _ in range(2):
        with running(
            "--socket", str(path), "--loopback", "-q", "--peer", str(USER), command="backend"
        ) as backend:
            assert wait_for(path.exists)
            done = run(*hello(guest, "--net", f"vhost-user,socket={path}"))
            assert done.returncode == 0, done
            backend.terminate()
            backend.wait(PATIENCE)


def test_a_card_that_can_be_switched(guest: Guest, tmp_path: Path) -> None:
    """Its tap has room for the frames of a switch, which takes no root of the host."""
    report = tmp_path / "r.json"
    done = run("--kernel", guest("pcinet"), "--memory", "4M", "--append", "count=20",
               "--net", "emulated,switchable=vhost-user", "--report", str(report))  # fmt: skip
    assert done.returncode == 0, done
    assert json.loads(report.read_text())["nets"][0]["mode"] == "emulated"


def test_kernels(guest: Guest, tmp_path: Path) -> None:
    """``pyvmm test`` runs all of them in one jail, each in a confined process."""
    report = tmp_path / "t.json"
    kernels = [guest(name) for name in ("hello", "smp", "exits")]
    args = ["--jobs", "2", "--sandbox", "on", "--json", str(report), *kernels]
    done = run(*args, command="test")
    assert done.returncode == 0, done
    told = json.loads(report.read_text())
    assert told["summary"]["passed"] == 3
    assert {test["report"]["sandbox"] for test in told["tests"]} == {"on"}
    assert ": 3 passed, 0 failed" in done.stdout


#: ``pyvmm test`` whose process of the kernel ``reset`` takes all threads that its user may have,
#: and keeps them for a while.
GREEDY = """
import os, resource, sys, threading, time
from pyvmm import cli
from pyvmm.testing.suite import Suite
boot = Suite._boot
def other(self, number, send):
    if self._cases[number].name != "reset":
        return boot(self, number, send)
    try:
        while True:
            threading.Thread(target=time.sleep, args=(600,)).start()
    except RuntimeError:
        time.sleep(2)
        os._exit(0)
Suite._boot = other
resource.setrlimit(resource.RLIMIT_NPROC, (60, 60))
sys.exit(cli.main())
"""


def test_a_kernel_s_process_takes_all_threads(guest: Guest) -> None:
    """The other kernels wait until it has ended, and then run."""
    kernels = [guest(name) for name in ("reset", "hello", "smp", "exits")]
    argv = [sys.executable, "-c", GREEDY, "test", "--host", "local", *OPTION, "--jobs", "2"]
    done = subprocess.run(
        [*argv, *kernels],
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert (done.returncode, done.stderr) == (1, ""), done
    assert "FAIL reset: pyvmm's process for it has sent nothing" in done.stdout
    assert ": 3 passed, 1 failed" in done.stdout


def test_a_kernel_s_process_is_killed(guest: Guest) -> None:
    """By its own verdict: the other kernels run, and nothing is left."""
    options = ["--timeout", "600", "--append", "how=hang", "--jobs", "2"]
    argv = [*PYVMM, "test", "--host", "local", *OPTION, *options, guest("reset"), guest("hello")]
    with subprocess.Popen(
        argv, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True
    ) as outside:
        assert outside.stdout is not None and "PASS" in outside.stdout.readline()
        assert wait_for(lambda: vmm(outside.pid))
        processes = below(outside.pid)
        os.kill(vmm(outside.pid), signal.SIGKILL)
        out, _ = outside.communicate(timeout=PATIENCE)
    assert outside.returncode == 1 and "was killed (SIGKILL)" in out, out
    assert ": 1 passed, 1 failed" in out
    assert not any(Path(f"/proc/{p}").exists() for p in processes)


#: A file that everybody may read, as a disk.
PUBLIC = ["--disk", f"{ROOT}/pyproject.toml,format=raw,snapshot=on"]


@pytest.mark.parametrize(
    ("args", "why"),
    [
        (["--net", "user"], "has none of the host's network"),
        (["--net", "vhost-vdpa"], "can make no vDPA device; name one of the host's: device="),
        (["--net", "emulated,switchable=vhost-vdpa"], "can make no vDPA device"),
        (["--net", "vhost-user,tap=t0"], "only emulated and vhost-net"),
        (["--net", "vhost-user,socket=/x/y,server=on"], "nobody outside of a jail"),
        (["--trace-kernel", "--trace", "/dev/null"], "--trace-kernel and --jail"),
        (["--jail", "0"], "is no user for a jail"),
        (["--jail", "1:0"], "is no group for a jail"),
        (["--jail", "root"], "is no user for a jail"),
        (["--jail", "1,memory=8M"], "use at least 100M"),
        (["--jail", "1,pids=3"], "use at least 41"),
        (["--jail", "1,memory=150M", *PUBLIC], "use at least 156M: pyvmm and its back-ends take"),
        (["--jail", "1,pids=100", *PUBLIC], "use at least 123"),
        (["--jail", "1,cpus=0"], "from 0.01 on"),
        (["--jail", "1,swap=1"], "unknown key 'swap'; keys: memory, cpus, pids"),
    ],
)
def test_what_is_refused(guest: Guest, args: list[str], why: str) -> None:
    done = run(*hello(guest, *args))
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done
    assert why in done.stderr, done


@pytest.mark.parametrize(
    ("device", "why"),
    [
        ("/no/such", "there is no vDPA device /no/such"),
        ("no-such", "there is no vDPA device no-such"),
        ("/dev/null", "is it a vhost-vdpa device?"),
        ("/etc/hostname", "is no character device"),
    ],
)
def test_no_vdpa_device(guest: Guest, device: str, why: str) -> None:
    """What is no such device, root does not hand to a jail."""
    done = run(*hello(guest, "--net", f"vhost-vdpa,device={device}"))
    assert (done.returncode, done.stderr.count("\n")) == (125, 1), done
    assert why in done.stderr, done


def test_only_root(guest: Guest, open_path: Path) -> None:
    need_readable_checkout()
    argv = [*BECOME, *PYVMM, "run", "--host", "local", *OPTION, *hello(guest)]
    env = {**os.environ, "HOME": str(open_path), "XDG_RUNTIME_DIR": ""}
    done = subprocess.run(
        argv, cwd=ROOT, stdin=subprocess.DEVNULL, capture_output=True, text=True, env=env
    )
    assert done.returncode == 134, done
    assert "--jail needs root" in done.stderr and done.stderr.count("\n") == 1


def test_limits_without_their_cgroups(guest: Guest) -> None:
    """tests/boot/test_jail.py has the limits themselves: this host may have no cgroup v2."""
    done = run(*hello(guest, "--jail", f"{USER},memory=256M,cpus=0.5,pids=64"))
    if done.returncode:
        assert (done.returncode, done.stderr.count("\n")) == (134, 1), done
        assert "cgroup v2" in done.stderr and "leave the limits out" in done.stderr


def test_the_lock_of_the_cgroups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No other user can open the directory to hold it, and a run does not wait for ever."""
    monkeypatch.setattr(cgroup, "LOCK_PATIENCE", 0.1)
    group = tmp_path / "pyvmm"
    with cgroup._locked(str(group)):
        assert group.stat().st_mode & 0o777 == 0o700
        with pytest.raises(TimeoutError, match="held its lock for too long"):
            cgroup._locked(str(group))
    group.chmod(0o755)
    with cgroup._locked(str(group)):
        assert group.stat().st_mode & 0o777 == 0o700


def test_the_description() -> None:
    want = Jail("1000:2000,memory=1G,cpus=1.25,pids=100")
    assert (want.uid, want.gid, want.memory) == (1000, 2000, 1 << 30)
    assert (want.millicpus, want.pids) == (1250, 100)
    assert Jail("7").gid == 7 and not Jail("7").limited
    Jail("1,memory=1064M,pids=112").check(128 << 20, cpus=4, cards=0, machines=7)
    for limits in ("memory=1063M", "pids=111"):
        with pytest.raises(UsageError, match=r"use at least (1064M|112)\b"):
            Jail(f"1,{limits}").check(128 << 20, cpus=4, cards=0, machines=7)
    for bad in (
        "",
        "-1",
        "1:",
        ":1",
        "4294967295",
        "1,memory=",
        "1,memory=1M,memory=2M",
        "1,cpus=.5",
    ):
        with pytest.raises(UsageError):
            Jail(bad)
