"""Files that come back from an L1 that does not see this machine's files.

Before a command, L1 notes the time in the modification time of a file. After it, L1 packs the
regular files in the writable directories that are newer, and they are written here. L1 is not
trusted: nothing is written outside of those directories, and no link is followed or made.
"""

from __future__ import annotations

import os
import stat
import tempfile
import zlib

from pyvmm.errors import TestbedError
from pyvmm.images.cpio import Listing

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Container, Sequence

    from pyvmm.testbed.session import Result

    Run = Callable[[Sequence[str]], Result]

MARK = "/run/pyvmm/mark"
#: Bytes of the files of one command, unpacked.
MOST = 1 << 30
# busybox' find compares whole seconds: we wait until a new file counts as newer than the mark. The
# clock of L1's files decides, which lags behind other clocks.
DEPART = """
touch {mark} || exit
until touch {mark}.now || exit; [ -n "$(find {mark}.now -newer {mark})" ]; do sleep 0.1; done
"""
# busybox' tar takes no list of names.
PACK = """
for d; do [ ! -e "$d" ] || find "$d" -type f -newer {mark}; done >{mark}.names
[ -s {mark}.names ] || exit 0
cpio -o -H newc <{mark}.names >{mark}.cpio 2>{mark}.err || {{ cat {mark}.err >&2; exit 1; }}
gzip -c {mark}.cpio
"""


def departure(run: Run, mark: str) -> None:
    """Note the time in L1. This takes up to a second, so that every file that is written
    afterwards comes back, and none that was written before.

    :param run: runs a command in L1. :param mark: a word that no other command has.
    :raises TestbedError: L1 cannot note it.
    """
    noted = run(["sh", "-c", DEPART.format(mark=f"{MARK}.{mark}")])
    if noted.status:
        raise TestbedError(f"L1 cannot note the time: {noted.err.strip()[-200:]}")


def arrival(run: Run, mark: str, directories: Sequence[str]) -> list[str]:
    """Fetch the files in ``directories`` that are newer than the mark; returns their paths.

    :param directories: as in ``unpack``.

    :raises TestbedError: L1 does not pack them, or they cannot be written here.
    """
    packed = run(["sh", "-c", PACK.format(mark=f"{MARK}.{mark}"), "sh", *directories])
    run(["sh", "-c", f"rm -f {MARK}.{mark}*"])
    if packed.status:
        raise TestbedError(f"L1 cannot send its files back: {packed.err.strip()[-200:]}")
    return unpack(packed.stdout, directories)


#: Options whose values are files or directories that a command reads, and that it writes.
READ = (
    *("--kernel", "--kernels", "--initrd", "--vmlinux", "--add", "--modules", "--root", "--share"),
    *("--disk", "--config", "--from", "--merge", "--scenario"),
)
WRITTEN = (
    *("--log", "--junit", "--json", "--report", "--trace", "--explain", "--pcap", "--html"),
    *("--svg", "--handover"),
)


def values(argv: Sequence[str], options: Container[str]) -> list[str]:
    """The values that a command line gives these options, as ``--option VALUE`` or with ``=``."""
    words = list(argv[: argv.index("--")] if "--" in argv else argv)
    found, option = [], ""
    for word in words:
        if word.startswith("--"):
            option, equals, value = word.partition("=")
            if equals:
                found += [value] if option in options else []
                option = ""
        elif option in options:
            found.append(word)
            option = option if option == "--kernels" else ""  # the only one with several values
        else:
            option = ""
    return found


def named(texts: Sequence[str]) -> dict[str, str]:
    """The paths that values of options may name: for each, made absolute, the same without links.
    Each has a parent directory; it need not exist itself, but nothing else than files and
    directories travels.
    """
    pieces = list(texts)
    for word in texts:  # as in PATH,format=raw, FILE:/PATH, DIR:rw
        parts = [part for text in word.split(",") for part in text.split("=")]
        pieces += [*parts, *(part.rpartition(":/")[0] for part in parts)]
        pieces += [part.removesuffix(":rw").removesuffix(":ro") for part in parts]
    found = {}
    for piece in pieces:
        if not piece or piece.startswith("-") or "\0" in piece or "://" in piece:
            continue
        written = os.path.abspath(piece)
        parent, name = os.path.split(written)
        path = os.path.join(os.path.realpath(parent), name)
        if os.path.isdir(path):
            path = os.path.realpath(path)
        elif os.path.exists(path) and not os.path.isfile(path):
            continue  # /dev/null, a FIFO
        if name and path != "/" and os.path.isdir(os.path.dirname(path)):
            found[written] = path
    return found


def unpack(packed: bytes, directories: Sequence[str]) -> list[str]:
    """Write the files of a compressed archive, whose names are absolute paths.

    :param directories: without symbolic links in their paths; also paths of single files.
    :returns: the paths of the files.
    :raises TestbedError: the archive is damaged, the files are too large, or one of them is not in
        ``directories`` or cannot be written.
    """
    if not packed:
        return []
    paths = []
    try:
        stream = zlib.decompressobj(31)  # gzip
        data = stream.decompress(packed, MOST + 1)
        if len(data) > MOST:
            raise _too_much()
        if not stream.eof:
            raise TestbedError("the files of L1 do not come back: they are cut off")
        with tempfile.NamedTemporaryFile() as archive:
            archive.write(data)
            archive.flush()
            listing = Listing()
            listing.add(archive.name)
            if not listing.complete:
                raise TestbedError("the files of L1 do not come back: they are damaged")
            for name, mode in listing.modes.items():
                _check(f"/{name}", mode, directories)
            # Each name of a hard link becomes a file of its own.
            if sum(map(listing.size, listing.modes)) > MOST:
                raise _too_much()
            for name, mode in listing.modes.items():
                content = listing.read(name)
                assert content is not None  # there are only regular files
                _write(f"/{name}", content, mode)
                paths.append(f"/{name}")
    except (zlib.error, OSError) as e:
        raise TestbedError(f"the files of L1 do not come back: {e}") from e
    return paths


def _too_much() -> TestbedError:
    return TestbedError(f"L1 sends more than {MOST >> 20} MiB", "let less come back")


def _check(path: str, mode: int, directories: Sequence[str]) -> None:
    """:raises TestbedError: L1 may not write this file here."""
    if not stat.S_ISREG(mode) or "\0" in path:
        raise TestbedError(f"L1 sends what is no plain file: {path!r}")
    parent = os.path.realpath(os.path.dirname(path))
    one = path in directories and parent == os.path.dirname(path) and not os.path.isdir(path)
    if not one and not (_inside(path, directories) and _inside(f"{parent}/", directories)):
        raise TestbedError(f"L1 sends a file for another directory: {path!r}")


def _write(path: str, data: bytes, mode: int) -> None:
    """Put a new file in the place of ``path``."""
    os.makedirs(os.path.dirname(path), exist_ok=True)
    fresh = f"{path}.{os.getpid()}"
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    fd = os.open(fresh, flags, mode & 0o777 | 0o600)
    try:
        with open(fd, "wb") as f:
            f.write(data)
        os.rename(fresh, path)
    except BaseException:
        os.unlink(fresh)
        raise


def _inside(path: str, directories: Sequence[str]) -> bool:
    return any(path.startswith(directory.rstrip("/") + "/") for directory in directories)
