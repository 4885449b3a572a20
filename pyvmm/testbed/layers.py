"""What L1 has in its memory if it does not see this machine's files: its initramfs, as several
archives one behind the other.

The lower layers change seldom and are kept in the cache: programs, Python with the packages that
pyvmm needs, pyvmm itself. The top layer is made for each testbed: guest images, and what the user
adds. Everything has the path that it has on this machine. Python's library and the packages travel
as bytecode only, because L1 would take seconds to compile them; pyvmm travels as source, too.
"""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import subprocess
import sys
import sysconfig
import tempfile
from importlib import metadata
from pathlib import Path

from pyvmm.errors import TestbedError
from pyvmm.host.paths import cache_name, cache_root
from pyvmm.images.additions import Additions
from pyvmm.images.cpio import Archive, HostFile
from pyvmm.images.elf import LIBRARY_DIRS, libraries
from pyvmm.images.kernel import Modules
from pyvmm.programs import which
from pyvmm.testbed import assets

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

#: Changes whenever this module puts other things into a layer.
FORMAT = 2
#: Modules of L1's kernel, in the order in which they are loaded, after those that they need.
MODULES = ["kvm_intel", "tun", "vhost_net"]
#: Programs that pyvmm and its tests run in L1, as far as this machine has them.
PROGRAMS = ("ip", "ping", "iperf3", "ethtool", "setpriv", "unshare", "nsenter")
#: Packages that travel with all that they depend on, if they are here: pyvmm's own dependencies,
#: and pytest for tests.
PACKAGES = (
    *("cffi", "pyelftools", "psutil", "argcomplete", "qemu.qmp", "rich", "jinja2", "jsonschema"),
    *("lz4", "zstandard", "pytest", "hypothesis"),
)
#: Parts of Python's library that no program of pyvmm's needs.
UNUSED = frozenset(
    ("test", "tests", "idlelib", "tkinter", "lib2to3", "ensurepip", "turtledemo", "pydoc_data",
     "venv", "msilib", "curses", "sqlite3", "dbm", "distutils", "site-packages", "dist-packages",
     "__pycache__")
)  # fmt: skip
#: Files of a guest image that ``pyvmm run`` reads.
IMAGE_FILES = ("vmlinux", "initrd", "image.json")
IMAGES = ("default", "tiny")
#: Directories of a merged /usr: links, so that a program is found by both of its names.
MERGED = ("bin", "sbin", "lib", "lib64")
#: As many symbolic links does Linux follow in a path (path_resolution(7)).
LINKS = 40
#: glibc, its dynamic linker, and what it loads when a thread is cancelled.
GLIBC = ("libc.so.6", "ld-linux-x86-64.so.2", "libgcc_s.so.1")

# The script that busybox runs as /init. The kernel's messages go to the third serial port without
# an interrupt; the first two belong to the agent. At its end it executes the agent.
INIT = """\
#!/usr/bin/busybox sh
b=/usr/bin/busybox r=/run/pyvmm
$b mount -t proc proc /proc; $b mount -t sysfs sys /sys; $b mount -t devtmpfs dev /dev
for k in $($b cat /proc/cmdline); do case $k in l1kvm=*) o=${k#l1kvm=};; esac; done
for m in $($b cat $r/modules); do
	a=; [ $m != kvm_intel ] || a=$($b echo $o | $b tr , ' ')
	$b insmod $r/$m.ko $a || $b echo "L1: cannot load $m" >/dev/kmsg
done
$b rm $r/*.ko
$b touch $r/loaded
n=
""" + assets.MOUNTS + """\
exec @PYTHON@ -I -S -B $r/agent.pyc /dev/ttyS1 /dev/ttyS0 >/dev/kmsg 2>&1
"""  # fmt: skip


def archives(
    kernel: assets.Kernel | None,
    add: Sequence[str],
    directories: Iterable[str],
    top: str,
    progress: Callable[[str], None],
) -> list[str]:
    """The paths of the archives.

    :param kernel: of an L1 that boots; None for one that shares its kernel with another machine.
    :param add: what the user adds, each as ``FILE|DIR[:PATH]``.
    :param directories: directories that exist in L1, empty if nothing travels in them. By whatever
        links this machine gets there, L1 does.
    :param top: the path of the top layer, a file that is written.
    :raises PyvmmError: something is missing, or a file cannot be read.
    """
    beneath = lower(kernel, progress)
    archive = Archive()
    for path in ("/tmp", "/var/tmp"):
        archive.directory(path, 0o1777)
    for path in (*directories, cache_name()):
        _reach(archive, path)
    _images(archive)
    write(archive, top)
    beneath.append(top)
    if not add:
        return beneath
    write(_added(add, beneath, progress), f"{top}.added")
    return [*beneath, f"{top}.added"]


def later(add: Sequence[str], directories: Iterable[str], path: str) -> None:
    """Write an archive of what the user adds to an L1 without a kernel of its own, which runs.

    :param add: as in ``archives``; ``directories`` likewise. :param path: of a new file.
    :raises PyvmmError: something is missing, or a file cannot be read.
    """
    archive = _added(add, lower(None, lambda line: None), lambda line: None)
    for directory in directories:
        _reach(archive, directory)
    write(archive, path)


def _added(add: Sequence[str], beneath: Sequence[str], progress: Callable[[str], None]) -> Archive:
    added = Additions([_absolute(text) for text in add], None, beneath, str)
    for note in added.notes:
        progress(note)
    return added.archive


def quoted(path: str) -> str:
    """The path in L1 of a program of this machine, as a word for a shell."""
    return shlex.quote(_place(path))


def lower(kernel: assets.Kernel | None, progress: Callable[[str], None]) -> list[str]:
    """The paths of the lower layers, which are made if necessary.

    :param kernel: as in ``archives``.
    """
    if kernel is None:
        sources = map(assets.content, assets.agent_sources())
        system = _cached("agent", _agent, progress, sources)
    else:
        system = _cached(
            kernel.version,
            lambda: _system(kernel),
            progress,
            [
                INIT,
                MODULES,
                os.path.realpath(sys.executable),
                assets.stamp(kernel.image),
                *map(assets.content, assets.agent_sources()),
            ],
        )
    python = f"python-{sys.version_info[0]}.{sys.version_info[1]}"
    return [
        _cached(python, _python, progress, _python_key()),
        _cached(
            "pyvmm",
            _pyvmm,
            progress,
            [sysconfig.get_path("purelib"), *map(assets.stamp, _files(_package(), ()))],
        ),
        system,
    ]


def _absolute(text: str) -> str:
    """An addition with the place where it goes: its own if the user gives none."""
    if ":/" in text:
        return text
    path = os.path.abspath(text)
    return f"{path}:{path}"


def _cached(
    name: str,
    make: Callable[[], Archive],
    progress: Callable[[str], None],
    inputs: Iterable[object],
) -> str:
    """The path of an archive in the cache. It is made if necessary."""
    directory = assets.kept(
        f"layer-{name}",
        [FORMAT, sys.version, *inputs],
        lambda into: write(make(), f"{into}/archive"),
        progress,
    )
    return f"{directory}/archive"


def write(archive: Archive, path: str) -> None:
    """Write an archive to a file; its files of the host are read now.

    :raises TestbedError: one of them cannot be read, or has changed.
    """
    with open(path, "wb") as f:
        for at, piece in archive.pieces():
            f.seek(at)
            if isinstance(piece, bytes):
                f.write(piece)
                continue
            try:
                with open(piece.path, "rb") as source:
                    data = source.read()
            except OSError as e:
                raise TestbedError(f"cannot read {piece.path}: {e.strerror}") from e
            if len(data) != piece.size:
                raise TestbedError(f"{piece.path} has changed meanwhile", "try again")
            f.write(data)
        f.truncate(archive.size)


def _place(path: str) -> str:
    """A path in L1, whose /usr is merged."""
    first, slash, rest = path.lstrip("/").partition("/")
    return f"/usr/{first}/{rest}" if slash and first in MERGED else path


def _reach(archive: Archive, path: str) -> None:
    """A directory, and the symbolic links by which this machine gets there: files travel to where
    they really are, and commands name them as the user does.
    """
    at, todo, links = "/", path.split("/"), 0
    while todo:
        step = os.path.normpath(os.path.join(at, todo.pop(0)))
        if not os.path.islink(step) or step.lstrip("/") in MERGED:
            at = step
            continue
        links += 1
        if links > LINKS:  # a loop: nobody gets there
            return
        target = os.readlink(step)
        archive.symlink(_place(step), target)
        at = "/" if target.startswith("/") else at
        todo = [*target.split("/"), *todo]
    place = _place(at)
    if place.strip("/") not in ("", *MERGED, *archive.entries):
        archive.directory(place)


# --- the layers -----------------------------------------------------------------------------------


def _agent() -> Archive:
    """The agent, which has no modules to wait for."""
    archive = Archive()
    for name, data in assets.agent_files():
        archive.file(f"/run/pyvmm/{name}", data)
    archive.file("/run/pyvmm/loaded", b"")
    return archive


def _system(kernel: assets.Kernel) -> Archive:
    """init, the modules and the agent."""
    archive = Archive()
    init = INIT.replace("@PYTHON@", shlex.quote(os.path.realpath(sys.executable)))
    archive.file("/init", init.encode(), 0o755)
    modules = Modules(Path(f"{kernel.root}/lib/modules/{kernel.version}")).closure(MODULES)
    for name, (_, _, data) in modules.items():
        archive.file(f"/run/pyvmm/{name}.ko", data)
    archive.file("/run/pyvmm/modules", "".join(f"{name}\n" for name in modules).encode())
    for name, data in assets.agent_files():
        archive.file(f"/run/pyvmm/{name}", data)
    return archive


def _python() -> Archive:
    """busybox, programs, and Python with its library and packages."""
    archive = Archive()
    for path in MERGED:
        archive.directory(f"/usr/{path}")
        archive.symlink(f"/{path}", f"usr/{path}")
    for path in ("/proc", "/sys", "/dev", "/root", "/etc", "/var", "/run/lock", "/home"):
        archive.directory(path)
    archive.file("/etc/passwd", b"root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534::/:/bin/sh\n")
    archive.file("/etc/group", b"root:x:0:\nnogroup:x:65534:\n")
    archive.file("/etc/hosts", b"127.0.0.1 localhost l1\n")
    busybox = assets.busybox()
    listed = subprocess.run([busybox, "--list"], capture_output=True, text=True).stdout.split()
    for name in listed:
        archive.symlink(f"/usr/bin/{name}", "busybox")
    archive.host_file("/usr/bin/busybox", HostFile(busybox))
    archive.symlink("/run/pyvmm/busybox", "/usr/bin/busybox")
    for name in ("id", "env"):  # scripts name their interpreter by this path
        if name not in listed:
            raise TestbedError(f"busybox has no {name}", "install Debian's busybox-static")
    interpreter = os.path.realpath(sys.executable)
    needs = [interpreter]
    for name, real in _programs().items():
        archive.host_file(f"/usr/bin/{name}", HostFile(real))
        needs.append(real)
    _interpreter(archive, interpreter)
    with tempfile.TemporaryDirectory() as scratch:
        compiler = _Compiler(scratch)
        for path in _python_inputs():
            if path.endswith(".py"):
                archive.file(_place(f"{path}c"), compiler.bytecode(path))
            elif path.endswith(".so"):
                archive.file(_place(path), compiler.stripped(path), 0o755)
                needs.append(path)
            else:
                archive.host_file(_place(path), HostFile(path))
    _libraries(archive, needs)
    return archive


def _interpreter(archive: Archive, interpreter: str) -> None:
    """Python by all of its names, and the command pyvmm."""
    archive.host_file(_place(interpreter), HostFile(interpreter))
    names = {"/usr/bin/python3", sys.executable}
    for name in names - {interpreter}:
        archive.symlink(_place(name), interpreter)
    config = f"{sys.prefix}/pyvenv.cfg"
    if os.path.exists(config):
        archive.host_file(_place(config), HostFile(os.path.realpath(config)))
    script = f"{_first(sys.executable)}import sys\nfrom pyvmm.cli import main\nsys.exit(main())\n"
    for directory in {"/usr/local/bin", os.path.dirname(sys.executable)}:
        archive.file(_place(f"{directory}/pyvmm"), script.encode(), 0o755)


def _first(interpreter: str) -> str:
    """The beginning of a script for an interpreter, as pip writes it: after ``#!``, Linux takes no
    path with blanks, and none of more than 255 bytes. To Python, the other lines are a string.
    """
    if any(c.isspace() for c in interpreter) or len(os.fsencode(interpreter)) > 250:
        return f"#!/bin/sh\n'''exec' {shlex.quote(interpreter)} \"$0\" \"$@\"\n' '''\n"
    return f"#!{interpreter}\n"


def _libraries(archive: Archive, needs: Iterable[str]) -> None:
    """The shared libraries that the programs ``needs`` need."""
    root = Path("/")
    found: dict[str, Path] = {}
    for path in needs:
        found.update(libraries(Path(path), [root]))
    for directory in LIBRARY_DIRS:  # glibc loads it when a thread is cancelled
        path = f"/{directory}/libgcc_s.so.1"
        if os.path.exists(path):
            found.setdefault("/lib/x86_64-linux-gnu/libgcc_s.so.1", Path(path))
    for where, source in found.items():
        real = os.path.realpath(source)
        archive.host_file(_place(where), HostFile(real))


def _pyvmm() -> Archive:
    """This package, wherever it is, and the line by which Python finds it."""
    archive = Archive()
    package = _package()
    tag = sys.implementation.cache_tag
    with tempfile.TemporaryDirectory() as scratch:
        compiler = _Compiler(scratch)
        for path in _files(package, ()):
            if path.endswith("/_ext.c"):
                continue
            archive.host_file(_place(path), HostFile(path))
            if path.endswith(".py"):
                directory, name = os.path.split(path)
                bytecode = f"{directory}/__pycache__/{name[:-3]}.{tag}.pyc"
                archive.file(_place(bytecode), compiler.bytecode(path))
    site = sysconfig.get_path("purelib")
    parent = os.path.dirname(package)
    if parent != site:
        archive.file(_place(f"{site}/pyvmm.pth"), f"{parent}\n".encode())
    for name in os.listdir(site):
        if name.startswith("pyvmm-") and name.endswith(".dist-info"):
            for path in _files(f"{site}/{name}", ()):
                archive.host_file(_place(path), HostFile(path))
    libraries_of = [path for path in _files(package, ()) if path.endswith(".so")]
    _libraries(archive, libraries_of)
    return archive


def _images(archive: Archive) -> None:
    """The guest images that are built."""
    base = f"{cache_root()}/images"
    for name in IMAGES:
        link = f"{base}/{name}"
        if not os.path.islink(link):
            continue
        archive.file(f"{base}/.lock", b"")
        archive.symlink(link, os.readlink(link))
        for part in IMAGE_FILES:
            path = f"{os.path.realpath(link)}/{part}"
            if os.path.exists(path):
                archive.host_file(path, HostFile(path))


# --- their inputs ---------------------------------------------------------------------------------


def _package() -> str:
    """The directory of this package."""
    return os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def _python_key() -> list[object]:
    """What decides on the contents of the layer with programs and Python. Of the shared libraries,
    it has those of glibc, which are the same for all programs.
    """
    interpreter = sys.executable
    libraries = [f"/{directory}/{name}" for directory in LIBRARY_DIRS for name in GLIBC]
    files = [
        *map(os.path.realpath, (interpreter, assets.busybox())),
        *(os.path.realpath(path) for path in libraries if os.path.exists(path)),
        *_python_inputs(),
    ]
    programs = [(name, assets.stamp(real)) for name, real in _programs().items()]
    constants = [PROGRAMS, PACKAGES, sorted(UNUSED), MERGED, GLIBC]
    return [sys.prefix, interpreter, constants, programs, *map(assets.stamp, files)]


def _programs() -> dict[str, str]:
    """The paths of ``PROGRAMS`` that this machine has, without symbolic links."""
    found = {name: which(name, "/usr/sbin:/sbin") for name in PROGRAMS}
    return {name: os.path.realpath(path) for name, path in found.items() if path}


def _python_inputs() -> Iterator[str]:
    """The files of Python's library and of the packages."""
    yield from _files(sysconfig.get_path("stdlib"), UNUSED)
    for directory in _distributions():
        yield from directory


def _distributions() -> Iterator[list[str]]:
    """The files of each package in ``PACKAGES``, and of those that they need."""
    left, seen = list(PACKAGES), set()
    while left:
        name = re.sub(r"[-_.]+", "-", left.pop()).lower()
        if name in seen:
            continue
        seen.add(name)
        try:
            found = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            continue  # optional, or for another system
        yield sorted(
            os.path.normpath(str(found.locate_file(path)))
            for path in found.files or ()
            if not str(path).startswith("..")
            and "__pycache__" not in str(path)
            and os.path.exists(str(found.locate_file(path)))
        )
        for line in found.requires or ():
            needed = re.match(r"[\w.-]+", line)
            if needed and "extra ==" not in line:
                left.append(needed[0])


def _files(top: str, without: Iterable[str]) -> Iterator[str]:
    """The files below a directory, without hidden ones and bytecode."""
    for directory, names, files in os.walk(top):
        names[:] = sorted(
            name
            for name in names
            if name not in without
            and name != "__pycache__"
            and not name.startswith(("config-", "."))
        )
        for name in sorted(files):
            if not name.startswith(".") and not name.endswith(".pyc"):
                yield f"{directory}/{name}"


class _Compiler:
    """Makes the files of L1 that are not copies.

    :param scratch: a directory for its own use.
    """

    def __init__(self, scratch: str) -> None:
        self._work = f"{scratch}/work"
        self._strip = which("strip")

    def bytecode(self, path: str) -> bytes:
        """A module as bytecode that Python never compares with its source."""
        import py_compile

        try:
            py_compile.compile(
                path,
                self._work,
                dfile=path,
                doraise=True,
                invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH,
            )
        except py_compile.PyCompileError:
            return b""  # a template or a test of a compiler, which nobody imports
        return assets.content(self._work)

    def stripped(self, path: str) -> bytes:
        """A shared object without debugging information."""
        if self._strip:
            with contextlib.suppress(OSError, subprocess.CalledProcessError):
                subprocess.run(
                    [self._strip, "--strip-unneeded", "-o", self._work, path],
                    check=True,
                    capture_output=True,
                )
                return assets.content(self._work)
        return assets.content(path)
