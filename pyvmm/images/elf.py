"""Finds the shared libraries that a program needs: follows PT_INTERP and DT_NEEDED recursively, by
pyelftools.
"""

from __future__ import annotations

from pathlib import Path

from pyvmm.errors import BuildError

LIBRARY_DIRS = (
    "lib/x86_64-linux-gnu",
    "usr/lib/x86_64-linux-gnu",
    "lib64",
    "usr/lib64",
    "lib",
    "usr/lib",
)


def needed(path: Path) -> tuple[str, list[str]]:
    """The interpreter (empty if there is none) and the DT_NEEDED names of the ELF file ``path``.

    :raises BuildError: the file is no sound ELF.
    """
    from elftools.common.exceptions import ELFError
    from elftools.elf.elffile import ELFFile

    try:
        with path.open("rb") as f:
            elf = ELFFile(f)
            interpreter = next((s.get_interp_name() for s in elf.iter_segments("PT_INTERP")), "")
            dynamic = next(iter(elf.iter_segments("PT_DYNAMIC")), None)
            names = [tag.needed for tag in dynamic.iter_tags("DT_NEEDED")] if dynamic else []
    except ELFError as e:
        raise BuildError(
            f"{path} is not a sound ELF file: {e}", "build again with --force"
        ) from None
    return interpreter, names


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
