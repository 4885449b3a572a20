"""Finds the shared libraries that a program needs: follows PT_INTERP and DT_NEEDED recursively."""

from __future__ import annotations

import struct
from pathlib import Path

from pyvmm.errors import BuildError

TYPE_CHECKING = False
if TYPE_CHECKING:
    import mmap

PT_LOAD, PT_DYNAMIC, PT_INTERP = 1, 2, 3
DT_NULL, DT_NEEDED, DT_STRTAB, DT_RPATH, DT_RUNPATH = 0, 1, 5, 15, 29

LIBRARY_DIRS = (
    "lib/x86_64-linux-gnu",
    "usr/lib/x86_64-linux-gnu",
    "lib64",
    "usr/lib64",
    "lib",
    "usr/lib",
)


class Dynamic:
    """What an ELF file says about its loading.

    :ivar bits: 32 or 64. :ivar interpreter: PT_INTERP; empty if there is none.
    :ivar needed: DT_NEEDED. :ivar search: the directories of DT_RUNPATH, or else of DT_RPATH.
    :raises ValueError: the file is no sound ELF file.
    """

    __slots__ = ("bits", "interpreter", "needed", "search")

    def __init__(self, data: bytes | mmap.mmap) -> None:
        if data[:4] != b"\x7fELF" or data[4:5] not in (b"\1", b"\2"):
            raise ValueError("no ELF magic")
        wide = data[4] == 2
        self.bits = 64 if wide else 32
        self.interpreter = ""
        tags: list[tuple[int, int]] = []
        form = struct.Struct("<2Q" if wide else "<2I")
        try:
            segments = _segments(data, wide)
            for kind, offset, _, length in segments:
                part = data[offset : offset + length]
                if kind == PT_INTERP:
                    self.interpreter = part.rstrip(b"\0").decode()
                elif kind == PT_DYNAMIC:
                    tags = list(form.iter_unpack(part[: len(part) // form.size * form.size]))
            self.needed = _texts(data, segments, tags, DT_NEEDED)
            paths = _texts(data, segments, tags, DT_RUNPATH) or _texts(
                data, segments, tags, DT_RPATH
            )
        except (struct.error, UnicodeDecodeError) as e:
            raise ValueError(str(e)) from None
        self.search = [d for path in paths for d in path.split(":") if d]


def _segments(data: bytes | mmap.mmap, wide: bool) -> list[tuple[int, int, int, int]]:
    """Type, offset, address and size in the file of each segment."""
    out = []
    at: int = struct.unpack_from("<Q" if wide else "<I", data, 32 if wide else 28)[0]
    size, count = struct.unpack_from("<2H", data, 54 if wide else 42)
    for i in range(count):
        if wide:
            kind, _, offset, address, _, length = struct.unpack_from("<2I4Q", data, at + i * size)
        else:
            kind, offset, address, _, length = struct.unpack_from("<5I", data, at + i * size)
        out.append((kind, offset, address, length))
    return out


def _texts(
    data: bytes | mmap.mmap,
    segments: list[tuple[int, int, int, int]],
    tags: list[tuple[int, int]],
    wanted: int,
) -> list[str]:
    """The strings of all dynamic tags ``wanted``."""
    table = next((value for tag, value in tags if tag == DT_STRTAB), 0)
    for kind, offset, address, length in segments:
        if kind == PT_LOAD and address <= table < address + length:
            base = offset + table - address
            break
    else:
        return []
    out = []
    for tag, value in tags:
        if tag == DT_NULL:
            break
        if tag == wanted:
            end = data.find(b"\0", base + value)
            if end < 0:
                raise ValueError("a string of the dynamic section has no end")
            out.append(data[base + value : end].decode())
    return out


def needed(path: Path) -> tuple[str, list[str]]:
    """The interpreter (empty if there is none) and the DT_NEEDED names of the ELF file ``path``.

    :raises BuildError: the file is no sound ELF.
    """
    try:
        found = Dynamic(path.read_bytes())
    except ValueError as e:
        raise BuildError(
            f"{path} is not a sound ELF file: {e}", "build again with --force"
        ) from None
    return found.interpreter, found.needed


def libraries(program: Path, roots: list[Path]) -> dict[str, Path]:
    """The interpreter and all libraries that ``program`` needs.

    :returns: per library its path in the guest and the file on the host, below one of ``roots``.
    :raises BuildError: a library is in none of ``roots``.
    """
    found, lacks = _follow(program, roots)
    for name, wanted_by in lacks.items():
        raise BuildError(
            f"{name}, which {wanted_by.name} needs, is in no package", "build again with --force"
        )
    return found


def lacking(program: Path, roots: list[Path]) -> list[str]:
    """The names of the libraries that ``program`` needs and that are in none of ``roots``, as far
    as can be seen without them.
    """
    return list(_follow(program, roots)[1])


def _follow(program: Path, roots: list[Path]) -> tuple[dict[str, Path], dict[str, Path]]:
    """What ``program`` needs: per path in the guest the file on the host, and per name that is in
    none of ``roots`` the file that needs it.
    """
    found: dict[str, Path] = {}
    lacks: dict[str, Path] = {}

    def want(name: str, where: str, wanted_by: Path) -> None:
        path = _lookup(name, roots)
        if path is None:
            lacks.setdefault(name, wanted_by)
            return
        found[where] = path
        add(path)

    def add(path: Path) -> None:
        interpreter, names = needed(path)
        if interpreter and interpreter not in found:
            want(Path(interpreter).name, interpreter, path)
        for name in names:
            if not any(Path(p).name == name for p in found):
                want(name, f"/lib/x86_64-linux-gnu/{name}", path)

    add(program)
    return found, lacks


def _lookup(name: str, roots: list[Path]) -> Path | None:
    for root in roots:
        for directory in LIBRARY_DIRS:
            path = root / directory / name
            # An absolute link points into this machine and not into the unpacked package.
            if path.is_symlink() and path.readlink().is_absolute() and root != Path("/"):
                path = root / path.readlink().relative_to("/")
            if path.is_file():
                return path
    return None
