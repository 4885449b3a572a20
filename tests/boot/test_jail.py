"""The limits of a jail, in the testbed, whose root may make cgroups (v2) wherever the tests run.
Directories and disks of the host in a jail, used by a guest of Linux.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from pyvmm.host import qcow2
from tests.boot.guest import PATIENCE, PYVMM, Host, Run
from tests.boot.test_disk import daemons
from tests.strangers import open_directory
from tests.unit.test_disk import with_backing

ROOT = Path(__file__).parents[2]
GROUPS = "/sys/fs/cgroup/pyvmm"
#: A delegated group, as systemd makes them.
SCOPE = "/sys/fs/cgroup/scope"
USER = 65431
#: What a process of a jail, or its process outside, is asked to do.
JAILED = """
import glob, os, signal, sys, time
from pyvmm.errors import JailError
from pyvmm.jail import Cell
from pyvmm.jailopt import Jail
def values(*names):
    (group,) = glob.glob("/sys/fs/cgroup/pyvmm/*-*")
    return [open(f"{group}/{name}").read().strip() for name in names]
def memory():
    try:
        kept = bytearray(300 << 20)
        kept[::4096] = bytes(len(kept[::4096]))
    except MemoryError:
        return 3
    return 0
def pids():
    for made in range(100):
        try:
            if not os.fork():
                time.sleep(1000)
        except BlockingIOError:
            print(made + 2, flush=True)
            return 0
    return 1
def cpu():
    begin = time.monotonic()
    while time.monotonic() < begin + 4:
        pass
    print(time.process_time() / (time.monotonic() - begin), flush=True)
    return 0
def sleep():
    time.sleep(1000)
    return 0
"""
RUN = """
with Cell(Jail(sys.argv[1])) as cell:
    try:
        print("status", cell.run({}, files=(), keep=()))
    except JailError as e:
        print(e)
print(glob.glob("/sys/fs/cgroup/pyvmm*"))
"""
#: A jail whose process outside is killed, and the next one, which finds what it has left.
LEFT = """
outside = os.fork()
if not outside:
    with Cell(Jail(sys.argv[1])) as cell:
        cell.run(sleep, files=(), keep=())
while not glob.glob("/sys/fs/cgroup/pyvmm/*-*/cgroup.procs") or not values("cgroup.procs")[0]:
    time.sleep(0.1)
while len(inside := values("cgroup.procs")[0].split()) < 2:
    time.sleep(0.1)
print(*values("memory.max", "memory.swap.max", "memory.oom.group", "cpu.max", "pids.max"))
print({line.split()[1] for pid in inside for line in open(f"/proc/{pid}/status")
       if line.startswith("Uid:")})
os.kill(outside, signal.SIGKILL)
os.waitpid(outside, 0)
while any(os.path.exists(f"/proc/{pid}") for pid in inside):
    time.sleep(0.1)
print(len(glob.glob("/sys/fs/cgroup/pyvmm/*-*")), "left")
"""


#: This process is alone in ``SCOPE``, or in a group below, or beside another process.
DELEGATED = f"""
import subprocess
scope = {SCOPE!r}
own = scope + sys.argv[2]
os.makedirs(own)
os.setxattr(scope, "user.delegate", b"1")
os.chown(scope, int(sys.argv[3]), -1)
with open("/sys/fs/cgroup/cgroup.subtree_control", "w") as f:
    f.write("+memory +cpu +pids")
with open(f"{{own}}/cgroup.procs", "w") as f:
    f.write("0")
closed = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.DEVNULL)
other = subprocess.Popen(["sleep", "1000"], **closed) if sys.argv[4] else None
"""
#: Where the group of a jail is, which the jail does not see; and what is left of it in the end.
SEEN = """
from pyvmm.host.cgroup import Cgroup
def joined(group, real=Cgroup.joined):
    if group._path:
        print(os.path.dirname(group._path), open(f"{group._path}/memory.max").read().strip())
    real(group)
Cgroup.joined = joined
"""
AFTER = """
print(os.path.exists(f"{scope}/pyvmm"), os.path.exists("/sys/fs/cgroup/pyvmm"))
print(open("/proc/self/cgroup").read().replace(str(os.getpid()), "PID").strip())
with open("/sys/fs/cgroup/cgroup.procs", "w") as f:
    f.write("0")
if other:
    other.kill()
    other.wait()
for group, _, _ in os.walk(scope, topdown=False):
    os.rmdir(group)
"""


def python(host: Host, code: str, *args: str) -> str:
    result = host.run(sys.executable, "-c", JAILED + code, *args, timeout=600)
    assert result.status == 0, result
    return result.out


@pytest.mark.parametrize(
    ("limits", "deed", "answer"),
    [
        ("memory=160M", "memory", "the jail's memory ran out, 160M, and the kernel has ended"),
        ("memory=600M", "memory", "status 0"),
        ("pids=20", "pids", "20\nstatus 0"),
    ],
)
def test_a_limit(host: Host, nothing_left: None, limits: str, deed: str, answer: str) -> None:
    out = python(host, RUN.format(deed), f"{USER},{limits}")
    assert out.startswith(answer), out
    assert out.endswith("\n[]\n"), "the cgroup has been removed"


def test_a_limit_of_time(host: Host, nothing_left: None) -> None:
    share, status, left = python(host, RUN.format("cpu"), f"{USER},cpus=0.2").splitlines()
    assert 0 < float(share) < 0.4, "a period more or less"
    assert (status, left) == ("status 0", "[]")


def test_what_a_killed_run_leaves(host: Host, nothing_left: None) -> None:
    """Its processes end with it; the next jail removes its cgroup."""
    limits = f"{USER},memory=256M,cpus=0.5,pids=100"
    out = python(host, LEFT + RUN.format("lambda: 7"), limits)
    assert out.splitlines()[-5:] == [
        f"{256 << 20} 0 1 50000 100000 100",
        f"{{'{USER}'}}",
        "1 left",
        "status 7",
        "[]",
    ], out


@pytest.fixture
def no_scope(host: Host) -> Iterator[None]:
    """``SCOPE`` is not there, before and after a test, whatever becomes of the test."""

    def gone() -> bool:
        """A process that is killed stays in its group until it has ended."""
        script = (
            f"[ -d {SCOPE} ] || exit 0; echo 1 >{SCOPE}/cgroup.kill; "
            f"find {SCOPE} -depth -type d -exec rmdir {{}} \\;"
        )
        host.run("sh", "-c", script)
        return host.run("test", "-e", SCOPE).status != 0

    host.wait_until(gone, f"{SCOPE} cannot be removed")
    yield
    host.wait_until(gone, f"{SCOPE} cannot be removed")


@pytest.mark.parametrize(
    ("below", "owner", "beside", "place", "leaf"),
    [
        ("", 0, "", "/scope", "/scope/pyvmm-PID"),
        ("/main", 0, "", "/scope", "/scope/main"),
        ("/main", USER, "", "", "/scope/main"),
        ("", 0, "another", "", "/scope"),
    ],
)
def test_a_delegated_cgroup(
    host: Host,
    nothing_left: None,
    no_scope: None,
    below: str,
    owner: int,
    beside: str,
    place: str,
    leaf: str,
) -> None:
    """As of ``systemd-run --scope -p Delegate=yes``, with ``DelegateSubgroup=``, of another user's,
    who could move the jail out of its limits, and of a shell's in which pyvmm is started.
    """
    code = DELEGATED + SEEN + RUN.format("lambda: 7") + AFTER
    limits = f"{USER},memory=256M,cpus=0.5,pids=100"
    out = python(host, code, limits, below, str(owner), beside)
    group = f"/sys/fs/cgroup{place}/pyvmm {256 << 20}"
    assert out.splitlines() == [group, "status 7", "[]", "False False", f"0::{leaf}"], out


#: In the guest, which has two shares, the first of them once more.
LOOK = """
ping -c 2 192.168.100.1 >/dev/null && echo reached
cat /data/public /data/private /data/link
mount -t virtiofs pyvmm0 /mnt && ls /mnt/mounted; ls /data/mounted
echo no >/data/new; echo made >/out/made; echo no >>/out/roots
"""


def test_a_machine_within_limits(host: Host, nothing_left: None, tmp_path: Path) -> None:
    """A guest of Linux, with a card, whose own process is in the cgroup. It has of its shares what
    the jail's user has: no file of root's own, nothing that a link leads to, and no file system
    that is mounted below.
    """
    given, out = tmp_path / "given", tmp_path / "out"
    (given / "mounted").mkdir(parents=True)
    out.mkdir()
    for path in (given / "public", given / "private", out / "roots", tmp_path / "outside"):
        path.write_text(f"{path.name}\n")
    (given / "private").chmod(0o600)
    (given / "link").symlink_to(tmp_path / "outside")
    os.chown(out, USER, USER)
    argv = [*PYVMM, "run", "--host", "local", "--jail", f"{USER},memory=512M,cpus=2,pids=200"]
    argv += ["--net", "emulated", "--share", f"{given}:/data", "--share", f"{out}:/out:rw"]
    mounted = 'mount --bind /etc "$0" && "$@"; status=$?; umount "$0"; exit $status'
    wrapper = ["sh", "-c", mounted, str(given / "mounted")]
    result = host.run(*wrapper, *argv, "--", "sh", "-c", LOOK, timeout=5 * PATIENCE)
    assert result.out.splitlines() == ["reached", "public"], result
    for problem in (
        *("private': Permission denied", "link': No such file", "data/new: Read-only file system"),
        "out/roots: Permission denied",
    ):
        assert problem in result.err, result
    assert host.run("ls", GROUPS).status != 0
    assert sorted(p.name for p in given.iterdir()) == ["link", "mounted", "private", "public"]
    assert (out / "roots").read_text() == "roots\n"
    made = out / "made"
    assert (made.read_text(), made.stat().st_uid) == ("made\n", USER)


def test_a_root(host: Host, nothing_left: None) -> None:
    """The host's own: the guest's root reads what the jail's user may."""
    argv = [*PYVMM, "run", "--host", "local", "--jail", f"{USER},memory=512M", "--net", "none"]
    look = "id -u; head -c 4 /etc/passwd; cat /etc/shadow"
    result = host.run(*argv, "--root", "/", "--", "sh", "-c", look, timeout=5 * PATIENCE)
    assert (result.status, result.out) == (1, "0\nroot"), result
    assert "/etc/shadow: Permission denied" in result.err, result


MIB = 1 << 20
#: In the guest: a file system on a file and on a block device, a base below a snapshot, and an
#: image that can only be read.
DISKS = r"""
for disk in vda vdb; do
    mke2fs /dev/$disk >/dev/null && mount /dev/$disk /mnt && echo $disk >/mnt/file
    umount /mnt && echo made
done
tail -c 5 /dev/vdc; printf thrown >/dev/vdc && sync && head -c 6 /dev/vdc; echo
printf no | dd of=/dev/vdd conv=notrunc; head -c 5 /dev/vdd; echo
echo ready
read_again() { echo 3 >/proc/sys/vm/drop_caches; dd if=/dev/vda of=/dev/null count=1; }
while read_again; do sleep 0.1; done 2>/dev/null
echo gone; head -c 5 /dev/vdd
"""


@pytest.fixture
def place() -> Iterator[Path]:
    """A directory that the jail's user may enter."""
    with open_directory() as directory:
        yield directory


@pytest.fixture
def block_device(host: Host, place: Path) -> Iterator[str]:
    """A block device of the jail's user."""
    (place / "device").touch()
    os.truncate(place / "device", 12 * MIB)
    name = host.sh(f"modprobe loop; losetup -f --show {place}/device").strip()
    host.sh(f"chown {USER} {name} && chmod 600 {name}")
    yield name
    host.sh(f"chown 0 {name} && losetup -d {name}")


def test_disks_and_a_daemon_that_dies(
    host: Host, nothing_left: None, place: Path, block_device: str
) -> None:
    """In one jail: an image of the user's and a block device, which keep what the guest writes, a
    chain of images of root's, and one that is only read. The daemons count for the limits. The
    death of one is told.
    """
    own, above, base, given = (place / name for name in ("own", "above", "base", "given"))
    own.touch()
    os.truncate(own, 8 * MIB)
    own.chmod(0o600)
    os.chown(own, USER, USER)
    base.write_bytes(b"based".rjust(16 * MIB, b"\0"))
    image = bytearray(qcow2.empty(16 * MIB))
    with_backing(b"base", b"raw")(image)
    above.write_bytes(image)
    given.write_bytes(b"given".ljust(4 * MIB, b"\0"))
    verdict = place / "verdict"
    args = ["--jail", f"{USER},memory=600M,cpus=2,pids=400", "--net", "none"]
    for disk in (
        f"{own},format=raw",
        f"{block_device},format=raw",
        f"{above},format=qcow2,snapshot=on,backing=on",
        f"{given},format=raw,ro=on",
    ):
        args += ["--disk", disk]
    with Run(host, *args, "--json", str(verdict), "--", "sh", "-c", DISKS) as run:
        run.expect("^ready$")
        found = daemons(host)
        assert len(found) == 4, found
        members = host.sh(f"cat {GROUPS}/*-*/cgroup.procs").split()
        owners = host.sh(f"stat -c %u {' '.join(f'/proc/{pid}' for pid in found.values())}")
        assert set(found.values()) <= set(members) and set(owners.split()) == {str(USER)}
        host.sh(f"kill -9 {found[str(8 * MIB)]}")
        assert run.wait() == 133, repr(run)
    assert run.out.splitlines() == [
        *("made", "made", "basedthrown", "given", "ready", "gone", "given")
    ], repr(run)
    assert json.loads(verdict.read_text())["verdict"] == "disk"
    assert f"the disk {own} has broken off: qemu-storage-daemon was killed by SIGKILL" in run.err
    assert base.read_bytes().endswith(b"\0based") and above.read_bytes() == image
    assert given.read_bytes()[:5] == b"given"
    for disk, name in ((str(own), "vda"), (block_device, "vdb")):
        assert host.sh(f"debugfs -R 'cat /file' {disk} 2>/dev/null") == f"{name}\n"
    assert not daemons(host) and host.run("ls", GROUPS).status != 0
