"""newc cpio archives, which the kernel unpacks as its initramfs
(Documentation/driver-api/early-userspace/buffer-format.rst): this module packs and lists them.

The same entries always give the same bytes: entries are sorted by path, times and owners are 0, and
inode numbers ascend. Paths and link targets may have any byte; in a ``str`` they are as Python's
file system functions give them.
"""

from __future__ import annotations

import os
import stat

from pyvmm import helper
from pyvmm.errors import ImageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    import mmap
    from collections.abc import Iterator

    from pyvmm.memory import GuestMemory

MAGIC = b"070701"
HEADER = 110  # bytes, followed by the name
HEX = frozenset(b"0123456789abcdefABCDEF")
TRAILER = "TRAILER!!!"
ALIGN = 512  # bytes; the length of an archive is a multiple of them
#: The longest path and the longest target of a symbolic link, in bytes; Linux skips longer ones.
PATH_MAX = 4095
FILE_MAX = (1 << 32) - 1  # bytes of one file: the field has eight hexadecimal digits
PAGE = 4096
PIECE = 1 << 20  # bytes of small entries that are stored at once


class HostFile:
    """A file of the host as it was when it was found. It is read when the archive is stored.

    :raises OSError: there is no such file.
    """

    __slots__ = ("identity", "links", "mode", "path", "size")

    def __init__(self, path: str, status: os.stat_result | None = None) -> None:
        status = status or os.stat(path)
        self.path, self.size, self.links = path, status.st_size, status.st_nlink
        self.mode = stat.S_IMODE(status.st_mode)
        self.identity = _identity(status)

    def load(self, memory: GuestMemory, gpa: int) -> None:
        """Read the file into guest memory at ``gpa``.

        :raises ImageError: the file cannot be read, or has changed since it was found.
        """
        try:
            fd = helper.open_to_read(self.path)
            try:
                same = _identity(os.fstat(fd)) == self.identity
                if same:
                    same = memory.read_file(gpa, fd, 0, self.size) == self.size
                same = same and _identity(os.fstat(fd)) == self.identity
            finally:
                os.close(fd)
        except OSError as e:
            raise ImageError(
                f"{self.path!r} cannot be packed for the guest: {e.strerror}",
                "wait until nobody changes it, or leave it out",
            ) from e
        if not same:
            raise ImageError(
                f"{self.path!r} has changed while it was packed for the guest",
                "wait until nobody writes to it, or add a copy",
            )


def _identity(status: os.stat_result) -> tuple[int, ...]:
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_mode


class Entry:
    """One entry of an archive.

    :ivar mode: type and permissions. :ivar data: the content of a file or the target of a symbolic
        link. :ivar source: the file of the host that has the content instead.
    """

    __slots__ = ("data", "major", "minor", "mode", "source")

    def __init__(
        self,
        mode: int,
        data: bytes = b"",
        *,
        source: HostFile | None = None,
        major: int = 0,
        minor: int = 0,
    ) -> None:
        self.mode, self.data, self.source = mode, data, source
        self.major, self.minor = major, minor

    @property
    def size(self) -> int:
        """Bytes of the content."""
        return self.source.size if self.source is not None else len(self.data)


class Archive:
    """The files of an initramfs. Paths are absolute. Parent directories are added as needed; adding
    a path again replaces its entry.
    """

    def __init__(self) -> None:
        self.entries: dict[str, Entry] = {}  # by path, without the first slash

    def file(self, path: str, data: bytes, mode: int = 0o644) -> None:
        """Add a regular file."""
        self._add(path, Entry(stat.S_IFREG | mode, data))

    def host_file(self, path: str, source: HostFile) -> None:
        """Add a file of the host. Names of one file stay hard links of each other.

        :raises ImageError: the file is too large for an archive.
        """
        if source.size > FILE_MAX:
            raise ImageError(
                f"{source.path!r} has {source.size} bytes, but a file of an initrd has less than"
                " 4 GiB",
                "split it, or leave it out",
            )
        self._add(path, Entry(stat.S_IFREG | source.mode, source=source))

    def symlink(self, path: str, target: str) -> None:
        """Add a symbolic link to ``target``."""
        self._add(path, Entry(stat.S_IFLNK | 0o777, _checked(path, target)))

    def directory(self, path: str, mode: int = 0o755) -> None:
        """Add a directory."""
        self._add(path, Entry(stat.S_IFDIR | mode))

    def fifo(self, path: str, mode: int = 0o644) -> None:
        """Add a named pipe."""
        self._add(path, Entry(stat.S_IFIFO | mode))

    def device(self, path: str, major: int, minor: int, mode: int = 0o600) -> None:
        """Add a character device."""
        self._add(path, Entry(stat.S_IFCHR | mode, major=major, minor=minor))

    def paths(self) -> list[str]:
        """All paths, sorted."""
        return ["/" + path for path in sorted(self.entries)]

    @property
    def size(self) -> int:
        """Bytes of the packed archive."""
        total = sum(_room(path, size) for path, _, _, _, size in self._ordered())
        return -(-total // ALIGN) * ALIGN

    @property
    def unpacked(self) -> int:
        """Bytes of guest memory that the files take, once they are unpacked: whole pages, and at
        least one for each entry and its inode.
        """
        return sum(-(-entry.size // PAGE) * PAGE or PAGE for entry in self.entries.values())

    def pieces(self) -> Iterator[tuple[int, bytes | HostFile]]:
        """The archive in pieces, each with its offset; bytes between two pieces are zero."""
        at = 0
        for path, entry, inode, links, size in self._ordered():
            head = _header(path, inode, links, size, entry)
            if entry.source is None:
                yield at, head + entry.data
            else:
                yield at, head
                if size:
                    yield at + len(head), entry.source
            at += _room(path, size)

    def load(self, memory: GuestMemory, gpa: int) -> None:
        """Store the archive in guest memory at ``gpa``. The memory must read as zero there.

        :raises ImageError: a file of the host cannot be read, or has changed.
        """
        pending, start = bytearray(), 0

        def store() -> None:
            memory.write(gpa + start, pending)
            pending.clear()

        for at, piece in self.pieces():
            if isinstance(piece, HostFile):
                store()
                piece.load(memory, gpa + at)
                continue
            if not pending:
                start = at
            pending += bytes(at - start - len(pending)) + piece
            if len(pending) >= PIECE:
                store()
        store()

    def pack(self) -> bytes:
        """The archive as bytes, if it has no files of the host."""
        out = bytearray(self.size)
        for at, piece in self.pieces():
            assert isinstance(piece, bytes)
            out[at : at + len(piece)] = piece
        return bytes(out)

    def _ordered(self) -> Iterator[tuple[str, Entry, int, int, int]]:
        """Path, entry, inode number, number of links and bytes of content of each entry, in the
        order of the paths; then the trailer. The last one of several hard links has the content, as
        GNU cpio writes it.
        """
        links: dict[tuple[int, ...], list[str]] = {}
        order = sorted(self.entries, key=os.fsencode)
        for path in order:
            source = self.entries[path].source
            if source is not None and source.links > 1:
                links.setdefault(source.identity, []).append(path)
        inodes: dict[str, int] = {}  # by the first name of a file
        for inode, path in enumerate(order, 1):
            entry = self.entries[path]
            name = "./" + path if path == TRAILER else path  # or it would end the archive
            names = links.get(entry.source.identity, []) if entry.source is not None else []
            if len(names) > 1:
                number = inodes.setdefault(names[0], inode)
                yield name, entry, number, len(names), entry.size if path == names[-1] else 0
                continue
            count = 2 if stat.S_ISDIR(entry.mode) else 1
            yield name, entry, inode, count, entry.size
        yield TRAILER, Entry(0), 0, 1, 0

    def _add(self, path: str, entry: Entry) -> None:
        path = path.strip("/")
        _checked(path, path)
        parent = path.rpartition("/")[0]
        if parent and parent not in self.entries:
            self.directory(parent)
        self.entries[path] = entry


def _checked(path: str, text: str) -> bytes:
    """``text`` as bytes, if Linux would unpack it.

    :raises ImageError: it is too long.
    """
    raw = os.fsencode(text)
    if len(raw) > PATH_MAX:
        raise ImageError(
            f"/{path[:60]}... has {len(raw)} bytes in its name or target; Linux unpacks at most"
            f" {PATH_MAX}",
            "leave it out",
        )
    return raw


def _room(path: str, size: int) -> int:
    """Bytes that an entry takes."""
    head = HEADER + len(os.fsencode(path)) + 1
    return -(-head // 4) * 4 + -(-size // 4) * 4


def _header(path: str, inode: int, links: int, size: int, entry: Entry) -> bytes:
    name = os.fsencode(path) + b"\0"
    # ino mode uid gid nlink mtime filesize devmajor devminor rdevmajor rdevminor namesize check
    fields = (
        inode, entry.mode, 0, 0, links, 0, size, 0, 0, entry.major, entry.minor, len(name), 0,
    )  # fmt: skip
    head = MAGIC + b"".join(b"%08X" % field for field in fields) + name
    return head + bytes(-len(head) % 4)


# --- what an initrd holds -------------------------------------------------------------------------


class _Content:
    """Where the content of a file is: a file of the host, the offset there, and bytes."""

    __slots__ = ("at", "path", "size")

    def __init__(self, path: str) -> None:
        self.path, self.at, self.size = path, 0, 0


class Listing:
    """What is in the archives of an initrd, as far as they are not compressed.

    Names of one inode have the same content, as Linux unpacks them: that of the last one that has
    any. GNU cpio and busybox write it once.

    :ivar modes: type and permissions by path, without the first slash.
    :ivar links: the targets of symbolic links. :ivar complete: whether everything could be read.
    """

    def __init__(self) -> None:
        self.modes: dict[str, int] = {}
        self.links: dict[str, str] = {}
        self.complete = True
        self._data: dict[str, _Content] = {}  # of regular files

    def add(self, path: str) -> None:
        """List the archives in one file of the host. A file that cannot be read, or is no archive,
        only makes the list incomplete: the loader or the kernel will complain.
        """
        import mmap

        if not os.path.isfile(path):  # a pipe can be read once
            self.complete = False
            return
        try:
            with open(path, "rb") as f, mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ) as data:
                self._scan(path, data)
        except (OSError, ValueError):
            self.complete = False

    def _scan(self, path: str, data: mmap.mmap) -> None:
        at, size = 0, len(data)
        inodes: dict[tuple[int, ...], _Content] = {}  # of the archive, if they may have more names
        while at < size:
            if data[at : at + 6] != MAGIC:
                if any(data[at : at + 4]):  # compressed from here on
                    self.complete = False
                    return
                at += 4
                continue
            head = data[at + 6 : at + HEADER]
            if len(head) != HEADER - 6 or set(head) - HEX:  # int() alone would take a sign
                raise ValueError("no header of an archive")
            fields = [int(data[at + 6 + 8 * i : at + 14 + 8 * i], 16) for i in range(13)]
            mode, length, named = fields[1], fields[6], fields[11]
            inode = fields[0], fields[7], fields[8]  # with the numbers of the device
            name = data[at + HEADER : at + HEADER + named - 1]
            at += -(-(HEADER + named) // 4) * 4
            if at + length > size:
                raise ValueError("the content of a file is cut off")
            if name == TRAILER.encode():
                inodes.clear()
            else:
                content = _Content(path)
                if fields[4] > 1 and stat.S_ISREG(mode):
                    content = inodes.setdefault(inode, content)
                self._entry(content, data, at, os.fsdecode(name), mode, length)
            at += -(-length // 4) * 4

    def _entry(
        self, content: _Content, data: mmap.mmap, at: int, name: str, mode: int, length: int
    ) -> None:
        name = os.path.normpath("/" + name).lstrip("/")
        self.modes[name] = mode
        self.links.pop(name, None)
        self._data.pop(name, None)
        if stat.S_ISLNK(mode):
            self.links[name] = os.fsdecode(data[at : at + length])
        elif stat.S_ISREG(mode):
            if length:
                content.at, content.size = at, length
            self._data[name] = content

    def size(self, path: str) -> int:
        """Bytes of a file; 0 if there is none."""
        path = self.resolve(path)
        return self._data[path].size if path in self._data else 0

    def read(self, path: str) -> bytes | None:
        """The content of a file; None if there is none."""
        path = self.resolve(path)
        if path not in self._data:
            return None
        content = self._data[path]
        with open(content.path, "rb") as f:
            f.seek(content.at)
            return f.read(content.size)

    def has(self, path: str) -> bool:
        """Whether there is something at ``path``."""
        return self.resolve(path) in self.modes

    def resolve(self, path: str) -> str:
        """Follow the symbolic links in ``path``; the result has no first slash."""
        todo = [part for part in path.split("/") if part not in ("", ".")][::-1]
        done: list[str] = []
        hops = 0
        while todo:
            part = todo.pop()
            if part == "..":
                del done[-1:]
                continue
            here = "/".join([*done, part])
            target = self.links.get(here)
            hops += target is not None
            if target is None or hops > 40:  # as many as Linux follows
                done.append(part)
                continue
            if target.startswith("/"):
                done.clear()
            todo += [part for part in target.split("/") if part not in ("", ".")][::-1]
        return "/".join(done)
