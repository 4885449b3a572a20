"""Debian packages without root. apt resolves, downloads and verifies them into the user's cache;
they can be unpacked into any directory.

If the system has package lists, they are used. Otherwise, and for a release without sources on the
system (backports), lists are fetched into the cache from the mirror that the system is configured
for. The system itself is never changed.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import pwd
import re
import shutil
import subprocess
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote

from pyvmm.errors import HostError
from pyvmm.host.paths import cache_root
from pyvmm.programs import program

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping
    from typing import Any, TypeVar

    T = TypeVar("T")

KEYRING = "/usr/share/keyrings/debian-archive-keyring.gpg"
LISTS_AGE = 86400.0  # seconds after which the lists in our cache are fetched again


@dataclass(frozen=True, slots=True)
class Package:
    """One version of one package that apt would install.

    :ivar size: bytes of the .deb file.
    :ivar filename: the name of the .deb file, without a directory.
    """

    name: str
    version: str
    size: int
    sha256: str
    filename: str


class Apt:
    """Looks up and downloads the packages of one release. Every method raises HostError if apt is
    missing or fails.

    :param release: ``""`` for the packages that the system itself would install; ``"backports"``
        for the backports of the system's release; else the name of a suite of Debian's archive.
    :param progress: called with one line before each step that may take seconds.
    """

    def __init__(self, release: str = "", progress: Callable[[str], None] = lambda _: None) -> None:
        self._release = release
        self._progress = progress
        self._state = Path(cache_root()) / "apt" / (release or "base")
        self._private = bool(release) or not any(Path("/var/lib/apt/lists").glob("*_Packages*"))
        self._updated = False

    def resolve(self, names: Iterable[str]) -> list[Package]:
        """The versions of the packages ``names`` that apt would install, in the same order."""
        names = list(names)
        found = {p.name: p for p in self._attempt(lambda: self._print_uris(names))}
        return [found[name] for name in names]

    def depends(self, name: str) -> list[str]:
        """The names of the packages on which any version of ``name`` depends directly. The
        dependencies of the newest version come first.
        """
        text = self._attempt(lambda: self._apt("apt-cache", "show", name))
        lines = re.findall(r"^Depends: (.*)$", text, re.MULTILINE)
        return [
            x for line in lines for x in re.findall(r"(?:^|[,|]) *([a-z0-9][a-z0-9.+-]+)", line)
        ]

    def names(self, prefix: str) -> set[str]:
        """The names of all packages that begin with ``prefix``."""
        return set(self._attempt(lambda: self._apt("apt-cache", "pkgnames", prefix)).split())

    def closure(self, names: Iterable[str]) -> dict[str, list[str]]:
        """Per package that ``names`` need, directly or not: the names of the packages on which the
        version that apt would install depends, with all alternatives.
        """
        without = ("recommends", "suggests", "conflicts", "breaks", "replaces", "enhances")
        options = ["--recurse", *(f"--no-{kind}" for kind in without)]
        text = self._attempt(lambda: self._apt("apt-cache", "depends", *options, *names))
        needs: dict[str, list[str]] = {}
        package = ""
        for line in text.splitlines():
            if m := re.match(r"[ |]*(?:Pre)?Depends: ([a-z0-9][a-z0-9.+-]+)$", line):
                needs[package].append(m[1])
            elif line[:1].strip():  # neither a dependency nor one of its providers
                package = line
                needs[package] = []
        return needs

    def download(self, packages: Iterable[Package]) -> list[Path]:
        """The .deb files of ``packages``, from the cache or else from the mirror. apt has verified
        each download; the SHA-256 of each file is checked here.
        """
        directory = Path(cache_root()) / "debs"
        directory.mkdir(parents=True, exist_ok=True)
        packages = list(packages)
        paths = [directory / p.filename for p in packages]
        lacking = [
            p
            for p, q in zip(packages, paths, strict=True)
            if not (q.exists() and _sha256(q) == p.sha256)
        ]
        if lacking:
            size = sum(p.size for p in lacking) / 1e6
            self._progress(f"downloading {', '.join(p.name for p in lacking)} ({size:.1f} MB)")
            specs = [f"{p.name}={p.version}" for p in lacking]
            with (
                tempfile.TemporaryDirectory(dir=directory) as mine,
                apts_directory(directory) as scratch,
            ):
                self._attempt(lambda: self._apt("apt-get", "-q", "download", *specs, cwd=scratch))
                for package in lacking:
                    # The copy is checked, because the directory is not this user's.
                    got, copy = Path(scratch, package.filename), Path(mine, package.filename)
                    if got.is_file() and not got.is_symlink():
                        shutil.copyfile(got, copy)
                    if not copy.exists() or _sha256(copy) != package.sha256:
                        raise HostError(
                            f"{package.name}: the download has the wrong hash", "try again"
                        )
                    copy.replace(directory / package.filename)
        return paths

    def install(self, names: Iterable[str], target: Path) -> None:
        """Download the packages ``names`` and unpack them into ``target``. The directory is
        replaced as a whole.
        """
        debs = self.download(self.resolve(names))
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
            fresh = Path(scratch, "root")
            for deb in debs:
                unpack(deb, fresh)
            shutil.rmtree(target, ignore_errors=True)
            fresh.rename(target)

    def _print_uris(self, names: list[str]) -> list[Package]:
        # The directory must be empty: apt leaves out packages whose files are there already.
        with tempfile.TemporaryDirectory() as scratch:
            text = self._apt("apt-get", "-q", "download", "--print-uris", *names, cwd=scratch)
        packages = []
        for line in text.splitlines():
            if m := re.match(r"'[^']*' (\S+) (\d+) SHA256:([0-9a-f]{64})", line):
                name, version, _ = m.group(1).split("_")
                packages.append(
                    Package(name, unquote(version), int(m.group(2)), m.group(3), m.group(1))
                )
        missing = set(names) - {p.name for p in packages}
        if missing:
            raise HostError(
                f"apt knows no package {', '.join(sorted(missing))}", "check the apt sources"
            )
        return packages

    def _attempt(self, action: Callable[[], T]) -> T:
        """``action()``. If it fails, fetch lists into our cache and try once more: the system's
        lists may be old.
        """
        if self._private:
            self._update()
        try:
            return action()
        except HostError as first:
            if self._updated:
                raise
            self._private = True
            try:
                self._update(force=True)
                return action()
            except HostError:
                raise first from None

    def _update(self, force: bool = False) -> None:
        lists, stamp = self._state / "lists", self._state / "updated"
        lists.mkdir(parents=True, exist_ok=True)
        (self._state / "cache" / "archives" / "partial").mkdir(parents=True, exist_ok=True)
        with (self._state / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            recent = stamp.exists() and time.time() - stamp.stat().st_mtime < LISTS_AGE
            if self._updated or (recent and not force):
                return
            self._progress(
                f"fetching the package lists{' of ' + self._release if self._release else ''}"
            )
            self._updated = True
            with apts_directory(self._state) as scratch:
                failure = None
                try:
                    self._apt("apt-get", "-q", "update", lists=scratch)
                except HostError as e:
                    failure = e
                fresh = {p.name for p in Path(scratch).iterdir() if p.is_file()} - {"lock"}
                for name in fresh:
                    shutil.copyfile(Path(scratch, name), lists / name)
            if failure is None:
                for old in lists.iterdir():
                    if old.is_file() and old.name not in fresh:
                        old.unlink()
            # One bad source among several does no harm. Nor does a missing network as long as lists
            # are there.
            elif not any(lists.glob("*_Packages*")):
                raise failure
            stamp.touch()

    def _apt(self, *command: str, cwd: str | None = None, lists: str | None = None) -> str:
        """Run one apt command; returns its output.

        :param lists: the directory of our own package lists, if it is another than the cache's.
        """
        options = ["Acquire::Retries=2", "Acquire::http::Timeout=30"]
        if self._private:
            options += [f"Dir::State::Lists={lists or f'{self._state}/lists'}"]
            options += [f"Dir::Cache={self._state}/cache"]
            if self._release:
                options += [
                    f"Dir::Etc::SourceList={self._sources()}",
                    "Dir::Etc::SourceParts=/dev/null",
                ]
        return _run([command[0], *(x for o in options for x in ("-o", o)), *command[1:]], cwd)

    def _sources(self) -> Path:
        """A sources file for our release. Its mirror is the one from which the system has its base
        release.
        """
        path = self._state / "release.sources"
        if not path.exists():
            base = codename()
            targets = _run(
                ["apt-get", "indextargets", "--format", "$(RELEASE) $(COMPONENT) $(REPO_URI)"]
            )
            mirrors = re.findall(rf"^{base} main (\S+)$", targets, re.MULTILINE) if base else []
            if not mirrors:
                raise HostError(
                    f"the apt sources name no Debian mirror that could have {self._release}",
                    "add the base release's main component to /etc/apt/sources.list",
                )
            signed = f"Signed-By: {KEYRING}\n" if Path(KEYRING).exists() else ""
            path.parent.mkdir(parents=True, exist_ok=True)
            suite = f"{base}-backports" if self._release == "backports" else self._release
            path.write_text(
                f"Types: deb\nURIs: {mirrors[0]}\nSuites: {suite}\nComponents: main\n{signed}"
            )
        return path


def find_kernel_package(
    places: Mapping[str, Any], series: str | None, progress: Callable[[str], None]
) -> tuple[Apt, list[str]]:
    """The newest kernel of ``series`` that a release has.

    :returns: the ``Apt`` that has the kernel, and the packages with its files, the one with its
        name first.
    :param places: the table ``kernel`` of ``images/default.toml``. ``releases``: where to look, as
        in ``Apt``. ``packages``: a package that depends on the newest kernel -> the end of the
        names of such kernels.
    :param series: such as "6.12"; None for the kernel of the first release that has any.
    :raises HostError: none of them has one.
    """
    prefix = "linux-image-"
    failure: HostError | None = None
    metas: dict[str, str] = places["packages"]
    for release in places["releases"]:
        apt = Apt(release, progress)
        try:
            known = apt.names(prefix)
            meta = next((name for name in metas if name in known), next(iter(metas)))
            names = [name for name in apt.depends(meta) if name.startswith(prefix)]
            if series is not None:
                first = f"{prefix}{series}."
                names = [n for n in names if n == first[:-1] or n.startswith(first)] or sorted(
                    (n for n in apt.names(first) if n.endswith(f"-{metas[meta]}")),
                    key=lambda n: [int(x) for x in re.findall(r"\d+", n)],
                    reverse=True,
                )
            for name in names:
                if packages := _files_of(apt, name, name.removeprefix(prefix)):
                    return apt, packages
        except HostError as e:
            failure = failure or e
    if failure is not None:
        raise failure
    raise HostError(
        f"apt knows no kernel {f'{series} ' if series else ''}for virtual machines",
        "choose another --kernel-version",
    )


def _files_of(apt: Apt, name: str, number: str) -> list[str]:
    """The packages with the files of the kernel package ``name``, itself first; empty if the
    release has some of them no longer.
    """
    # Since 7.0 the files are in packages of their own; base has the list of what is built in.
    base, *needed = (f"linux-{part}-{number}" for part in ("base", "binary", "modules"))
    parts = set(apt.depends(name)) & {base, *needed}
    there = apt.names("linux-") if parts else set()
    if parts & set(needed) - there:
        return []
    return [name, *sorted(parts & there)]


@contextlib.contextmanager
def apts_directory(mine: Path) -> Iterator[str]:
    """A new directory into which apt can download. It is removed at the end.

    As root, apt downloads as the user _apt, who must be able to write to the directory and to enter
    all directories above it; otherwise what the network sends would be parsed as root.

    :param mine: the place of the directory if this user is not root.
    """
    root = os.geteuid() == 0
    with tempfile.TemporaryDirectory(dir="/tmp" if root else mine, prefix="pyvmm-apt-") as path:
        partial = Path(path, "partial")
        partial.mkdir(0o700)
        if root:
            try:
                user = pwd.getpwnam("_apt").pw_uid
            except KeyError:
                user = 0  # an apt without that user
            for directory in (path, partial):
                os.chown(directory, user, 0)
                os.chmod(directory, 0o700 if directory == partial else 0o755)
        yield path


def codename() -> str:
    """The code name of this machine's Debian release, such as "bookworm"; empty if the system is
    not Debian.
    """
    try:
        text = Path("/etc/os-release").read_text()
    except OSError:
        return ""
    values = dict(re.findall(r'^(\w+)="?([^"\n]*)"?$', text, re.MULTILINE))
    return values.get("VERSION_CODENAME", "") if values.get("ID") == "debian" else ""


def unpack(deb: Path, into: Path) -> None:
    """Unpack the files of ``deb`` below ``into``, which is created if necessary. This needs no root
    and runs no maintainer script.
    """
    into.mkdir(parents=True, exist_ok=True)
    _run(["dpkg-deb", "-x", str(deb), str(into)])


def _run(command: list[str], cwd: str | None = None) -> str:
    env = dict(os.environ, LC_ALL="C.UTF-8", DEBIAN_FRONTEND="noninteractive")
    try:
        done = subprocess.run(
            command,
            executable=program(command[0]),
            cwd=cwd,
            env=env,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )
    except FileNotFoundError:
        raise HostError(f"{command[0]} is missing", "use Debian 12 or later") from None
    if done.returncode:
        said = done.stderr.splitlines() or [str(done.returncode)]
        if any("No space left" in line for line in said):
            raise HostError(
                f"{command[0]}: no space left on the device", "make room, or set XDG_CACHE_HOME"
            )
        cause = next(
            (line for line in reversed(said) if line.startswith("E:")), said[-1]
        ).removeprefix("E: ")
        raise HostError(f"{command[0]} failed: {cause}", "check the network and the apt sources")
    return done.stdout


def _sha256(path: Path) -> str:
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()
