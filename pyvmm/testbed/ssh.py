"""L1 as a part of another machine, which the user's own ssh client reaches: ``ssh://NAME``.

The emulator's place is taken by one ssh process: its stdin and stdout are the agent's port. The
agent runs there as process 1 of namespaces of its own. Its root directory is a tmpfs that only
these namespaces see, with the archives that an Intel testbed has in its memory (``layers``), and
with the other machine's /dev and /sys; its network has ``lo`` only. Nothing is written to a disk
there. When the agent ends, the kernel kills every process in there and frees the files. The agent
ends with the connection.

Only a shell, dd, mount and unshare have to be there. Whoever is no root there becomes root of a
user namespace, and needs permission for /dev/kvm.
"""

from __future__ import annotations

import os
import re
import tempfile

from pyvmm.errors import TestbedError
from pyvmm.programs import install, program, which
from pyvmm.testbed import assets, layers
from pyvmm.testbed.machine import Machine, Port, python

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Any

SCHEME = "ssh://"
ADDRESS = re.compile(
    r"ssh://(?:(?P<user>\w[\w.+-]*)@)?"
    r"(?P<name>\w[\w.-]*|\[[0-9a-fA-F:.]+(?:%\w+)?\])(?::(?P<port>\d{1,5}))?/?"
)
BLOCK = 512  # bytes; the sizes of archives are multiples of them
CHUNK = 256 << 10  # bytes that go to ssh at once
#: Seconds without a frame after which the agent there ends. The supervisor asks it every second.
SILENCE = 120
# BatchMode: nobody can answer a question. The command that the user may have configured for this
# host must not take the place of ours. A connection that the user shares is used, but ours is not
# left behind for others.
OPTIONS = (
    *("-T", "-x", "-a", "-e", "none"),
    *("-o", "BatchMode=yes", "-o", "RemoteCommand=none", "-o", "ControlMaster=no"),
    *("-o", "ClearAllForwardings=yes", "-o", "PermitLocalCommand=no"),
    *("-o", "ConnectTimeout=20", "-o", "ServerAliveInterval=10", "-o", "ServerAliveCountMax=3"),
)
# Any login shell takes this one line. ``fullblock``: dd must neither take less nor more.
FIRST = "exec sh -c 'eval \"$(dd bs={size} count=1 iflag=fullblock 2>/dev/null)\"'"
CHECKS = """\
die() {{ echo "pyvmm: $*" >&2; exit 113; }}
[ "$(uname -sm)" = "Linux x86_64" ] || die "it has no Linux for x86-64 but $(uname -sm)"
[ -e /dev/kvm ] || die "there is no /dev/kvm"
[ -r /dev/kvm ] && [ -w /dev/kvm ] || die "/dev/kvm is forbidden for $(id -un)"
for p in unshare mount; do command -v $p >/dev/null || die "there is no program $p"; done
u=; [ "$(id -u)" = 0 ] || u="-U -r"
n="$u -m -p -f -n -i"
unshare $n mount -t tmpfs pyvmm /tmp 2>/dev/null || die "$(id -un) may not make namespaces"
exec unshare $n sh -c "$(dd bs={size} count=1 iflag=fullblock 2>/dev/null)" sh {words}
"""
# Runs as process 1. Its arguments are the size of a busybox in bytes, the interpreter, and the
# archives' sizes in blocks.
ENTER = """\
die() { echo "pyvmm: $*" >&2; exit 113; }
mount -t tmpfs -o mode=755 pyvmm /tmp && cd /tmp || die "a tmpfs cannot be mounted"
dd bs=$1 count=1 iflag=fullblock of=busybox 2>/dev/null && chmod 755 busybox ||
	die "its memory is full"
b=/tmp/busybox p=$2; shift 2
for s; do
	$b dd bs=512 count=$s iflag=fullblock 2>/dev/null |
		{ $b cpio -i -d -u 2>.e || $b cp .e .bad; $b cat >/dev/null; }
done
[ ! -e .bad ] || die "the files cannot be unpacked: $($b tail -n 1 .bad)"
mounts() {
	$b mount -o rbind /dev dev && $b mount -o rbind /sys sys && $b mount -t proc proc proc &&
		$b mount -t tmpfs -o mode=1777 shm dev/shm &&
		$b mount -t devpts -o newinstance,ptmxmode=666 devpts dev/pts
}
mounts 2>.e || die "a directory cannot be mounted: $($b tail -n 1 .e)"
$b ip link set lo up
$b mkdir .old && $b pivot_root . .old && cd / || die "pivot_root fails"
b=/usr/bin/busybox
$b umount -l /.old; $b rmdir /.old; $b rm -f /busybox /.e
exec "$p" -I -S -B /run/pyvmm/agent.pyc -
"""
#: Remedies by a part of the message.
REMEDIES = (
    ("there is no /dev/kvm", "load kvm_intel or kvm_amd there, or use another machine"),
    ("/dev/kvm is forbidden", "there, as root: adduser USER kvm"),
    ("may not make namespaces", "log in as root, or allow user namespaces there"),
    ("there is no program", "install util-linux there"),
    ("Permission denied", "let your key in there: ssh-copy-id; and load it: ssh-add"),
    ("Host key verification failed", "connect once by hand, so that you can check the key"),
    ("resolve hostname", "is the name right?"),
)


class Address:
    """Where a machine is.

    :param text: ``ssh://[USER@]NAME[:PORT]``; NAME may be an alias of the user's ssh configuration.
    :raises TestbedError: it is nothing like that.
    """

    def __init__(self, text: str) -> None:
        found = ADDRESS.fullmatch(text)
        if found is None or int(found["port"] or 22) not in range(1, 65536):
            raise TestbedError(f"--host {text!r} is no address", "write ssh://[USER@]NAME[:PORT]")
        self.name = found["name"].strip("[]")
        self.argv = [*(["-l", found["user"]] if found["user"] else [])]
        if found["port"]:
            self.argv += ["-p", found["port"]]
        self.argv += ["--", self.name]


class Ssh(Machine):
    """The ssh client, and the agent at its other end."""

    BOOT_TIMEOUT = 60.0  # while files travel, each piece of them is a sign of life
    WATCHDOG = 60.0
    MEMORY = 0
    SHARES = False

    def __init__(self, options: dict[str, Any], say: Callable[[str], None]) -> None:
        super().__init__(options, say)
        lacks = self.missing()
        if lacks:
            raise TestbedError(f"{lacks[0][0]} is missing", lacks[0][1])
        self.address = Address(options["host"])
        self._release = ""
        self._ours: list[int] = []
        self._top = ""

    @staticmethod
    def missing() -> list[tuple[str, str]]:
        """The ssh client, and what travels."""
        lacks = [] if which("ssh") else [("ssh", install("openssh-client"))]
        if not assets.busybox():
            lacks.append(("a static busybox", install("busybox-static")))
        return lacks

    @staticmethod
    def setup(progress: Callable[[str], None], version: str | None = None) -> None:
        """Make the lower layers."""
        lacks = Ssh.missing()
        if lacks:
            raise TestbedError(f"{lacks[0][0]} is missing", lacks[0][1])
        layers.lower(None, progress)

    @staticmethod
    def prepare(progress: Callable[[str], None], version: str | None) -> None:
        """The lower layers."""
        layers.lower(None, progress)

    def start(self) -> None:
        """Start ssh, and let the files travel."""

        busybox = assets.busybox()
        with tempfile.TemporaryDirectory() as work:
            add = [*self.options["add"], *(f"{d}:{d}" for d in self.options["writable"])]
            archives = layers.archives(
                None, add, self.options["directories"], f"{work}/top", self.say
            )
            files = [os.open(path, os.O_RDONLY | os.O_CLOEXEC) for path in (busybox, *archives)]
        sizes = [os.fstat(fd).st_size for fd in files]
        blocks = " ".join(str(size // BLOCK) for size in sizes[1:])
        enter = ENTER.encode()
        checks = CHECKS.format(
            size=len(enter), words=f"{sizes[0]} {layers.quoted(python())} {blocks}"
        ).encode()
        stdin, stdout, stderr = os.pipe(), os.pipe(), os.pipe()
        theirs = stdin[0], stdout[1], stderr[1]
        mine = stdin[1], stdout[0], stderr[0]
        for fd in mine:
            os.set_blocking(fd, False)
        command = FIRST.format(size=len(checks))
        argv = [program("ssh"), *OPTIONS, *self.address.argv, command]
        self.spawn("ssh", argv, stdio=theirs)
        for fd in theirs:
            os.close(fd)
        self.port = Upload(mine[1], mine[0], checks + enter, files)
        self.screen = mine[2]
        self.console = -1

    def started(self, hello: str) -> None:
        """The machine's own facts."""
        words = hello.split()
        good = len(words) == 4 and words[2].isdecimal() and words[3].isdecimal()
        if good and words[1].isprintable():  # it will be on the user's terminal
            self._release, self.cpus, self.memory = words[1], int(words[2]), int(words[3])

    @property
    def release(self) -> str:
        """The version of the kernel there; empty until the agent has told."""
        return self._release

    def intent(self) -> str:
        """Where the machine is."""
        return f"connecting to {self.options['host']}"

    def emulator(self) -> str:
        """It has none."""
        return str(self.options["host"])

    def facts(self) -> dict[str, Any]:
        """Its address. Which processor it has is told by ``pyvmm doctor`` there."""
        return {"host": self.options["host"], "cpu": None}

    def config(self) -> dict[str, Any]:
        """Nothing there is changed."""
        return {"binds": [], "files": [], "silence": SILENCE}

    def reason(self, status: int, said: str) -> tuple[str, str] | None:
        """What ssh or our scripts have said last."""
        lines = [line.strip() for line in said.splitlines() if line.strip()]
        told = [line.removeprefix("pyvmm: ") for line in lines if line.startswith("pyvmm: ")]
        last = (told or lines or [f"ssh ended with {status}, and said nothing"])[-1].rstrip(".")
        hint = next((remedy for part, remedy in REMEDIES if part in last), "")
        if self._release:
            return f"the connection to {self.address.name} has ended: {last}", hint
        if not hint:
            hint = f"does this work? ssh -o BatchMode=yes {' '.join(self.address.argv)} true"
        return f"{self.address.name}: {last}", hint


class Upload(Port):
    """The agent's port, through which its files go first.

    :param head: what goes before the files. :param files: their descriptors; taken.
    """

    def __init__(self, source: int, sink: int, head: bytes, files: Sequence[int]) -> None:
        super().__init__(source, sink)
        self.busy = True
        self._piece = memoryview(head)
        self._files = list(files)

    def prelude(self) -> bool:
        """Send what the pipe to ssh takes."""
        some = False
        while True:
            while not self._piece:
                if not self._files:
                    self.busy = False
                    return True
                self._piece = memoryview(os.read(self._files[0], CHUNK))
                if not self._piece:
                    os.close(self._files.pop(0))
            try:
                self._piece = self._piece[os.write(self.sink, self._piece) :]
                some = True
            except BlockingIOError:
                return some
