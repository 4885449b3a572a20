"""A control group (cgroup v2, Documentation/admin-guide/cgroup-v2.rst) for the processes of a jail.

Theory of operation: all groups of pyvmm's are in one directory, ``PARENT`` below the mount point,
or below a group that systemd has delegated to whoever runs pyvmm (``Delegate=``). Groups with
limits have processes or groups, not both; so in a delegated group of its own, as of ``systemd-run
--scope``, this process moves to a leaf first, which systemd removes with the group. Where that
group has other processes, too, as in a shell's, the process moves back, and the next group is
tried, in the end the topmost one, which may have both.

A group without processes that is found there was left by a run that was killed, whose processes the
kernel has ended; the next run removes it. So that no run removes the group of another one that has
no process in it yet, each run holds an exclusive flock(2) on the directory from its look until its
first process is inside.
"""

from __future__ import annotations

import errno
import os
import stat
import time
from contextlib import suppress
from fcntl import LOCK_EX, LOCK_NB, flock

from pyvmm.errors import JailError
from pyvmm.fd import Closing, Fd

PARENT = "pyvmm"
#: What systemd writes to a group that is delegated, since v248 and before.
DELEGATED = ("user.delegate", "trusted.delegate")
#: The remedy for a group that has other processes, or not all controllers.
ALONE = "alone in a group: systemd-run --scope -p Delegate=yes pyvmm ..."
#: Microseconds in which the quota of ``cpu.max`` is spent: the kernel's own default.
PERIOD = 100_000
#: Seconds for which ``close`` waits for the kernel to notice that the last process has gone.
PATIENCE = 5.0
#: Seconds for which a run waits for others that start, each for as long as a jail's set-up takes.
LOCK_PATIENCE = 30.0


def mount_point() -> str:
    """Where cgroup v2 is mounted. :raises JailError: nowhere."""
    with open("/proc/self/mountinfo", "rb") as f:
        for line in f:
            fields, _, rest = line.partition(b" - ")
            if rest.startswith(b"cgroup2 "):
                path = fields.split()[4].decode("unicode-escape")  # octal escapes of blanks
                return path.rstrip("/")
    raise JailError(
        "the limits of --jail need cgroup v2, which is not mounted here",
        "as root: mount -t cgroup2 none /sys/fs/cgroup; or leave the limits out",
    )


def own_group(top: str) -> str:
    """The path of this process's group. :param top: where cgroup v2 is mounted."""
    with open("/proc/self/cgroup") as f:
        for line in f:
            if line.startswith("0::/"):
                return f"{top}{line[3:].rstrip()}".rstrip("/")
    return top


def places(top: str, own: str) -> list[str]:
    """The groups below which groups may be made, the best one first: those that are delegated to
    this user, of ``own`` and those above, and ``top``. In one of another user's, that user has the
    limits in hand.
    """
    found = []
    here = own
    while here.startswith(f"{top}/"):
        for name in DELEGATED:
            with suppress(OSError):  # there is none
                if os.getxattr(here, name) == b"1" and os.stat(here).st_uid == os.geteuid():
                    found.append(here)
                    break
        here = os.path.dirname(here)
    return [*found, top]


class Cgroup(Closing):
    """A group of its own, empty at first. ``close`` removes it when its processes have ended.

    :param memory: bytes, without any swap; 0: no limit. :param millicpus: thousandths of a
        processor; 0: no limit. :param pids: processes and threads; 0: no limit.
    :raises JailError: there is no cgroup v2 with these controllers, or this process may not make
        groups there.
    """

    def __init__(self, *, memory: int = 0, millicpus: int = 0, pids: int = 0) -> None:
        top = mount_point()
        own = own_group(top)
        wanted = {"memory": memory, "cpu": millicpus, "pids": pids}
        needed = [name for name, limit in wanted.items() if limit]
        _need(top, needed, "boot with systemd.unified_cgroup_hierarchy=1")
        self._parent = ""
        self._path = ""
        self._joining: Fd | None = None
        self._lock: Fd | None = None
        try:
            self._settle(top, own, needed)
            self._sweep()
            path = f"{self._parent}/{os.getpid()}-{os.urandom(4).hex()}"
            os.mkdir(path)
            self._path = path
            if memory:
                self._set("memory.max", str(memory))
                with suppress(FileNotFoundError):  # a kernel without swap
                    self._set("memory.swap.max", "0")
                self._set("memory.oom.group", "1")
            if millicpus:
                self._set("cpu.max", f"{millicpus * PERIOD // 1000} {PERIOD}")
            if pids:
                self._set("pids.max", str(pids))
            self._joining = Fd(os.open(f"{path}/cgroup.procs", os.O_WRONLY | os.O_CLOEXEC))
        except OSError as e:
            self.close()
            raise self._refused(e) from e
        except BaseException:
            self.close()
            raise

    def _refused(self, e: OSError) -> JailError:
        return JailError(
            f"cannot make a cgroup in {self._parent}: {e.strerror}",
            f"see who has it: fuser {self._parent}"
            if e.errno == errno.ETIMEDOUT
            else "run as root of the host, or leave the limits out",
        )

    def _settle(self, top: str, own: str, controllers: list[str]) -> None:
        """Have the directory of pyvmm's groups, locked, at the best place that gives controllers.

        :raises JailError: there is none; what is wrong with the best one.
        """
        first: JailError | None = None
        for base in places(top, own):
            self._parent = f"{base}/{PARENT}"
            try:
                return self._take(base, controllers, leave=own == base != top)
            except TimeoutError:
                raise  # another run of pyvmm's has this very place
            except OSError as e:
                first = first or self._refused(e)
            except JailError as e:
                first = first or e
            self.close()
        assert first is not None
        raise first

    def _take(self, base: str, controllers: list[str], *, leave: bool) -> None:
        """Have ``self._parent``, locked, with controllers for groups in it.

        :param leave: this process is in ``base``: it moves to a leaf, and back on an error.
        """
        _need(base, controllers, f"run {ALONE}")
        self._lock = _locked(self._parent)
        leaf = f"{base}/{PARENT}-{os.getpid()}"
        try:
            if leave:
                _leave(leaf)
            for group in (base, self._parent):
                self._enable(group, controllers)
        except BaseException:
            if leave:
                with suppress(OSError):
                    _write(f"{base}/cgroup.procs", "0")
                with suppress(OSError):
                    os.rmdir(leaf)
            raise

    def _enable(self, group: str, controllers: list[str]) -> None:
        on = _read(f"{group}/cgroup.subtree_control").split()
        for name in controllers:
            if name in on:
                continue
            try:
                _write(f"{group}/cgroup.subtree_control", f"+{name}")
            except OSError as e:
                raise JailError(
                    f"cgroup v2 does not give the {name} controller to {group}: {e.strerror}",
                    "run where the root of the cgroups is the host's own (a container's has "
                    f"processes of its own), or {ALONE}; or leave the limits out",
                ) from e

    def _set(self, file: str, value: str) -> None:
        _write(f"{self._path}/{file}", value)

    def _sweep(self) -> None:
        """Remove the groups of runs that were killed."""
        for entry in os.scandir(self._parent):
            if entry.is_dir(follow_symlinks=False):
                with suppress(OSError):  # it has processes: another run's
                    os.rmdir(entry.path)

    def join(self) -> None:
        """Move the calling process, of one thread, into the group; its children will be there, too.

        :raises OSError: from the kernel.
        """
        assert self._joining is not None
        os.write(self._joining.fileno(), b"0")

    def joined(self) -> None:
        """The first process is inside: let other runs look for groups without processes."""
        for fd in (self._lock, self._joining):
            if fd is not None:
                fd.close()

    def killed_for_memory(self) -> bool:
        """Whether the kernel has killed processes of the group because its memory ran out."""
        with suppress(OSError):
            for line in _read(f"{self._path}/memory.events").splitlines():
                name, _, count = line.partition(" ")
                if name == "oom_kill" and count != "0":
                    return True
        return False

    def close(self) -> None:
        """Remove the group, and the directory of pyvmm's groups if it was the last. A second call
        does nothing.
        """
        path, self._path = self._path, ""
        until = time.monotonic() + PATIENCE
        while path:
            try:
                os.rmdir(path)
            except OSError:
                if time.monotonic() < until:
                    time.sleep(0.01)
                    continue  # else the next run removes it
            path = ""
        self.joined()
        with suppress(OSError), _locked(self._parent, make=False):
            os.rmdir(self._parent)


def _need(group: str, controllers: list[str], remedy: str) -> None:
    """:raises JailError: the group has not all of these controllers."""
    there = _read(f"{group}/cgroup.controllers").split()
    if missing := [name for name in controllers if name not in there]:
        raise JailError(
            f"cgroup v2 at {group} has no {', '.join(missing)} controller",
            f"{remedy}; or leave the limits out",
        )


def _leave(leaf: str) -> None:
    """Move this process to a group, which is made if necessary. :raises OSError: it may not."""
    with suppress(FileExistsError):
        os.mkdir(leaf)
    _write(f"{leaf}/cgroup.procs", "0")


def _lock(fd: int, until: float) -> None:
    """:raises TimeoutError: somebody else has the lock until then."""
    while True:
        try:
            return flock(fd, LOCK_EX | LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= until:
                raise TimeoutError(
                    errno.ETIMEDOUT, "another process has held its lock for too long"
                ) from None
        time.sleep(0.01)


def _locked(path: str, *, make: bool = True) -> Fd:
    """The locked directory, which is made if necessary and only its owner may open.

    :raises OSError: it cannot be had.
    """
    until = time.monotonic() + LOCK_PATIENCE
    while True:
        if make:
            with suppress(FileExistsError):
                os.mkdir(path, 0o700)
        try:
            fd = Fd(os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC))
        except FileNotFoundError:
            if make:
                continue  # another run has just removed it
            raise
        try:
            if stat.S_IMODE(os.fstat(fd.fileno()).st_mode) != 0o700:
                os.fchmod(fd.fileno(), 0o700)  # else anybody could hold the lock
            _lock(fd.fileno(), until)
            there, mine = os.stat(path), os.fstat(fd.fileno())
            if (there.st_dev, there.st_ino) == (mine.st_dev, mine.st_ino):
                return fd
        except FileNotFoundError:
            pass
        except BaseException:
            fd.close()
            raise
        fd.close()


def _read(path: str) -> str:
    with open(path) as f:
        return f.read()


def _write(path: str, text: str) -> None:
    with open(path, "w") as f:
        f.write(text)
