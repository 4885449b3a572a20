"""Files of the host for the guest (``--add``, ``--modules``): finds them, and what they need, and
packs them as an archive that Linux unpacks behind the initrd.

Nothing is read but the heads of programs until the archive is stored in guest memory. So an archive
may be much larger than the memory of this process.
"""

from __future__ import annotations

import os
import stat

from pyvmm import helper
from pyvmm.errors import ImageError, UsageError
from pyvmm.images.cpio import Archive, HostFile, Listing
from pyvmm.images.elf import LIBRARY_DIRS, Dynamic
from pyvmm.programs import which

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence


#: Where a FILE without a PATH lands: a program in the first directory of the command's PATH that is
#: for local programs, anything else in the command's working directory (guest/init.c).
PROGRAMS, HOME = "usr/local/bin", "root"
#: The directories of PATH in the guest (guest/init.c).
PATH = ("usr/local/sbin", "usr/local/bin", "usr/sbin", "usr/bin", "sbin", "bin")
#: The lists of modules that init loads (guest/init.c): always, for shares of directories, and for
#: disks.
INIT_MODULES = ("etc/modules", "etc/modules.shares", "etc/modules.disks")
SHOWN = 3  # names that one note shows


class Additions:
    """What the user adds to an initrd.

    :param add: per addition ``FILE|DIR[:PATH]``. :param modules: a tree of kernel modules.
    :param initrds: the initrds beneath, whose directories and programs are taken into account.
    :param release: the release of the kernel; empty if it is unknown.
    :ivar notes: what the user should know, one line each.
    :raises ImageError: something is missing or cannot be read.
    :raises UsageError: two additions are for one path.
    """

    def __init__(
        self,
        add: Sequence[str],
        modules: str | None,
        initrds: Sequence[str],
        release: Callable[[], str],
    ) -> None:
        self.archive = Archive()
        self.notes: list[str] = []
        self._guest = Listing()  # the initrds, and what is added
        for path in initrds:
            self._guest.add(path)
        self._origin: dict[str, str] = {}  # where each entry but a directory comes from
        self._scripts: dict[str, list[str]] = {}  # names of scripts by their interpreter
        self._programs: list[tuple[str, Dynamic]] = []
        self._skipped: list[str] = []
        for text in add:
            self._add(text)
        self._add_libraries()
        self._check_scripts()
        if self._skipped:
            self.notes.append(
                f"sockets and devices are not packed for the guest: {_some(self._skipped)}"
            )
        if modules is not None:
            self._add_modules(modules, release)

    # --- files and directories ------------------------------------------------------------------

    def _add(self, text: str) -> None:
        host, colon, inside = text.rpartition(":/")
        host, where = (host, "/" + inside) if colon else (text, "")
        if not host or "\0" in text:
            raise UsageError(f"--add {text!r}", "write FILE, DIR, FILE:/PATH or DIR:/PATH")
        status = _status(host, text)
        name = os.path.basename(os.path.abspath(host))
        if stat.S_ISDIR(status.st_mode):
            self._add_tree(host, self._place(where or f"{HOME}/{name}"))
            return
        if not stat.S_ISREG(status.st_mode):
            raise ImageError(f"--add {text!r} is neither a file nor a directory", "add a file")
        runs = bool(status.st_mode & 0o111)
        if not where:
            where = f"{PROGRAMS if runs else HOME}/{name}"
        elif where.endswith("/"):
            where += name
        self._file(host, self._place(where), status)

    def _place(self, where: str) -> str:
        """The path in the archive: without ``..``, through the links of the initrd to its
        directories. A directory in the place of such a link would hide what is behind the link.
        """
        where = os.path.normpath(where).strip("/")
        parent, _, name = where.rpartition("/")
        parent = self._guest.resolve(parent)
        return f"{parent}/{name}" if parent else name

    def _add_tree(self, top: str, where: str) -> None:
        if where:
            self._directory(top, where, os.stat(top))
        try:
            with os.scandir(top) as found:
                entries = sorted(found, key=lambda entry: os.fsencode(entry.name))
            for entry in entries:
                status = entry.stat(follow_symlinks=False)
                path = f"{where}/{entry.name}" if where else entry.name
                if stat.S_ISDIR(status.st_mode):
                    self._add_tree(entry.path, path)
                elif stat.S_ISREG(status.st_mode):
                    self._file(entry.path, self._place(path), status)
                elif stat.S_ISLNK(status.st_mode):
                    path = self._claim(self._place(path), entry.path)
                    target = os.readlink(entry.path)
                    self.archive.symlink(path, target)
                    self._guest.modes[path], self._guest.links[path] = status.st_mode, target
                elif stat.S_ISFIFO(status.st_mode):
                    path = self._claim(self._place(path), entry.path)
                    self.archive.fifo(path, stat.S_IMODE(status.st_mode))
                else:
                    self._skipped.append(entry.path)
        except OSError as e:
            raise _unreadable(str(e.filename or top), e) from e

    def _directory(self, host: str, path: str, status: os.stat_result) -> None:
        path = self._place(path)
        there = self._guest.resolve(path)
        if self._guest.modes.get(path, 0) and stat.S_ISDIR(self._guest.modes.get(there, 0)):
            path = there
        if path in self._origin:
            raise _twice(path, self._origin[path], host)
        self.archive.directory(path, stat.S_IMODE(status.st_mode))
        self._guest.modes[path] = status.st_mode

    def _claim(self, path: str, host: str) -> str:
        """Note what is at ``path``, and return the path.

        :raises UsageError: there is something else already.
        """
        if self._origin.setdefault(path, host) != host:
            raise _twice(path, self._origin[path], host)
        entry = self.archive.entries.get(path)
        if entry is not None and stat.S_ISDIR(entry.mode):
            raise _twice(path, "a directory", host)
        for end in (i for i, c in enumerate(path) if c == "/"):
            if path[:end] in self._origin:
                raise _twice(path[:end], self._origin[path[:end]], f"the directory of {host}")
        return path

    def _file(self, host: str, path: str, status: os.stat_result) -> None:
        if not os.access(host, os.R_OK, effective_ids=True):
            raise ImageError(
                f"{host!r} cannot be packed for the guest: it may not be read",
                "allow it by chmod, or leave it out",
            )
        path = self._claim(path, host)
        self.archive.host_file(path, HostFile(host, status))
        self._guest.modes[path] = status.st_mode
        self._guest.links.pop(path, None)
        if status.st_mode & 0o111 and status.st_size >= 4:
            try:
                self._look_at(host, path)
            except OSError as e:
                raise _unreadable(host, e) from e

    # --- what programs need ---------------------------------------------------------------------

    def _look_at(self, host: str, path: str) -> None:
        """Find out what a program needs."""
        with open(host, "rb") as f:
            head = f.read(256)
            if head.startswith(b"#!"):
                words = head[2:].split(b"\n")[0].split()
                if words:
                    self._scripts.setdefault(os.fsdecode(words[0]), []).append(path)
                    if words[0].endswith(b"/env") and len(words) > 1:
                        self._scripts.setdefault(os.fsdecode(words[1]), []).append(path)
            elif head.startswith(b"\x7fELF"):
                dynamic = _dynamic(f.fileno())
                if dynamic is not None and dynamic.interpreter:
                    self._programs.append((host, dynamic))

    def _add_libraries(self) -> None:
        """Add the interpreters and libraries of the programs. A tree that brings the interpreter of
        its programs is taken as complete.
        """
        own = self.archive.entries
        lacks: dict[str, list[str]] = {}
        libraries: dict[str, str] = {}
        cache = _LibraryCache()
        for host, dynamic in self._programs:
            if self._guest.resolve(dynamic.interpreter) in own:
                continue
            found, missing = cache.follow(host, dynamic)
            for path, library in found.items():
                libraries.setdefault(self._place(path), library)
            for path in missing:
                if not self._guest.has(path):
                    lacks.setdefault(path, []).append(os.path.basename(host))
        for path, library in libraries.items():
            if path not in self._origin:
                self.archive.host_file(self._claim(path, library), HostFile(library))
        for path, names in lacks.items():
            self.notes.append(
                f"{_some(names)} cannot run in the guest: this machine has no"
                f" {os.path.basename(path)}; add it: --add FILE:{path}"
            )

    def _check_scripts(self) -> None:
        if not self._guest.complete:
            return  # what is in there is not known
        for interpreter, names in self._scripts.items():
            places = (
                [interpreter]
                if interpreter.startswith("/")
                else [f"/{directory}/{interpreter}" for directory in PATH]
            )
            if not any(map(self._guest.has, places)):
                shown = [name.rpartition("/")[2] for name in names]
                remedy = f"{interpreter}:{interpreter}" if len(places) == 1 else interpreter
                self.notes.append(
                    f"{_some(shown)} cannot run: the guest has no {interpreter}; if one program is"
                    f" enough, --add {remedy}"
                )

    # --- modules --------------------------------------------------------------------------------

    def _add_modules(self, directory: str, release: Callable[[], str]) -> None:
        """Add a tree of modules. Init loads those of the initrd's list that the tree has."""
        from pyvmm.images.kernel import module_name
        from pyvmm.images.modtree import Tree

        tree = Tree(directory, release)
        self.notes += tree.notes
        beneath = self._guest.read(f"lib/modules/{tree.version}/modules.dep") or b""
        tree.add_to(
            lambda path, host: self._claim(self._place(path), host),
            self.archive,
            os.fsdecode(beneath),
        )
        for name in INIT_MODULES:
            wanted = os.fsdecode(self._guest.read(name) or b"").split()
            order = tree.load_order([module_name(os.path.basename(path)) for path in wanted])
            if order and name not in self._origin:
                listed = os.fsencode("".join(f"{path}\n" for path in order))
                self.archive.file(self._claim(name, directory), listed)


class _LibraryCache:
    """Finds libraries on this machine as its dynamic loader does."""

    def __init__(self) -> None:
        self._known: dict[tuple[str, int], str] | None = None
        self._dynamics: dict[str, Dynamic | None] = {}

    def follow(self, program: str, dynamic: Dynamic) -> tuple[dict[str, str], list[str]]:
        """The interpreter and all libraries of a program.

        :returns: the files of the host by their paths in the guest, and the paths of those that are
            missing. The libraries are all in the directory of the C library, where the loader
            looks.
        """
        files: dict[str, str] = {}
        lost: list[str] = []
        todo = [(name, program, dynamic) for name in dynamic.needed]
        interpreter = dynamic.interpreter
        while todo:
            name, wanted_by, its = todo.pop(0)
            if name in files or name in lost or name == os.path.basename(interpreter):
                continue
            path = self._find(name, wanted_by, its, dynamic)
            if path is None:
                lost.append(name)
                continue
            files[name] = path
            inner = self._look(path)
            if inner is not None:
                todo += [(n, path, inner) for n in inner.needed]
        libc = next((path for name, path in files.items() if name.startswith("libc.")), None)
        base = os.path.dirname(libc) if libc else "/" + LIBRARY_DIRS[0]

        def inside(name: str) -> str:
            return name if "/" in name else f"{base}/{name}"

        found = {inside(name): path for name, path in files.items()}
        missing = [inside(name) for name in lost]
        if os.path.isfile(interpreter):
            found[interpreter] = interpreter
        else:
            missing.append(interpreter)
        return found, missing

    def _look(self, path: str) -> Dynamic | None:
        if path not in self._dynamics:
            try:
                with open(path, "rb") as f:
                    self._dynamics[path] = _dynamic(f.fileno())
            except OSError:
                self._dynamics[path] = None
        return self._dynamics[path]

    def _find(self, name: str, wanted_by: str, its: Dynamic, program: Dynamic) -> str | None:
        if "/" in name:
            return name if os.path.isfile(name) else None
        origin = os.path.dirname(os.path.realpath(wanted_by))
        for directory in (
            *its.search,
            *os.environ.get("LD_LIBRARY_PATH", "").split(":"),
        ):
            path = directory.replace("${ORIGIN}", origin).replace("$ORIGIN", origin) + "/" + name
            if directory and self._fits(path, program.bits):
                return path
        if self._known is None:
            self._known = _loader_cache()
        path = self._known.get((name, program.bits), "")
        if path and self._fits(path, program.bits):
            return path
        near = os.path.dirname(os.path.realpath(program.interpreter))
        for directory in (near, *(f"/{d}" for d in LIBRARY_DIRS)):
            if self._fits(f"{directory}/{name}", program.bits):
                return f"{directory}/{name}"
        return None

    def _fits(self, path: str, bits: int) -> bool:
        found = self._look(path)
        return found is not None and found.bits == bits


_listed: dict[tuple[str, int], str] = {}


def _loader_cache() -> dict[tuple[str, int], str]:
    """What ``ldconfig -p`` lists: paths by name and word size. In the sandbox, which has no
    programs, what it listed last: a reset packs again what was packed before.
    """
    global _listed
    if helper.sealed():
        return _listed
    import subprocess

    tool = which("ldconfig", "/usr/sbin:/sbin:/usr/bin:/bin")
    if tool is None:
        return {}
    done = subprocess.run(
        [tool, "-p"], capture_output=True, text=True, check=False, env={"LC_ALL": "C"}
    )
    known: dict[tuple[str, int], str] = {}
    for line in done.stdout.splitlines():
        name, arrow, path = line.strip().partition(" => ")
        name, _, kind = name.partition(" ")
        if arrow:
            known.setdefault((name, 64 if "x86-64" in kind else 32), path)
    _listed = known
    return known


def _dynamic(fd: int) -> Dynamic | None:
    import mmap

    try:
        with mmap.mmap(fd, 0, access=mmap.ACCESS_READ) as data:
            return Dynamic(data)
    except ValueError:
        return None  # the guest's kernel will complain


def _status(host: str, text: str) -> os.stat_result:
    try:
        return os.stat(host)
    except OSError as e:
        hint = "name a file or a directory"
        if ":" in text and ":/" not in text:
            hint = f"behind the colon there must be an absolute path: {text.replace(':', ':/', 1)}"
        raise ImageError(f"--add {host!r}: {e.strerror}", hint) from e


def _unreadable(path: str, e: OSError) -> ImageError:
    return ImageError(
        f"{path!r} cannot be packed for the guest: {e.strerror}",
        "wait until nobody changes it, allow it by chmod, or leave it out",
    )


def _twice(path: str, one: str, other: str) -> UsageError:
    return UsageError(
        f"two additions are for /{path} in the guest: {one} and {other}",
        "give one of them another path: --add FILE:/PATH",
    )


def _some(names: Sequence[str]) -> str:
    """The first names of a list, and how many more there are."""
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more
