"""Disks (`--disk`): what is taken, how qemu-storage-daemon is confined and ended, and the answers
to the guest once it has gone. The daemon is a real one.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import struct
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import pyvmm
from pyvmm._ext import lib
from pyvmm.assembly import Description
from pyvmm.diskopt import Disk
from pyvmm.errors import DiskError, UsageError
from pyvmm.host import qcow2, storage_daemon
from pyvmm.host.apt import codename
from pyvmm.host.child import ChildConnector
from pyvmm.hostnet import isolate
from pyvmm.memory import GuestMemory
from pyvmm.outcome import Outcome
from pyvmm.spec.qcow2 import HEADER, HEADER_V3
from pyvmm.testing.judge import judge
from pyvmm.virtio.dead_disk import DeadDisk
from tests.descriptors import open_fds
from tests.driver import Events, Ring, wait_for
from tests.strangers import BECOME, need_readable_checkout
from tests.unit.test_vhost_user import no_leak
from tests.unit.test_vu_any import Guest

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["no_leak"]  # a fixture

PATIENCE = 60.0
SECTOR = 512
SECTORS = 2048
VIRTIO_BLK_F_RO = 5
IN, OUT = 0, 1  # VIRTIO_BLK_T_*
needs_daemon = pytest.mark.skipif(
    shutil.which("qemu-storage-daemon") is None, reason="needs qemu-storage-daemon"
)


def content(sector: int) -> bytes:
    return struct.pack("<Q", sector) * (SECTOR // 8)


def raw_image(path: Path) -> Path:
    """An image whose sectors say their numbers."""
    path.write_bytes(b"".join(map(content, range(SECTORS))))
    return path


def qcow2_image(path: Path, change: Callable[[bytearray], None] = lambda image: None) -> Path:
    image = bytearray(qcow2.empty(SECTORS * SECTOR))
    change(image)
    path.write_bytes(image)
    return path


def with_backing(name: bytes, form: bytes = b"") -> Callable[[bytearray], None]:
    """Have a qcow2 image name a backing file, and its format in a header extension."""

    def change(image: bytearray) -> None:
        place = 1024
        image[place : place + len(name)] = name
        struct.pack_into(">QI", image, 8, place, len(name))
        if form:
            struct.pack_into(">II8s", image, qcow2.HEAD_SIZE, 0xE2792ACA, len(form), form)

    return change


def with_data_file(name: bytes) -> Callable[[bytearray], None]:
    """Have a qcow2 image name the file of its data, in a header extension."""

    def change(image: bytearray) -> None:
        at = struct.calcsize(HEADER)
        image[at : at + 8] = struct.pack(">Q", 1 << 2)
        padded = name.ljust(-(-len(name) // 8) * 8, b"\0")
        extension = struct.pack(">II", 0x44415441, len(name)) + padded + bytes(8)
        end = at + struct.calcsize(HEADER_V3)
        image[end : end + len(extension)] = extension

    return change


class Asking:
    """A guest whose driver asks a disk one thing at a time."""

    def __init__(self, disk: Disk) -> None:
        self.guest = Guest(disk)
        self.offered = self.guest.pci.offered()
        self.ring = self.guest.start()
        self.memory = self.guest.board.memory
        connector = disk._connector
        assert connector is not None
        self.connector: ChildConnector = connector

    def __enter__(self) -> Asking:
        return self

    def __exit__(self, *exc: object) -> None:
        self.guest.__exit__()

    def put(self, kind: int, sector: int, data: bytes = b"") -> None:
        """Ask for one sector (virtio 1.2, 5.2.6)."""
        self.memory.write(0x20000, struct.pack("<IIQ", kind, 0, sector))
        self.memory.write(0x21000, data or b"\xaa" * SECTOR)
        self.memory.write(0x22000, b"\xff")
        middle = (0x21000, SECTOR, kind == IN)
        self.ring.add([(0x20000, 16, False), middle, (0x22000, 1, True)])
        self.ring.publish()

    def status(self) -> int:
        """The answer to the request that was put."""
        assert wait_for(self.ring.take_used, PATIENCE)
        return self.memory.read(0x22000, 1)[0]

    def read(self, sector: int) -> bytes:
        self.put(IN, sector)
        assert self.status() == 0
        return bytes(self.memory.read(0x21000, SECTOR))

    def write(self, sector: int, data: bytes) -> int:
        self.put(OUT, sector, data)
        return self.status()


# --- the option -----------------------------------------------------------------------------------


def test_what_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    raw, odd = raw_image(tmp_path / "a.raw"), raw_image(tmp_path / "b,c")
    qcow2_image(tmp_path / "d.qcow2")
    (tmp_path / "link.raw").symlink_to(raw)
    monkeypatch.chdir(tmp_path)
    for text, file, form, writable, snapshot in (
        ("a.raw", raw, "raw", True, False),
        ("link.raw,ro=on", raw, "raw", False, False),
        ("b,,c,format=raw,ro=off,snapshot=on", odd, "raw", True, True),
        ("d.qcow2", tmp_path / "d.qcow2", "qcow2", True, False),
        ("d.qcow2,format=raw", tmp_path / "d.qcow2", "raw", True, False),
    ):
        disk = Disk.parse(text)
        assert (disk.file, disk.format) == (str(file), form)
        assert (disk.writable, disk.snapshot) == (writable, snapshot)
        assert disk.kind.name == "block" and disk.directory == str(tmp_path)
    assert Disk.parse("a.raw,notify=exit").notify == "exit" and pyvmm.Disk is Disk
    both = [Disk(raw), Disk(tmp_path / "d.qcow2", readonly=True)]
    want = Description("k", disks=both)
    assert want.devices == both and want.disks == 2


@pytest.mark.parametrize(
    ("text", "error", "problem"),
    [
        ("", UsageError, "write FILE"),
        ("a\0b", UsageError, "write FILE"),
        ("plain", UsageError, "its name does not say what it is; add format=raw or format=qcow2"),
        ("plain.img", UsageError, "add format=raw"),
        ("plain,format=vmdk", UsageError, "use format=raw or format=qcow2"),
        ("plain,format=raw,format=raw", UsageError, "given twice"),
        ("plain,format=raw,ro=yes", UsageError, "use ro=on or ro=off"),
        ("plain,formt=raw", UsageError, "format"),
        ("a,b.raw", UsageError, "a comma in a file's name is written twice"),
        ("plain,format=raw,ro=on,snapshot=on", UsageError, "leave one of them out"),
        ("plain,format=raw,backing=yes", UsageError, "use backing=on or backing=off"),
        ("plain,format=raw,backing=on", UsageError, "only qcow2 has backing files"),
        ("plain,format=raw,notify=no", UsageError, "--disk plain: notify=no"),
        ("/no/such.raw", DiskError, "No such file or directory"),
        (".,format=raw", DiskError, "directory"),
        ("fifo,format=raw,ro=on", DiskError, "it is neither a file nor a block device"),
        ("/dev/null,format=raw", DiskError, "it is neither a file nor a block device"),
        ("plain,format=qcow2", DiskError, "is no qcow2 image; say what it is: format=raw"),
        ("backing.qcow2", DiskError, "has a backing file"),
        ("backing.qcow2,backing=off", DiskError, "allow it by backing=on, or make it complete"),
        ("data.qcow2", DiskError, "has its data in another file"),
        ("old.qcow2", DiskError, "is of version 1 of qcow2"),
        ("short.qcow2", DiskError, "is too short"),
        (
            "large.qcow2",
            DiskError,
            f"has {1 << 62} bytes, and a disk has at most {1 << 51}; name a",
        ),
    ],
)
def test_what_is_refused(
    text: str,
    error: type[Exception],
    problem: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    raw_image(tmp_path / "plain")
    qcow2_image(tmp_path / "backing.qcow2", with_backing(b"/etc/passwd"))
    qcow2_image(tmp_path / "data.qcow2", with_data_file(b"/etc/passwd"))
    qcow2_image(tmp_path / "old.qcow2", lambda image: struct.pack_into(">I", image, 4, 1))
    qcow2_image(tmp_path / "large.qcow2", lambda image: struct.pack_into(">Q", image, 24, 1 << 62))
    short = qcow2_image(tmp_path / "short.qcow2")
    os.truncate(short, struct.calcsize(HEADER))
    os.mkfifo(tmp_path / "fifo")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error) as e:
        Disk.parse(text)
    assert problem in str(e.value) and "\n" not in str(e.value)


def test_a_command_looks_at_an_image_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Until the machine is made: each look opens all files of a chain."""
    from pyvmm.cli import run

    looks: list[str] = []
    look = storage_daemon.layers

    def counted(path: str, *args: Any, **more: Any) -> Any:
        looks.append(path)
        return look(path, *args, **more)

    monkeypatch.setattr(storage_daemon, "layers", counted)
    image = tmp_path / "x.raw"
    image.write_bytes(bytes(512))
    args = argparse.Namespace(disk=[str(image)], jail=None)
    (first,), (second,) = run._disks(args), run._disks(args)
    assert first is second and looks == [str(image)]


def test_an_image_that_may_not_be_written_names_the_way_out(open_path: Path) -> None:
    need_readable_checkout()
    script = "import sys; from pyvmm.diskopt import Disk; Disk(sys.argv[1])"
    image = raw_image(open_path / "a.raw")
    image.chmod(0o444)
    drop = BECOME if not os.geteuid() else []
    done = subprocess.run(
        [*drop, sys.executable, "-c", script, str(image)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(pyvmm.__file__).parents[1])},
        check=False,
    )
    assert "Permission denied; allow it by chmod, or add ro=on or snapshot=on" in done.stderr


def test_a_disk_that_breaks_off_is_the_verdict() -> None:
    ended = Outcome("poweroff")
    ended.status = 0
    boot: Any = None
    lost = [DiskError("it broke off")]
    verdict = judge(ended, console=b"", boot=boot, phases={}, commanded=True, lost=lost)
    assert (verdict.kind, verdict.code, verdict.message) == ("disk", 133, "it broke off")


# --- qemu-storage-daemon --------------------------------------------------------------------------


def test_no_daemon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage_daemon, "PLACES", ("/no/such",))
    remedy = r"apt-get install \S+ qemu-utils, or qemu-system-common on Debian 12$"
    with pytest.raises(DiskError, match=rf"which is missing; run as root: {remedy}"):
        Disk(raw_image(tmp_path / "a.raw")).connector()


@pytest.mark.skipif(codename() not in ("bookworm", "trixie"), reason="needs Debian 12 or 13")
@needs_daemon
def test_the_package_that_is_named_has_the_daemon() -> None:
    package = storage_daemon.PACKAGES[{"bookworm": 12, "trixie": 13}[codename()]]
    listed = subprocess.run(["dpkg", "-L", package], capture_output=True, text=True)
    assert storage_daemon.PLACES[0] in listed.stdout.splitlines()


@needs_daemon
@pytest.mark.parametrize("form", ["raw", "qcow2"])
def test_reading_and_writing(tmp_path: Path, form: str) -> None:
    make: Callable[[Path], Path] = raw_image if form == "raw" else qcow2_image
    image = make(tmp_path / "disk")
    with Asking(Disk(image, format=form)) as disk:
        assert disk.guest.config(0, 8) == SECTORS and not disk.offered >> VIRTIO_BLK_F_RO & 1
        assert disk.read(7) == (content(7) if form == "raw" else bytes(SECTOR))
        assert disk.write(9, b"new!" * 128) == 0
        disk.guest.card.set_paused(True)
        disk.put(IN, 9)
        disk.guest.card.set_paused(False)
        assert disk.status() == 0 and disk.memory.read(0x21000, SECTOR) == b"new!" * 128
        report = disk.guest.card.report()
        assert report["kind"] == "block" and not report["faults"]
        process = disk.connector._child
    assert process.returncode == 0
    with Asking(Disk(image, format=form, readonly=True)) as disk:
        assert disk.read(9) == b"new!" * 128


@needs_daemon
def test_what_is_only_read(tmp_path: Path) -> None:
    image = raw_image(tmp_path / "a.raw")
    image.chmod(0o444)
    before = image.read_bytes()
    with Asking(Disk(image, readonly=True)) as disk:
        assert disk.offered >> VIRTIO_BLK_F_RO & 1
        assert disk.write(3, b"no" * 256) == 1  # VIRTIO_BLK_S_IOERR: an evil driver's
        assert disk.read(3) == content(3)
    assert image.read_bytes() == before


@needs_daemon
@pytest.mark.parametrize("form", ["raw", "qcow2"])
def test_a_snapshot_leaves_the_image_alone(
    tmp_path: Path, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    make: Callable[[Path], Path] = raw_image if form == "raw" else qcow2_image
    image, scratch = make(tmp_path / "disk"), tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setenv("TMPDIR", str(scratch))
    before = image.read_bytes()
    with Asking(Disk(image, format=form, snapshot=True)) as disk:
        assert disk.guest.config(0, 8) == SECTORS
        assert disk.write(3, b"temp" * 128) == 0
        assert disk.read(3) == b"temp" * 128
        assert disk.read(4) == (content(4) if form == "raw" else bytes(SECTOR))
        assert not list(scratch.iterdir())
        with Asking(Disk(image, format=form, snapshot=True)) as other:
            assert other.read(3) == (content(3) if form == "raw" else bytes(SECTOR))
    assert image.read_bytes() == before


@needs_daemon
def test_a_snapshot_of_the_largest_disk_and_of_a_larger_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The size is somebody else's number, also if an image is replaced after a look at it."""
    image = tmp_path / "a.qcow2"

    def of_size(size: int) -> None:
        qcow2_image(image, lambda data: struct.pack_into(">Q", data, 24, size))

    of_size(1 << 20)
    disk = Disk(image, snapshot=True)
    of_size(qcow2.SIZE_MAX + SECTOR)
    with pytest.raises(DiskError, match="a disk has at most"):
        disk.connector()
    raw = tmp_path / "a.raw"
    raw.touch()
    passer = Disk(raw, snapshot=True)
    monkeypatch.setattr(os, "lseek", lambda *_: 1 << 62)  # few file systems have such files
    with pytest.raises(DiskError, match="a disk has at most"):
        passer.connector()
    monkeypatch.undo()
    image.write_bytes(qcow2.empty(qcow2.SIZE_MAX))
    with Asking(Disk(image, snapshot=True)) as asking:
        assert asking.guest.config(0, 8) == qcow2.SIZE_MAX // SECTOR
        assert asking.read(1 << 41) == bytes(SECTOR)


@needs_daemon
@pytest.mark.parametrize("form", ["raw", "qcow2"])
def test_an_image_has_one_writer_or_several_readers(tmp_path: Path, form: str) -> None:
    make: Callable[[Path], Path] = raw_image if form == "raw" else qcow2_image
    image = make(tmp_path / "disk")
    writer = Disk(image, format=form)
    reader, passer = (
        Disk(image, format=form, readonly=True),
        Disk(image, format=form, snapshot=True),
    )
    with Asking(writer):
        for other in (Disk(image, format=form), reader, passer):
            with pytest.raises(DiskError, match="cannot be a disk: another process uses it") as e:
                Asking(other)
            text = str(e.value)
            assert "\n" not in text and "{" not in text and str(image) in text
    with Asking(reader), Asking(passer), pytest.raises(DiskError, match="another process"):
        Asking(writer)


@needs_daemon
def test_the_daemon_sees_the_image_only(tmp_path: Path) -> None:
    image = raw_image(tmp_path / "a.raw")
    (tmp_path / "other").touch()
    with Asking(Disk(image)) as disk:
        proc = Path(f"/proc/{disk.connector._child.pid}")
        root = proc / "root"
        seen = {str(p.relative_to(root)) for p in root.iterdir()}
        assert seen - {"lib", "lib64", "usr"} == {"dev", "etc", "image"}
        assert [p.name for p in (root / "dev").iterdir()] == ["null"]
        assert [p.name for p in (root / "etc").iterdir()] == ["ld.so.cache"]
        with pytest.raises(OSError, match="Read-only file system"):
            (root / "usr" / "new").touch()
        with pytest.raises(OSError, match="Read-only file system"):
            (root / "new").touch()
        for space in ("mnt", "net", "ipc"):
            assert (proc / "ns" / space).readlink() != Path(f"/proc/self/ns/{space}").readlink()
        status = dict(line.split(":\t", 1) for line in (proc / "status").read_text().splitlines())
        assert int(status["CapBnd"], 16) == 0 and status["NoNewPrivs"] == "1"
        assert status["Seccomp"] == "2"
        disk.read(0)  # by then the daemon has mapped the guest's memory, and closed its file
        links = [str(link.readlink()) for link in (proc / "fd").iterdir()]
        files = {link for link in links if link.startswith("/")}
        assert files <= {"/image", "/dev/null"}, links


ENCLOSED = """
import ctypes, errno, fcntl, os, resource, signal, sys, threading
libc = ctypes.CDLL(None, use_errno=True)
other, own = os.getppid(), os.getpid()
def call(number, *args):
    return ctypes.get_errno() if libc.syscall(number, *map(ctypes.c_long, args)) < 0 else 0
def of(function, *args):
    try:
        function(*args)
    except OSError as e:
        return e.errno
    return 0
r, w = os.pipe()
refused = {
    "kill": of(os.kill, other, 0), "group": of(os.kill, 0, 0), "all": of(os.kill, -1, 0),
    "above 32 bits": call(62, other | 1 << 32, 0),
    "tgkill": call(234, other, other, 0), "tkill": call(200, other, 0),
    "queue": call(129, other, 0, 0), "pidfd": of(os.pidfd_open, other),
    "limit": of(resource.prlimit, other, resource.RLIMIT_CORE),
    "cpu": of(os.sched_setaffinity, other, os.sched_getaffinity(0)),
    "priority": of(os.setpriority, os.PRIO_PROCESS, other, 19),
    "fork": of(os.fork), "vfork": call(58), "clone": call(56, signal.SIGCHLD, 0),
    "owner": of(fcntl.fcntl, r, fcntl.F_SETOWN, other),
    "ioctl": of(fcntl.ioctl, r, 0x8901, other.to_bytes(4, "little")),
    "keyctl": call(250, 0, -3, 0), "unshare": call(272, 0x20000), "ptrace": call(101, 0, 0, 0),
}
assert set(refused.values()) == {errno.EPERM}, refused
assert call(435, 0, 0) == call(1 << 30 | 62, other, 0) == errno.ENOSYS
os.kill(own, 0)
resource.prlimit(0, resource.RLIMIT_CORE)
resource.prlimit(own, resource.RLIMIT_CORE)
os.sched_setaffinity(0, os.sched_getaffinity(0))
thread = threading.Thread(target=signal.pthread_kill, args=(threading.get_ident(), 0))
thread.start()
thread.join()
fcntl.fcntl(r, fcntl.F_SETFL, os.O_NONBLOCK)
os.execv("/bin/echo", ["echo", "done"])
"""


def test_an_enclosed_program_reaches_no_other_process() -> None:
    run = subprocess.run(
        [sys.executable, "-c", ENCLOSED],
        preexec_fn=lambda: lib.pv_confine_program(0),
        capture_output=True,
        text=True,
    )
    assert (run.returncode, run.stdout) == (0, "done\n"), run.stderr


# --- hostile images -------------------------------------------------------------------------------


@needs_daemon
def test_a_raw_image_stays_raw_whatever_the_guest_writes(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_bytes(b"secret" * 1000)
    image = raw_image(tmp_path / "a.raw")
    evil = qcow2_image(tmp_path / "evil", with_backing(str(secret).encode())).read_bytes()
    with Asking(Disk(image)) as disk:
        for sector in range(8):
            assert disk.write(sector, evil[sector * SECTOR :][:SECTOR]) == 0
    with Asking(Disk(image)) as disk:
        assert disk.guest.config(0, 8) == SECTORS
        assert disk.read(0) == evil[:SECTOR]
    with pytest.raises(UsageError, match="its name does not say"):
        Disk(shutil.copy(image, tmp_path / "renamed"))


@needs_daemon
@pytest.mark.parametrize("follows", [False, True])
def test_an_image_that_names_another_file_after_it_was_checked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, follows: bool
) -> None:
    """The name of the backing file is not used; if it were, there would be no such file."""
    secret = tmp_path / "secret"
    secret.write_bytes(b"secret" * 1000)
    image = qcow2_image(tmp_path / "a.qcow2", with_backing(str(secret).encode()))
    monkeypatch.setattr(qcow2, "problem", lambda head, backing: ("", ""))
    if follows:
        real = storage_daemon.nodes

        def nodes(form: str, **options: Any) -> list[dict[str, Any]]:
            (disk,) = real(form, **options)
            del disk["backing"]
            return [disk]

        monkeypatch.setattr(storage_daemon, "nodes", nodes)
        with pytest.raises(DiskError, match="Could not open backing file") as e:
            Asking(Disk(image))
        assert "No such file or directory" in str(e.value)
        return
    with Asking(Disk(image)) as disk:
        assert disk.read(0) == bytes(SECTOR)


@needs_daemon
def test_an_image_whose_data_are_in_another_file_after_it_was_checked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    secret = tmp_path / "secret"
    secret.write_bytes(b"secret" * 1000)
    image = qcow2_image(tmp_path / "a.qcow2", with_data_file(str(secret).encode()))
    monkeypatch.setattr(qcow2, "problem", lambda head, backing: ("", ""))
    with pytest.raises(DiskError, match="No such file or directory") as e:
        Asking(Disk(image))
    assert "\n" not in str(e.value)


@needs_daemon
def test_nonsense_in_a_qcow2_image_is_one_line(tmp_path: Path) -> None:
    image = qcow2_image(
        tmp_path / "a.qcow2", lambda image: struct.pack_into(">Q", image, 40, 1 << 63)
    )
    with pytest.raises(DiskError, match="cannot be a disk: qemu-storage-daemon has ended") as e:
        Asking(Disk(image))
    assert "\n" not in str(e.value) and "{" not in str(e.value)


@needs_daemon
def test_an_image_that_is_replaced_by_a_link(tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(b"secret" * 1000)
    disk = Disk(raw_image(tmp_path / "a.raw"))
    (tmp_path / "a.raw").unlink()
    (tmp_path / "a.raw").symlink_to(tmp_path / "secret")
    with pytest.raises(DiskError, match="cannot be confined"):
        disk.connector()


def test_a_name_of_an_image_s_choice_is_shown_on_one_line(tmp_path: Path) -> None:
    (tmp_path / "a").touch()
    link = tmp_path / "\n::error::\x1b[2J"
    link.symlink_to("a")
    with pytest.raises(OSError, match="has been replaced") as e:
        isolate.open_found(str(link))
    assert str(e.value).isprintable()


# --- the end --------------------------------------------------------------------------------------


@needs_daemon
def test_once_the_daemon_is_dead_every_request_fails(tmp_path: Path) -> None:
    image = raw_image(tmp_path / "a.raw")
    with Asking(Disk(image)) as disk:
        assert disk.read(1) == content(1)
        disk.connector._child.kill()
        disk.put(IN, 2)
        assert disk.status() == 1
        assert wait_for(lambda: disk.guest.card.broken, PATIENCE)
        assert "qemu-storage-daemon was killed by SIGKILL" in str(disk.guest.card.broken)
        assert disk.write(3, b"x" * SECTOR) == 1
        disk.guest.pci.reset()
        disk.ring = disk.guest.start()
        disk.put(IN, 2)
        assert disk.status() == 1
        assert disk.guest.card.report()["counters"]["disconnections"] == 1  # type: ignore[index]


@needs_daemon
def test_a_daemon_that_is_told_to_end_writes_what_it_has(tmp_path: Path) -> None:
    """Whoever ends it."""
    image = qcow2_image(tmp_path / "a.qcow2")
    with Asking(Disk(image)) as disk:
        assert disk.write(5, b"kept" * 128) == 0
        os.kill(disk.connector._child.pid, signal.SIGTERM)
        assert wait_for(lambda: disk.guest.card.broken, PATIENCE)
        assert "qemu-storage-daemon has ended" in str(disk.guest.card.broken)
    with Asking(Disk(image)) as disk:
        assert disk.read(5) == b"kept" * 128


@needs_daemon
def test_the_daemon_ends_with_us(tmp_path: Path) -> None:
    """Also if this process is killed."""
    image = raw_image(tmp_path / "a.raw")
    script = (
        "import os, sys; from pyvmm.diskopt import Disk\n"
        "connector = Disk(sys.argv[1]).connector()\n"
        "print(connector._child.pid, flush=True); sys.stdin.read()"
    )
    argv = [sys.executable, "-c", script, str(image)]
    where = {**os.environ, "PYTHONPATH": str(Path(pyvmm.__file__).parents[1])}
    with subprocess.Popen(
        argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=where
    ) as us:
        assert us.stdout is not None
        pid = int(us.stdout.readline())
        watch = os.pidfd_open(pid)
        try:
            us.kill()
            assert wait_for(lambda: select_readable(watch), PATIENCE)
        finally:
            os.close(watch)


def test_what_a_child_has(tmp_path: Path) -> None:
    """A session of its own, no input, no signal that Python ignores, none of our descriptors but
    those that it is given. A file that a parent of ours has left open is none of them.
    """
    out, left = tmp_path / "out", os.open("/dev/zero", os.O_RDONLY)
    os.set_inheritable(left, True)
    script = """
        exec >"$0"; readlink /proc/self/fd/0; ls /proc/$$/fd; cut -d" " -f6 /proc/$$/stat
        grep SigIgn /proc/$$/status; env; exit 5"""
    given = os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC)
    made: list[int] = []

    def argv(fd: int) -> list[str]:
        made.append(fd)
        return ["/bin/sh", "-c", script, str(out)]

    child = ChildConnector("sh", "x", DiskError)
    try:
        child.start(argv, lambda: None, {"ONLY": "this", "PATH": "/bin:/usr/bin"}, [given])
        child.end_s = PATIENCE
        assert child.end() == "sh has ended with status 5"
        lines = out.read_text().splitlines()
        assert lines[0] == "/dev/null"
        has = {int(line) for line in lines[1 : lines.index(str(child._child.pid))]}
        assert has <= {0, 1, 2, 10, 255, made[0], given} and {made[0], given} <= has, has
        ignored = int(next(line for line in lines if line.startswith("SigIgn")).split()[1], 16)
        for number in (signal.SIGPIPE, signal.SIGXFSZ):  # nohup(1) may have left others
            assert not ignored >> (number - 1) & 1, number
        assert "ONLY=this" in lines and not any(line.startswith("HOME=") for line in lines)
    finally:
        child.close()
        os.close(given)
        os.close(left)


def test_a_child_that_cannot_be(tmp_path: Path) -> None:
    """The error says why, nothing is left, and a directory for temporary files is not needed."""

    def refuse() -> None:
        raise OSError(1, "unshare: Operation not permitted")

    def children() -> str:
        return Path(f"/proc/self/task/{os.getpid()}/children").read_text()

    before = open_fds(), children()
    for argv, prepare, why in (
        (["/bin/sh"], refuse, "x cannot be confined: unshare: Operation not permitted"),
        ([str(tmp_path)], lambda: None, "x cannot be confined: Permission denied"),
        ([f"{tmp_path}/none"], lambda: None, "x cannot be confined: No such file or directory"),
    ):
        child = ChildConnector("sh", "x", DiskError)
        with pytest.raises(DiskError, match=why):
            child.start(lambda fd, argv=argv: argv, prepare, {})  # type: ignore[misc]
        child.close()
    assert not open_fds() - before[0] and children() == before[1]


@pytest.mark.parametrize("where", ["good", "none", "x" * 100, "relative", ""])
def test_where_the_socket_of_a_child_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    """The directory for temporary files may be missing, or have too long a name for a socket."""
    directory = tmp_path / where
    if where in ("good", "x" * 100):
        directory.mkdir()
    monkeypatch.setenv("TMPDIR", where if where in ("relative", "") else str(directory))
    child = ChildConnector("sh", "x", DiskError)
    child.start(lambda fd: ["/bin/sh", "-c", "exit 3"], lambda: None, {})
    try:
        child.end_s = PATIENCE
        assert child.end() == "sh has ended with status 3"
    finally:
        child.close()
    assert not [path for path in tmp_path.rglob("*") if path != directory]


def test_a_grandchild_that_never_falls_silent() -> None:
    """The words of a child end with the child, whoever else writes them. /dev/zero never ends."""
    ended = ChildConnector("sh", "x", DiskError)
    ended.start(lambda fd: ["/bin/sh", "-c", "exit 3"], lambda: None, {})
    words, ended._words = ended._words, os.open("/dev/zero", os.O_RDONLY)
    try:
        ended.end_s = PATIENCE
        assert ended.end().startswith("sh has ended with status 3")
    finally:
        ended.close()
        os.close(words)


def select_readable(fd: int) -> bool:
    import select

    poll = select.poll()
    poll.register(fd, select.POLLIN)
    return bool(poll.poll(0))


def test_every_request_to_a_dead_disk_fails() -> None:
    with closing(GuestMemory(4 << 20)) as memory, closing(Ring(memory, 64, 0x1000)) as ring:
        dead, events = DeadDisk(), Events()
        with closing(dead):
            long = [(0x20000 + n * 0x10000, 0x10000, False) for n in range(30)]
            for at, middle in (
                (0x300000, [(0x310000, 0x8000, True)]),
                (0x300100, long),
                (0x300200, []),
            ):
                memory.write(at, b"\xff" * 32)
                ring.add([(at, 16, False), *middle, (at + 16, 1, True)])
            ring.add([(0x300000, 16, False)])  # no room for a status
            ring.publish(kick=False)
            dead.start(1 << 32, memory, [ring.vring()], events)
            used: list[tuple[int, int]] = []
            assert wait_for(lambda: used.extend(ring.take_used()) or len(used) == 4, PATIENCE)  # type: ignore[func-returns-value]
            assert [length for _, length in used] == [0, 1, 1, 0] and not events.faults
            for at in (0x300000, 0x300100, 0x300200):
                assert memory.read(at + 16, 1) == b"\1"
            assert dead.counters() == {"refused_requests": 4}


def test_what_the_daemon_is_told_names_no_other_file() -> None:
    for form in ("raw", "qcow2"):
        for snapshot in (False, True):
            text = json.dumps(
                storage_daemon.nodes(form, device=False, writable=not snapshot, snapshot=snapshot)
            )
            assert text.count("filename") == 1 + snapshot
            assert ('"backing": null' in text) == (form == "qcow2")
    text = json.dumps(
        storage_daemon.nodes(
            "qcow2", device=False, writable=True, snapshot=False, below=["qcow2", "raw"]
        )
    )
    assert text.count("filename") == 3 and "/image1" in text and "/image2" in text
    assert '"backing": "image1"' in text and '"backing": "image2"' in text and "null" not in text


# --- backing files --------------------------------------------------------------------------------


def chain(tmp_path: Path) -> Path:
    """An image above another one, in another directory, above a raw one."""
    for name in ("top", "low"):
        (tmp_path / name).mkdir()
    raw_image(tmp_path / "low" / "base.img")
    qcow2_image(tmp_path / "low" / "mid,1.qcow2", with_backing(b"base.img", b"raw"))
    return qcow2_image(tmp_path / "top" / "a.qcow2", with_backing(b"../low/mid,1.qcow2", b"qcow2"))


@needs_daemon
@pytest.mark.parametrize("keys", ["", ",snapshot=on", ",ro=on"])
def test_a_chain_of_images(tmp_path: Path, keys: str, monkeypatch: pytest.MonkeyPatch) -> None:
    image = chain(tmp_path)
    below = [tmp_path / "low" / "mid,1.qcow2", tmp_path / "low" / "base.img"]
    before = [path.read_bytes() for path in (image, *below)]
    (tmp_path / "link.qcow2").symlink_to(image)
    monkeypatch.chdir(tmp_path)
    with Asking(Disk.parse(f"link.qcow2,backing=on{keys}")) as disk:
        for sector in (0, 1, SECTORS - 1):
            assert disk.read(sector) == content(sector)
        assert disk.write(5, b"n" * SECTOR) == (1 if "ro" in keys else 0)
        assert disk.read(5) == (content(5) if "ro" in keys else b"n" * SECTOR)
        assert disk.read(6) == content(6)
        root = Path(f"/proc/{disk.connector._child.pid}/root")
        seen = {path.name for path in root.iterdir()} - {"lib", "lib64", "usr", "dev", "etc"}
        assert seen - {"overlay"} == {"image", "image1", "image2"}
        for name in ("image1", "image2"):
            with pytest.raises(OSError, match="Read-only file system"):
                (root / name).open("r+b")
    after = [path.read_bytes() for path in (image, *below)]
    assert after[1:] == before[1:] and (after == before) == bool(keys)


@needs_daemon
def test_a_backing_file_has_no_writer(tmp_path: Path) -> None:
    """QEMU's locks hold that for a chain, too."""
    image = chain(tmp_path)
    with Asking(Disk(image, backing=True)):
        with pytest.raises(DiskError, match="another process uses it"):
            Asking(Disk(tmp_path / "low" / "base.img", format="raw"))
        other = qcow2_image(tmp_path / "b.qcow2", with_backing(b"low/base.img", b"raw"))
        with Asking(Disk(other, backing=True)) as second:
            assert second.read(7) == content(7)


@pytest.mark.parametrize(
    ("name", "form", "problem"),
    [
        (b"base.raw", b"", "whose format it does not say; say raw or qcow2: qemu-img rebase"),
        (b"base.raw", b"vmdk", "whose format it calls 'vmdk'"),
        (b"base.raw", b"qcow2", "the backing file '{}/base.raw' is no qcow2 image"),
        (b"gone.raw", b"raw", "'{}/gone.raw': No such file or directory"),
        (b"a.qcow2", b"qcow2", "which is above it in the chain"),
        (b"link", b"qcow2", "which is above it in the chain"),
        (
            b"below.qcow2",
            b"qcow2",
            "{}/below.qcow2' has the backing file 'a.qcow2'",
        ),
        (b"/dev/zero", b"raw", "it is neither a file nor a block device"),
        (b"disk", b"raw", "which is a device; only files are taken"),
        (b".", b"raw", "it is neither a file nor a block device"),
        (b"nbd:unix:/s", b"raw", "which is no path"),
        (b'json:{"driver":"file"}', b"raw", "which is no path"),
        (b"base.raw\0", b"raw", "which is no path"),
        (b"a\nb", b"raw", "'a\\nb'"),
        (b"data.qcow2", b"qcow2", "data.qcow2' has its data in another file"),
        (b"x" * 1024, b"raw", "names a backing file in a place where no name can be"),
    ],
)
def test_a_chain_that_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: bytes, form: bytes, problem: str
) -> None:
    raw_image(tmp_path / "base.raw")
    qcow2_image(tmp_path / "data.qcow2", with_data_file(b"/etc/passwd"))
    qcow2_image(tmp_path / "below.qcow2", with_backing(b"a.qcow2", b"qcow2"))
    image = qcow2_image(tmp_path / "a.qcow2", with_backing(name, form))
    (tmp_path / "link").symlink_to("a.qcow2")
    (tmp_path / "disk").touch()
    (tmp_path / "disk").chmod(0o751)  # by which it is told: not everybody may make a device
    monkeypatch.setattr(storage_daemon, "S_ISBLK", lambda mode: mode & 0o777 == 0o751)
    with pytest.raises(DiskError) as e:
        Disk(image, backing=True)
    assert problem.format(tmp_path) in str(e.value) and "\n" not in str(e.value)


def test_a_chain_has_an_end(tmp_path: Path) -> None:
    for number in range(storage_daemon.LAYERS_MAX + 1):
        below = with_backing(f"{number - 1}.qcow2".encode(), b"qcow2")
        qcow2_image(tmp_path / f"{number}.qcow2", below if number else lambda image: None)
    Disk(tmp_path / f"{storage_daemon.LAYERS_MAX - 1}.qcow2", backing=True)
    with pytest.raises(DiskError, match="a chain has at most 100 images"):
        Disk(tmp_path / f"{storage_daemon.LAYERS_MAX}.qcow2", backing=True)


def test_an_image_without_a_backing_file_may_have_the_key(tmp_path: Path) -> None:
    assert Disk.parse(f"{qcow2_image(tmp_path / 'a.qcow2')},backing=on").backing
    assert not Disk(tmp_path / "a.qcow2").backing


def test_a_device_that_an_image_names_is_not_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Opening may have an effect: /dev/watchdog starts a countdown."""
    opened: list[str] = []
    real = os.open

    def spy(path: str, flags: int, *args: int, **more: int) -> int:
        if not flags & os.O_PATH:
            opened.append(os.path.realpath(path))
        return real(path, flags, *args, **more)

    monkeypatch.setattr(os, "open", spy)
    for path in ("/dev/null", str(tmp_path)):
        with pytest.raises(OSError, match="neither a file nor a block device"):
            storage_daemon.Image(path, writable=False)
    assert not opened
    file = tmp_path / "file"
    file.write_bytes(b"x" * 10)
    assert storage_daemon.Image(str(file), writable=True).size == 10 and opened == [str(file)]
