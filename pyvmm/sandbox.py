"""What the process of ``pyvmm run`` gives up once its machine is made (docs/sandbox.md).

Capabilities go, but for the one by which root reads the kernel again at a reset; files, but for
those that the machine is made of and those of Python; devices, but for /dev/vhost-net; and system
calls, but for a list (``cext/confine.c``). What the machine may need later of all that, the helper
does (``helper``), which has been started before. For the process there is no way back.
"""

from __future__ import annotations

import os
import select
import sys
from contextlib import suppress

from pyvmm import helper
from pyvmm._ext import ffi, lib
from pyvmm.errors import SandboxError, ThreadStopped
from pyvmm.fd import EventFd
from pyvmm.threads import Thread, prepare_narrow

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from pyvmm.devopt import Device
    from pyvmm.netopt import Net

CHOICES = ("auto", "on", "off")
#: What a program needs to run: libraries, Python, /proc, the time zone.
SYSTEM = (
    "/usr",
    "/lib",
    "/lib64",
    "/proc",
    "/etc/ld.so.cache",
    "/etc/localtime",
    "/sys/devices/system/cpu",
)
DEVICES = ("/dev/vhost-net", "/dev/null")
CAP_DAC_READ_SEARCH = 2
_NO_SECCOMP = "this kernel has no filters of system calls (seccomp)"
_confined = False  # this process, for good
#: Seconds for an orderly end after a thread was stopped.
ORDERLY_S = 5 if "PYVMM_IN_TESTBED" not in os.environ else 20
#: A verdict on a busy host may take so many times ``ORDERLY_S`` (``cli.support.watchdog``).
JUDGING = 12


def longest(timeout: float) -> float:
    """The seconds that a run with this time-out may take: with a start, an orderly end, and a
    verdict on a busy host. Whoever attends the process of the run ends it then: somebody may have
    taken it over.
    """
    return timeout + (2 + JUDGING) * ORDERLY_S


def outlook(want: str) -> str:
    """The state of ``Sandbox`` that this process can come to, in so far as the kernel has told it.

    :param want: of ``CHOICES``.
    :raises SandboxError: ``on``, and this process cannot be confined wholly.
    """
    if want == "off":
        return "off"
    why = _why_not()
    without = "" if why else _why_no_files()
    if want == "on" and (why or without):
        raise SandboxError(f"--sandbox on: {why or without}", "use --sandbox auto, or off")
    if why:
        return f"off: {why}"
    return f"on, but for files: {without}" if without else "on"


class Sandbox:
    """The confinement of this process, for one machine.

    :param want: of ``CHOICES``. :param nets, devices: of the machine.
    :ivar state: ``on`` or ``off``, and for ``auto`` the reason if it is not whole; for people.
    :raises SandboxError: ``on``, and this process cannot be confined.
    """

    def __init__(self, want: str, nets: Sequence[Net], devices: Sequence[Device]) -> None:
        self._want, self._nets, self._devices = want, nets, devices
        self._wake: EventFd | None = None
        self._closed = False
        self.state = outlook(want)
        self.wanted = self.state.startswith("on")
        self._own = None
        if self.wanted and helper.current() is None:
            self._own = helper.start()

    def enter(
        self, files: Iterable[str], removable: Iterable[str], stopped: Callable[[str, str], None]
    ) -> None:
        """Confine this process, for good. If the kernel refuses in spite of what it has said of
        itself, ``state`` says so, or with ``on`` an error.

        :param files: files and directories that it may read. :param removable: files that it will
            remove.
        :param stopped: is told, in a thread of its own, the name of the thread that was stopped,
            and why.
        :raises SandboxError: the kernel refuses ``on``. The process may be confined in part.
        """
        global _confined
        assert self.wanted and self._wake is None
        _confined = True
        helper.permit_start(helper.BACKEND)
        for net in self._nets:
            if net.way_out:
                words = [str(int(net.loopback)), *map(str, net.forwards)]
                helper.permit_start(helper.USER_NETWORK, *words)
            if net.socket:
                _permit_socket(net.socket, listens=net.server)
            if net.tap:
                from pyvmm.hostnet.packets import permit

                helper.permit("tap", net.tap)
                permit(net.tap)
            if net.bridge:
                helper.permit("interface", net.bridge)
            if net.macvtap:
                helper.permit("macvtap", net.macvtap)
            if "vhost-vdpa" in (net.mode, *net.switchable):
                _permit_vdpa(net.device)
        for device in self._devices:
            if device.socket:
                _permit_socket(device.socket, listens=device.server)
        helper.permit("remove", *removable)
        files = list(files)
        helper.permit("open", *files)
        helper.seal()
        sys.dont_write_bytecode = True
        self._wake = event = EventFd()
        keep = 1 << CAP_DAC_READ_SEARCH & _capabilities()
        readable = [ffi.new("char[]", os.fsencode(p)) for p in (*SYSTEM, *own_places(), *files)]
        devices = [ffi.new("char[]", os.fsencode(p)) for p in DEVICES]
        done = lib.pv_confine_machine(
            readable,
            len(readable),
            devices,
            len(devices),
            keep,
            event.fileno(),
            ThreadStopped.exit_code,
            ORDERLY_S,
        )
        if done < 0 and self._want == "auto":
            self.state = f"on in part: {os.strerror(-done)}"
        else:
            _check(done)
        prepare_narrow()
        _watch(event, stopped)

    def hold(self, held: bool) -> None:
        """Whether the calling thread has the end of the machine in hand, and no thread that was
        stopped can hinder it: then it may take longer than ``ORDERLY_S``, which begin anew with
        False. Nothing after ``close``.
        """
        if self._wake is not None and not self._closed:
            lib.pv_machine_hold(held)

    def close(self) -> None:
        """End a helper of our own. The process stays confined. A second call does nothing."""
        self.hold(True)  # for good: the process is the caller's again
        self._closed = True
        if self._wake is not None:
            self._wake.signal()  # not closed: the handler of a stopped thread may write to it
        if self._own is not None:
            self._own.close()


def confine_backend(
    want: str, names: Sequence[tuple[str, str]], stopped: Callable[[str, str], None]
) -> str:
    """Confine this process, a vhost-user back-end that has its descriptors and a helper, for good.

    :param want: ``auto`` or ``on``.
    :param names: operations of the helper and the names that it may use later.
    :param stopped: as for ``Sandbox.enter``.
    :returns: why the process is not confined, or not wholly; empty if it is.
    :raises SandboxError: ``on``, and the kernel refuses. The process may be confined in part.
    """
    without = _why_no_files() if lib.pv_has_seccomp() else _NO_SECCOMP
    if want == "on" and without:
        raise SandboxError(f"--sandbox on: {without}", "use --sandbox auto, or off")
    if without == _NO_SECCOMP:
        return without
    for operation, name in names:
        helper.permit(operation, name)
    helper.seal()
    event = EventFd()
    done = lib.pv_confine_backend(event.fileno(), ThreadStopped.exit_code, ORDERLY_S)
    if done < 0 and want == "auto":
        without = f"in part: {os.strerror(-done)}"
    else:
        _check(done)
    _watch(event, stopped)
    return without


def _permit_socket(path: str, *, listens: bool) -> None:
    helper.permit("listen" if listens else "connect", path)
    if listens:  # whoever connects removes nothing
        helper.permit("remove", path)


def _permit_vdpa(device: str) -> None:
    """:param device: of ``Net``; empty for one of pyvmm's own."""
    if device:
        from pyvmm.datapath.vdpa_device import raise_memlock

        helper.permit("vdpa", device)
        raise_memlock()  # now, while this process may
    else:
        helper.permit_start(helper.VDUSE_KEEPER)
        helper.permit("vduse", "")


def _check(done: int) -> None:
    if done < 0:
        raise SandboxError(
            f"this process cannot be confined: {os.strerror(-done)}", "use --sandbox off"
        )


def _watch(event: EventFd, stopped: Callable[[str, str], None]) -> None:
    """Wait in a thread for the eventfd, and tell which thread was stopped, if there is one."""

    def watch() -> None:
        poll = select.poll()
        poll.register(event.fileno(), select.POLLIN)
        poll.poll()
        name = ffi.new("char[16]")
        call = lib.pv_machine_stopped(name)
        if call < 0:
            return  # ``Sandbox.close``
        thread = ffi.string(name).decode(errors="replace")
        known = lib.pv_call_name(call)
        asked = f"{ffi.string(known).decode()}()" if known else f"system call {call}"
        stopped(thread, f"{thread} asked for {asked}, which it may not have")

    Thread(target=watch, name="sandbox", daemon=True).start()


def _why_not() -> str:
    """Why this process cannot be confined; empty if it can."""
    if not lib.pv_has_seccomp():
        return _NO_SECCOMP
    if _confined:
        return "this process is confined already, for another machine"
    return ""


def _why_no_files() -> str:
    return "" if lib.pv_landlock_abi() else "this kernel has no Landlock"


def own_places() -> list[str]:
    """Where Python and pyvmm have their modules: absolute paths. Never the whole of a file system,
    of the user's home or of the current directory, and not the script's directory, where its owner
    has much else.
    """
    places = [*sys.path] if sys.flags.safe_path else sys.path[1:]
    for prefix in {sys.prefix, sys.base_prefix, sys.exec_prefix}:
        places += [f"{prefix}/lib", f"{prefix}/lib64"]
    private = _with_parents(os.path.realpath(os.path.expanduser("~")))
    with suppress(OSError):  # it has been removed
        private |= _with_parents(os.path.realpath(os.getcwd()))
    # Not by their names: to follow the links in all of them takes a hundred calls of the system.
    places = [p for p in dict.fromkeys(places) if p.startswith("/") and not _inodes(p) & private]
    return [os.path.dirname(os.path.abspath(__file__)), *places]


def _with_parents(path: str) -> set[tuple[int, int]]:
    """``_inodes`` of a directory and of all in which that is, up to the root."""
    found = _inodes(path)
    while path != "/":
        path = os.path.dirname(path)
        found |= _inodes(path)
    return found


def _inodes(path: str) -> set[tuple[int, int]]:
    """Device and inode of a file, links followed; nothing if there is none."""
    try:
        found = os.stat(path)
    except OSError:
        return set()
    return {(found.st_dev, found.st_ino)}


def _capabilities() -> int:
    """The capabilities that this thread may use, as bits."""
    with open("/proc/thread-self/status", "rb") as f:
        for line in f:
            if line.startswith(b"CapPrm:"):
                return int(line.split()[1], 16)
    return 0
