"""Shares of directories (`--share`): what is taken, how virtiofsd is started, and the answers to
the guest once virtiofsd has gone.
"""

from __future__ import annotations

import errno
import os
import random
import resource
import struct
import sys
from contextlib import ExitStack, closing
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from pyvmm.assembly import Description, cmdline, extra_archive
from pyvmm.cli.support.jailed import take_mounts
from pyvmm.devices.guest_port import PHASES
from pyvmm.errors import DiskError, JailError, ShareError, UsageError
from pyvmm.host import virtiofsd
from pyvmm.hostnet import isolate
from pyvmm.memory import GuestMemory
from pyvmm.outcome import Outcome
from pyvmm.shareopt import Root, Share, place, reason, words
from pyvmm.spec import vhost_user as spec
from pyvmm.spec.platform import GUEST_NO_SHARE, GUEST_SHARES, SHARE_OVERLAY
from pyvmm.testing.judge import judge
from pyvmm.vhostuser.connect import Connector
from pyvmm.vhostuser.wire import Listener
from pyvmm.virtio.dead_fs import DeadFs
from tests.driver import Events, Ring, wait_for
from tests.unit.test_guest_port import Channel, Rig, channel, rig
from tests.unit.test_vhost_user import no_leak, path
from tests.unit.test_vu_any import Guest
from tests.vu_fake import Fake

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

__all__ = ["Channel", "channel", "no_leak", "path", "rig"]  # fixtures

PATIENCE = 60.0
LOOKUP, FORGET = 1, 2


# --- the option -----------------------------------------------------------------------------------


def test_what_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    odd = tmp_path / "a:b,c"
    odd.mkdir()
    (tmp_path / "link").symlink_to(odd)
    (tmp_path / "x:rw").mkdir()
    monkeypatch.chdir(tmp_path)
    for text, directory, inside, writable in (
        (".", tmp_path, str(tmp_path), False),
        (".:rw", tmp_path, str(tmp_path), True),
        ("link:ro", odd, str(odd), False),
        (f"{odd}:/data", odd, "/data", False),
        (f"{odd}:/data/../x//y/:rw", odd, "/x/y", True),
        ("x:rw:ro", tmp_path / "x:rw", str(tmp_path / "x:rw"), False),
    ):
        share = Share.parse(text)
        assert (share.directory, share.path) == (str(directory), inside)
        assert share.writable == writable
    want = Description("k", shares=[Share("."), Share(odd, "/d", writable=True)])
    own = os.fsencode(tmp_path)
    assert words(want.shares) == b"pyvmm0\0" + own + b"\0ro\0pyvmm1\0/d\0rw\0"
    config = want.shares[1].own_config()
    assert config == b"pyvmm1".ljust(36, b"\0") + b"\1\0\0\0"
    assert place(want.shares[:1], str(odd)) == own + b"/a:b,c"
    assert place(want.shares, str(odd)) == b"/d"
    assert place(want.shares[1:], f"{odd}/deep") == b"/d/deep"
    assert place(want.shares[1:], f"{odd}2") == b""


@pytest.mark.parametrize(
    ("text", "error", "problem"),
    [
        ("", UsageError, "write DIR"),
        ("/no/such", ShareError, "No such file or directory"),
        ("file", ShareError, "is no directory; name a directory; a file: --add FILE"),
        (".:rw:x", ShareError, "No such file"),
        (".:/:rw", UsageError, "cannot mount"),
        ("/", UsageError, "cannot mount / at /"),
        (".:/proc", UsageError, "name another place"),
        ("a\0b", UsageError, "write DIR"),
        (".:/a\0b", UsageError, "no path in the guest"),
    ],
)
def test_what_is_refused(
    text: str,
    error: type[Exception],
    problem: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error) as e:
        Share.parse(text)
    assert problem in str(e.value) and "\n" not in str(e.value)


def test_two_shares_at_one_place(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="two directories at /x"):
        Description("k", shares=[Share(tmp_path, "/x"), Share(tmp_path, "/x/")])


def test_the_root_and_its_user(tmp_path: Path) -> None:
    etc = tmp_path / "etc"
    etc.mkdir()
    (etc / "passwd").write_bytes(
        b"root:x:0:0::/root:\nann:x:1000:100:A\xff:/home/ann:/bin/bash\nbad:x\n"
    )
    (etc / "group").write_text("users:x:100:\naudio:x:29:bob,ann\nx:x:q:ann\n")
    root = Root(tmp_path, user="ann")
    assert root.account == b"1000\n100\n100,29\nann\n/home/ann\n/bin/bash\n"
    assert Root(tmp_path, user="root").account == b"0\n0\n0\nroot\n/root\n/bin/sh\n"
    assert Root(tmp_path).account == b"" and not root.writable
    for name in ("bad", "eve", ""):
        with pytest.raises(UsageError, match="has no such user"):
            Root(tmp_path, user=name)
    want = Description("k", root=Root("/"), shares=[Share(tmp_path, "/d")])
    assert words(want.shares) == b"pyvmm0\0/\0root\0pyvmm1\0/d\0ro\0"
    assert place(want.shares, "/usr/share") == b"/usr/share"
    assert place(want.shares, str(etc)) == b"/d/etc"
    assert place([root], "/usr") == b""
    assert virtiofsd.command(virtiofsd.C, 5, "/", writable=False, root=True)[-1].startswith(
        "source=/,sandbox=chroot,"
    )


def tree_with(root: Path, program: str) -> None:
    path = root / program
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch(0o755)


def test_the_tree_s_own_init(tmp_path: Path) -> None:
    """Links are followed as in the guest, never to the host's files."""
    with pytest.raises(UsageError, match=r"has no usr/lib/systemd/systemd; install systemd"):
        Root(tmp_path, init="systemd")
    (tmp_path / "sbin").symlink_to("usr/sbin")
    (tmp_path / "usr/sbin").mkdir(parents=True)
    (tmp_path / "sbin/init").symlink_to("/lib/systemd/systemd")
    with pytest.raises(UsageError, match="has no such program"):
        Root(tmp_path, init="/sbin/init")  # the host has systemd there
    (tmp_path / "lib").symlink_to("../../../../usr/lib")
    tree_with(tmp_path, "usr/lib/systemd/systemd")
    for name, found in (
        ("systemd", "/usr/lib/systemd/systemd"),
        ("/sbin/init", "/sbin/init"),
        ("/sbin/../sbin/./init", "/sbin/../sbin/./init"),
    ):
        root = Root(tmp_path, init=name)
        assert (root.init, root.systemd) == (found, True)
        assert root.init_words == found.encode() + b"\0systemd\0"
    tree_with(tmp_path, "usr/sbin/openrc-init")
    other = Root(tmp_path, init="/sbin/openrc-init")
    assert not other.systemd and other.init_words == b"/sbin/openrc-init\0"
    (tmp_path / "usr/sbin/data").touch(0o644)
    (tmp_path / "usr/sbin/loop").symlink_to("loop")
    for name in ("/usr/sbin/data", "/usr/sbin", "/", "/usr/sbin/loop", "/no/such", "/sbin/init/x"):
        with pytest.raises(UsageError, match="has no such program"):
            Root(tmp_path, init=name)
    for name in ("", "init", "/a\0b"):
        with pytest.raises(UsageError, match="use systemd, or an absolute path"):
            Root(tmp_path, init=name)


def test_what_the_guest_gets_of_the_tree_s_init(tmp_path: Path) -> None:
    tree_with(tmp_path, "lib/systemd/systemd")
    tree_with(tmp_path, "sbin/other")
    want = Description("k", root=Root(tmp_path, init="systemd"), command=["true"])
    archive, _ = extra_archive(want)
    assert archive is not None
    assert archive.entries["etc/pyvmm.init"].data == b"/lib/systemd/systemd\0systemd\0"
    assert "fstab=no" in cmdline(want, []).split()
    other = Root(tmp_path, init="/sbin/other")
    with pytest.raises(UsageError, match="only systemd can be told to run it; leave it out"):
        Description("k", root=other, command=["true"])
    assert "fstab=no" not in cmdline(Description("k", root=other), []).split()


# --- what init reports ----------------------------------------------------------------------------


def test_init_reports_shares(rig: Rig) -> None:
    rig.tell(GUEST_SHARES, 2)
    assert rig.reached == ["shares"] and GUEST_SHARES in PHASES
    rig.tell(GUEST_NO_SHARE, 3 << 16 | errno.ENODEV)
    assert rig.no_shares == [(3, errno.ENODEV)]


def test_why_a_guest_mounts_nothing(tmp_path: Path) -> None:
    shares = [Share(tmp_path, "/data")]
    assert "CONFIG_VIRTIO_FS and CONFIG_FUSE_FS" in reason(shares, 0, errno.ENODEV)
    assert reason(shares, 0, errno.ENODEV).startswith("/data: ")
    assert "CONFIG_OVERLAY_FS" in reason(shares, SHARE_OVERLAY, errno.ENODEV)
    assert "CONFIG_VIRTIO_PCI" in reason(shares, 0, errno.EINVAL)
    assert reason(shares, 7, 0xFFFF)  # a hostile guest's
    outcome = Outcome("share", "/data: why")
    error = outcome.error()
    assert isinstance(error, ShareError) and "/data: why" in str(error)
    ended = Outcome("poweroff")
    ended.status = 1
    boot: Any = None
    lost = [ShareError("it broke off"), DiskError("so did it")]
    verdict = judge(ended, console=b"", boot=boot, phases={}, commanded=True, lost=lost)
    assert (verdict.kind, verdict.code, verdict.message) == ("share", 131, "it broke off")
    assert verdict.details == ["so did it"]


# --- virtiofsd ------------------------------------------------------------------------------------


def test_commands(tmp_path: Path) -> None:
    c = virtiofsd.command(virtiofsd.C, 5, "/a,b\\c", writable=True, root=True)
    assert c[1] == "--fd=5" and c[-1].startswith("source=/a\\,b\\\\c,sandbox=namespace,")
    rust = virtiofsd.command(virtiofsd.RUST, 5, "/a,b", writable=False, root=False)
    assert {"--fd=5", "--shared-dir=/a,b", "--sandbox=chroot", "--readonly"} <= set(rust)
    rust = virtiofsd.command(virtiofsd.RUST, 5, "/a,b", writable=True, root=True)
    assert "--readonly" not in rust and "--sandbox=namespace" in rust


def test_how_long_what_was_read_holds(tmp_path: Path) -> None:
    """A shared directory changes under the guest; a root is read once."""
    assert Share(tmp_path).cache == "auto" and Root(tmp_path).cache == "always"
    for program, cache in ((virtiofsd.C, "auto"), (virtiofsd.RUST, "always")):
        c = virtiofsd.command(program, 5, "/a", writable=True, root=True, cache=cache)
        assert f"cache={cache}" in ",".join(c).replace("--", "").split(",")


def test_no_virtiofsd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(virtiofsd, "RUST", "/no/rust")
    monkeypatch.setattr(virtiofsd, "C", "/no/c")
    monkeypatch.setattr(virtiofsd, "PACKAGES", {"/no/rust": "r", "/no/c": "c"})
    with pytest.raises(
        ShareError, match=r"virtiofsd, which is missing; run as root: apt-get .* r or c$"
    ):
        virtiofsd.FsConnector(str(tmp_path), writable=False)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, or user namespaces and gcc")
def test_a_virtiofsd_that_ends_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its last words are in the error, and how it ended."""
    program = tmp_path / "virtiofsd"
    program.write_text(
        f"#!{sys.executable}\nimport sys\n"
        f"try: open({isolate.SHARED + '/virtiofsd.new'!r}, 'w')\n"
        "except OSError as e: print('cannot', e.strerror, file=sys.stderr)\n"
        "sys.exit(3)\n"
    )
    program.chmod(0o755)
    monkeypatch.setattr(virtiofsd, "find", lambda: str(program))
    with closing(virtiofsd.FsConnector(str(tmp_path), writable=False)) as connector:
        connector.end_s = PATIENCE
        how = connector.end()
        assert how == "virtiofsd has ended with status 3: cannot Read-only file system"
    with closing(virtiofsd.FsConnector(str(tmp_path), writable=True)) as connector:
        connector.end_s = PATIENCE
        assert connector.end() == "virtiofsd has ended with status 3"
    assert (tmp_path / "virtiofsd.new").exists()


def need_virtiofsd() -> None:
    """Debian 13 has it in a package of its own."""
    try:
        virtiofsd.find()
    except ShareError as e:
        pytest.skip(str(e))


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, or user namespaces and gcc")
def test_virtiofsd_may_open_what_the_user_may(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An ordinary user's soft limit is 1024, and the guest's files are more."""
    program = tmp_path / "virtiofsd"
    program.write_text("#!/bin/sh\nulimit -Sn >&2; exit 3\n")
    program.chmod(0o755)
    monkeypatch.setattr(virtiofsd, "find", lambda: str(program))
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(512, hard), hard))
    try:
        with closing(virtiofsd.FsConnector(str(tmp_path), writable=False)) as connector:
            connector.end_s = PATIENCE
            assert connector.end() == f"virtiofsd has ended with status 3: {hard}"
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, or user namespaces and gcc")
def test_a_back_end_that_is_begun_is_used_or_ended(tmp_path: Path) -> None:
    need_virtiofsd()
    share = Share(tmp_path)
    share.begin()
    begun = share._begun
    assert begun is not None and share.connector() is begun
    with closing(begun):
        share.abandon()
        assert begun._child.poll() is None, "what is in use has been ended"
        share.begin()
        other = share._begun
        assert other is not None and other is not begun
        share.begin()
        assert other._child.poll() is not None
        last = share._begun
        share.abandon()
        assert last is not None and last._child.poll() is not None
        share.abandon()


@pytest.mark.parametrize("which", ["the directory", "the one above"])
def test_the_directory_that_was_named_is_shared(tmp_path: Path, which: str) -> None:
    """Whoever owns a directory above puts a link in its place before virtiofsd starts."""
    need_virtiofsd()
    named = tmp_path / "above" / "named"
    named.mkdir(parents=True)
    share = Share(str(named))
    if which == "the directory":
        named.rmdir()
        named.symlink_to("/etc")
    else:
        named.parent.rename(tmp_path / "moved")
        (tmp_path / "above").symlink_to("moved")
    with pytest.raises(ShareError, match="cannot be confined"):
        share.connector()
    with pytest.raises(ShareError, match="cannot be confined"):
        share.begin()
    share.abandon()


def test_accounts_of_a_tree_are_plain_files_in_the_tree(tmp_path: Path) -> None:
    """No pipe is waited for, no link leads to the host's, and only numbers are ids."""
    etc = tmp_path / "etc"
    etc.mkdir()
    line = "ann:x:{}:100::/home/ann:/bin/sh\n"
    for id_ in ("\u0661", "-1", "4294967295", "99999999999", ""):
        (etc / "passwd").write_text(line.format(id_))
        with pytest.raises(UsageError, match="no such user"):
            Root(tmp_path, user="ann")
    (etc / "passwd").write_text(line.format("1000"))
    assert Root(tmp_path, user="ann").account.startswith(b"1000\n100\n")
    (etc / "passwd").unlink()
    os.mkfifo(etc / "passwd")
    with pytest.raises(UsageError, match="no such user"):
        Root(tmp_path, user="ann")
    (etc / "passwd").unlink()
    (etc / "passwd").symlink_to("/etc/passwd")
    with pytest.raises(UsageError, match="no such user"):
        Root(tmp_path, user="root")


# --- once virtiofsd has gone ----------------------------------------------------------------------


@pytest.fixture
def memory() -> Iterator[GuestMemory]:
    with closing(GuestMemory(4 << 20)) as one:
        yield one


def request(memory: GuestMemory, ring: Ring, unique: int, *, opcode: int = LOOKUP) -> None:
    """Queue a FUSE request, with room for an answer unless it has none."""
    at = 0x10_0000 + unique * 256
    memory.write(at, struct.pack("<IIQQ", 40, opcode, unique, 1).ljust(40, b"\0"))
    memory.write(at + 64, b"\xff" * 64)
    answer = [] if opcode == FORGET else [(at + 64, 16, True), (at + 80, 48, True)]
    ring.add([(at, 40, False), *answer])


def answered(memory: GuestMemory, unique: int) -> tuple[int, ...]:
    return struct.unpack("<IiQ", memory.read(0x10_0000 + unique * 256 + 64, 16))


def test_every_request_fails(memory: GuestMemory) -> None:
    ring, urgent, dead, events = (
        Ring(memory, 64, 0x1000),
        Ring(memory, 64, 0x9000),
        DeadFs(),
        Events(),
    )
    urgent.index = 1
    with closing(ring), closing(urgent), closing(dead):
        request(memory, ring, 1)  # under way when virtiofsd died
        ring.publish(kick=False)
        dead.start(1 << 32, memory, [urgent.vring(), ring.vring()], events)
        assert wait_for(lambda: len(ring.take_used()) == 1, PATIENCE)
        assert answered(memory, 1) == (16, -errno.EIO, 1)
        for ask in (2, 3):
            request(memory, ring, ask)
        request(memory, urgent, 4, opcode=FORGET)
        ring.publish()
        urgent.publish()
        used: list[tuple[int, int]] = []
        assert wait_for(lambda: used.extend(ring.take_used()) or len(used) == 2, PATIENCE)  # type: ignore[func-returns-value]
        assert [length for _, length in used] == [16, 16]
        assert answered(memory, 3) == (16, -errno.EIO, 3)
        assert wait_for(lambda: urgent.take_used() and True, PATIENCE)
        assert ring.call_fd.drain() and not events.faults
        assert dead.stop() == [1, 3] and dead.counters() == {"refused_requests": 4}
        dead.start(1 << 32, memory, [urgent.vring(1), ring.vring(3)], events)  # a pause is over
        request(memory, ring, 5)
        ring.publish()
        assert wait_for(lambda: ring.take_used(), PATIENCE)


def test_a_guest_that_writes_nonsense_to_a_dead_file_system(memory: GuestMemory) -> None:
    random_ = random.Random(7)
    for _ in range(50):
        ring, dead, events = Ring(memory, 16, 0x1000), DeadFs(), Events()
        with closing(ring), closing(dead):
            memory.write(ring.desc, random_.randbytes(16 * 16))
            memory.write(ring.avail, random_.randbytes(4 + 2 * 16))
            dead.start(1 << 32, memory, [ring.vring()], events)
            ring.kick_fd.nudge()
            assert len(dead.stop()) == 1


@pytest.mark.parametrize("vital", [False, True])
def test_a_back_end_that_dies_is_replaced(
    path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, vital: bool
) -> None:
    """The device goes on without it, and its owner learns why; of a root with an init of its own
    the machine, too, which ends then.
    """
    share = Share(tmp_path)
    share.vital = vital
    share.number(0)
    monkeypatch.setattr(share, "connector", lambda: Connector(path))
    monkeypatch.setattr(share, "lament", lambda problems: ShareError(f"dead: {problems[-1]}"))
    with closing(Listener(path)) as listener, Fake(listener) as fake, Guest(share) as guest:
        ring = guest.start()
        memory = guest.board.memory
        request(memory, ring, 1)
        ring.publish()
        assert wait_for(lambda: guest.card.device.serving, PATIENCE)
        fake.deaf = True
        fake.drop()
        assert wait_for(lambda: ring.take_used(), PATIENCE)
        assert answered(memory, 1) == (16, -errno.EIO, 1)
        assert "vhost-user peer" in str(guest.card.broken)
        assert guest.card.report()["counters"]["disconnections"] == 1  # type: ignore[index]
        lost = ["dead: " + guest.card._path.problems[-1]] if vital else []
        # The guest is answered first, then the owner is told, in the card's thread.
        assert wait_for(lambda: guest.lost == lost, PATIENCE), guest.lost
        guest.card.set_paused(True)
        request(memory, ring, 2)
        ring.publish()
        guest.card.set_paused(False)
        assert wait_for(lambda: ring.take_used(), PATIENCE)
        guest.pci.reset()
        ring = guest.start()
        request(memory, ring, 3)
        ring.publish()
        assert wait_for(lambda: ring.take_used(), PATIENCE)
        assert fake.seen.count(spec.VHOST_USER_SET_OWNER) == 1


@pytest.mark.parametrize(
    ("error", "remedy"),
    [
        *((OSError(n, os.strerror(n)), "root of the host") for n in (errno.EPERM, errno.ENOSYS)),
        (OSError(errno.ENOENT, os.strerror(errno.ENOENT)), "name it again"),
        (OSError("/x has been replaced"), "name it again"),
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), "No space left on device$"),
    ],
)
def test_what_to_do_about_a_share_that_a_jail_cannot_have(error: OSError, remedy: str) -> None:
    def fail(user: object) -> list[int]:
        raise error

    device: Any = SimpleNamespace(socket="/x", detach=fail, attached=lambda: None)
    with ExitStack() as stack, pytest.raises(JailError, match=remedy) as told:
        take_mounts([device], (1, 1), stack, [])
    assert str(error.strerror or error) in str(told.value)
