"""A newc cpio archive, which the kernel unpacks as its initramfs
(Documentation/driver-api/early-userspace/buffer-format.rst).

The same entries always give the same bytes: entries are sorted by path, times and owners are 0, and
inode numbers ascend.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

S_IFMT = 0o170000
S_IFDIR = 0o040000
S_IFCHR = 0o020000
S_IFREG = 0o100000
S_IFLNK = 0o120000


class Archive:
    """The files of an initramfs. Paths are absolute. Parent directories are added as needed; adding
    a path again replaces its entry.
    """

    def __init__(self) -> None:
        #: mode, data, device major and minor by path
        self._entries: dict[str, tuple[int, bytes, int, int]] = {}

    def file(self, path: str, data: bytes, mode: int = 0o644) -> None:
        """Add a regular file."""
        self._add(path, S_IFREG | mode, data)

    def symlink(self, path: str, target: str) -> None:
        """Add a symbolic link to ``target``."""
        self._add(path, S_IFLNK | 0o777, target.encode())

    def directory(self, path: str, mode: int = 0o755) -> None:
        """Add a directory."""
        self._add(path, S_IFDIR | mode, b"")

    def device(self, path: str, major: int, minor: int, mode: int = 0o600) -> None:
        """Add a character device."""
        self._add(path, S_IFCHR | mode, b"", major, minor)

    def paths(self) -> list[str]:
        """All paths, sorted."""
        return ["/" + path for path in sorted(self._entries)]

    def pack(self) -> bytes:
        """The archive as bytes. Its length is a multiple of 512."""
        out = bytearray()
        for inode, path in enumerate(sorted(self._entries), 1):
            mode, data, major, minor = self._entries[path]
            out += b"".join(_entry(path, inode, mode, data, major, minor))
        out += b"".join(_entry("TRAILER!!!", 0, 0, b"", 0, 0))
        return bytes(out + bytes(-len(out) % 512))

    def _add(self, path: str, mode: int, data: bytes, major: int = 0, minor: int = 0) -> None:
        path = path.strip("/")
        parent = path.rpartition("/")[0]
        if parent and parent not in self._entries:
            self.directory(parent)
        self._entries[path] = (mode, data, major, minor)


def _entry(
    path: str, inode: int, mode: int, data: bytes, major: int, minor: int
) -> Iterator[bytes]:
    name = path.encode() + b"\0"
    links = 2 if mode & S_IFMT == S_IFDIR else 1
    # ino mode uid gid nlink mtime filesize devmajor devminor rdevmajor rdevminor namesize check
    fields = (inode, mode, 0, 0, links, 0, len(data), 0, 0, major, minor, len(name), 0)
    yield b"070701" + b"".join(b"%08X" % field for field in fields)
    yield name + bytes(-(110 + len(name)) % 4)
    yield data
    yield bytes(-len(data) % 4)
