"""Build a release of the commit that is checked out: ``python tools/release.py [--output DIR]``.

The files are the source distribution, the wheel, a bill of materials (CycloneDX) and their SHA-256
sums. They depend on the commit and on the compiler only: the same commit gives the same bytes,
wherever and whenever the files are built. Files that are not in the commit do not count.

With a tag vX.Y.Z on the commit, which has to be the version in pyvmm/__init__.py, this is a
release. Without a tag, the version is that of a development build, X.Y.Z.devN+gHASH, with N the
number of commits so far.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import io
import os
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

from elftools.elf.elffile import ELFFile

ROOT = Path(__file__).resolve().parents[1]
VERSION = re.compile(r'(?m)^__version__ = "(\d+\.\d+\.\d+)"$')
#: The oldest C library with which the wheel works: that of RHEL 9. Ubuntu 22.04 has 2.35, Debian 12
#: has 2.36.
GLIBC = (2, 34)
#: By which pip knows where the wheel works (PEP 600).
PLATFORM = f"manylinux_{GLIBC[0]}_{GLIBC[1]}_x86_64"
#: What setuptools makes of the present directory. Each step is a process of its own.
STEP = "from setuptools import build_meta; print(build_meta.build_{}({!r}, {!r}))"
SETTINGS = {"sdist": {}, "wheel": {"--build-option": ["--plat-name", PLATFORM]}}


def git(*words: str) -> str:
    """The output of git about the checkout."""
    command = ["git", "-C", str(ROOT), *words]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def version(source: str) -> str:
    """The version of the commit that is checked out.

    :param source: the text of pyvmm/__init__.py.
    :raises SystemExit: the tag and the source differ, or the history is cut off, so that the
        number of commits would be wrong and a tag could be missing.
    """
    if git("rev-parse", "--is-shallow-repository") == "true":
        raise SystemExit(
            "release: this clone is shallow, and the version depends on all commits and tags; "
            "run: git fetch --unshallow --tags"
        )
    match = VERSION.search(source)
    if match is None:
        raise SystemExit("release: pyvmm/__init__.py has no version; write X.Y.Z")
    tags = [t for t in git("tag", "--points-at", "HEAD").split() if re.match(r"v\d", t)]
    if not tags:
        count, commit = git("rev-list", "--count", "HEAD"), git("rev-parse", "--short=12", "HEAD")
        return f"{match[1]}.dev{count}+g{commit}"
    if tags != [f"v{match[1]}"]:
        raise SystemExit(
            f"release: the tag is {' '.join(tags)} and pyvmm/__init__.py says {match[1]}; "
            "correct one of them"
        )
    return match[1]


def changes(text: str, number: str) -> None:
    """Make sure that the changelog has a release's section.

    :raises SystemExit: the section is not there.
    """
    if ".dev" not in number and not re.search(rf"(?m)^## {re.escape(number)} - \d{{4}}-", text):
        raise SystemExit(
            f"release: CHANGELOG.md has no section {number}; write '## {number} - DATE'"
        )


def checkout(directory: Path) -> str:
    """Put the commit's files into ``directory``, with its version; returns the version."""
    data = subprocess.run(
        ["git", "-C", str(ROOT), "archive", "HEAD"], check=True, capture_output=True
    ).stdout
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        archive.extractall(directory)
    init = directory / "pyvmm/__init__.py"
    number = version(init.read_text())
    changes((directory / "CHANGELOG.md").read_text(), number)
    init.write_text(VERSION.sub(f'__version__ = "{number}"', init.read_text()))
    return number


def step(what: str, source: Path, to: Path, epoch: int) -> Path:
    """Build a distribution of ``source`` into ``to``.

    :param what: ``sdist`` or ``wheel``. :param epoch: the time of all files, seconds since 1970.
    """
    flags = f"{os.environ.get('CFLAGS', '')} {shlex.quote(f'-ffile-prefix-map={source}=.')}"
    env = {**os.environ, "SOURCE_DATE_EPOCH": str(epoch), "CFLAGS": flags, "PYTHONHASHSEED": "0"}
    command = [sys.executable, "-c", STEP.format(what, str(to), SETTINGS[what])]
    done = subprocess.run(command, cwd=source, env=env, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"release: the {what} cannot be built:\n{done.stderr}")
    return to / done.stdout.split()[-1]


def same_bytes(archive: Path, epoch: int) -> None:
    """Write a .tar.gz again: sorted, of one time and owner, and without the time of the packing."""
    packed = io.BytesIO()
    with tarfile.open(archive) as old, tarfile.open(fileobj=packed, mode="w") as new:
        for member in sorted(old.getmembers(), key=lambda member: member.name):
            plain = tarfile.TarInfo(member.name)
            plain.type, plain.size, plain.mtime = member.type, member.size, epoch
            plain.mode = 0o755 if member.isdir() or member.mode & 0o100 else 0o644
            new.addfile(plain, old.extractfile(member) if member.isfile() else None)
    with archive.open("wb") as file, gzip.GzipFile("", "wb", 9, file, mtime=epoch) as zipped:
        zipped.write(packed.getvalue())


def portable(wheel: Path) -> None:
    """Make sure that the wheel works where its name says.

    :raises SystemExit: a shared object needs a newer C library, or another library.
    """
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            if not name.endswith(".so"):
                continue
            elf = ELFFile(io.BytesIO(archive.read(name)))
            for tag in elf.get_section_by_name(".dynamic").iter_tags("DT_NEEDED"):
                if tag.needed not in ("libc.so.6", "ld-linux-x86-64.so.2"):
                    raise SystemExit(f"release: {name} needs {tag.needed}; do without it")
            # Without symbols that have a version, there is no such section.
            needs = elf.get_section_by_name(".gnu.version_r")
            for _, symbols in needs.iter_versions() if needs else ():
                for symbol in symbols:
                    _fits(name, symbol.name)


def _fits(name: str, version: str) -> None:
    """:raises SystemExit: not each C library of ``GLIBC`` and later has this symbol version."""
    found = re.fullmatch(r"GLIBC_(\d+(?:\.\d+)+)", version)
    if found is None:  # GLIBC_PRIVATE: of one build of the C library; GLIBC_ABI_DT_RELR: of 2.36
        raise SystemExit(f"release: {name} needs {version} of the C library; do without it")
    if tuple(map(int, found[1].split("."))) > GLIBC:
        raise SystemExit(
            f"release: {name} needs glibc {found[1]} or later, and the wheel's name says "
            f"{GLIBC[0]}.{GLIBC[1]}; build on Debian 12, or see `objdump -T`"
        )


def bill(source: Path, to: Path) -> Path:
    """The bill of materials of what a wheel takes at run time, with the hashes of the lock file."""
    command = [sys.executable, "-m", "cyclonedx_py", "requirements", "--output-reproducible"]
    command += [
        "--pyproject",
        "pyproject.toml",
        "--output-format",
        "JSON",
        "--output-file",
        str(to),
    ]
    command += ["tools/requirements/wheel.txt"]
    done = subprocess.run(command, cwd=source, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"release: the bill of materials cannot be made:\n{done.stderr}")
    return to


def release(output: Path) -> list[Path]:
    """Build everything into ``output``; returns the files."""
    os.umask(0o022)
    epoch = int(git("log", "-1", "--format=%ct"))
    output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="pyvmm-release-") as name:
        source, made = Path(name, "source"), Path(name, "made")
        made.mkdir()
        number = checkout(source)
        sdist = step("sdist", source, made, epoch)
        same_bytes(sdist, epoch)
        # The wheel is built from the source distribution, as whoever has only that would build it.
        with tarfile.open(sdist) as archive:
            archive.extractall(name)
        unpacked = Path(name, sdist.name.removesuffix(".tar.gz"))
        files = [sdist, step("wheel", unpacked, made, epoch)]
        portable(files[1])
        files.append(bill(unpacked, made / f"pyvmm-{number}.cdx.json"))
        sums = made / "SHA256SUMS"
        sums.write_text(
            "".join(f"{hashlib.sha256(f.read_bytes()).hexdigest()}  {f.name}\n" for f in files)
        )
        return [Path(shutil.copy(file, output)) for file in (*files, sums)]


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="tools/release.py", description=__doc__)
    parser.add_argument("--output", type=Path, default=ROOT / "build/release", metavar="DIR")
    for file in release(parser.parse_args().output):
        print(file)
    return 0


if __name__ == "__main__":
    sys.exit(main())
