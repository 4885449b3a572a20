"""Builds guest images, each a kernel and an initramfs, from ``images/`` and ``guest/``. The same
inputs always give the same bytes.

A new image goes to ``.store/HASH`` in the images' directory. Then the link with the image's name is
moved to it, so that a reader sees the old image or the new one, never a part of either.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import platform
import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

from pyvmm import images
from pyvmm.errors import BuildError, HostError, ImageError
from pyvmm.host.apt import Apt, find_kernel_package, unpack
from pyvmm.images import FILES, Image, sources
from pyvmm.images.additions import INIT_MODULES
from pyvmm.images.cpio import Archive
from pyvmm.images.elf import libraries, needed
from pyvmm.images.kernel import Kernel, Modules, extract_vmlinux, trim_zeros
from pyvmm.images.packages import gather
from pyvmm.images.sources import RECIPE
from pyvmm.images.tiny import tiny_kernel
from pyvmm.programs import install, which

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import Any

    from pyvmm.host.apt import Package

    Progress = Callable[[str], None]

FORMAT = 1  # the version of image.json


@dataclass(slots=True)
class Userland:
    """Programs to put into an image.

    :ivar programs: the program files by name.
    :ivar roots: the root directories below which shared libraries are searched.
    """

    programs: dict[str, Path] = field(default_factory=dict)
    roots: list[Path] = field(default_factory=list)


def image_name(series: str | None = None, *, from_host: bool = False, tiny: bool = False) -> str:
    """The name of the image that these options of ``build`` make."""
    return "tiny" if tiny else "host" if from_host else series or "default"


def build(
    series: str | None = None,
    *,
    from_host: bool = False,
    tiny: bool = False,
    output: Path | None = None,
    force: bool = False,
    progress: Progress = lambda _: None,
) -> tuple[Image, bool]:
    """Build an image, unless the present one has the same inputs.

    Only ``force`` looks up new versions of packages: an image does not change just because the
    mirror has changed.

    :param series: a series of Debian's kernel, such as "6.12"; None for the one that this Debian
        release has.
    :param from_host: take kernel, modules and programs from this machine instead of from packages.
    :param tiny: build the kernel from Debian's source with ``images/tiny/config``.
    :param output: also copy the image's files to this directory.
    :param force: build the image again from the newest packages.
    :param progress: called with one line before each step that may take seconds.
    :returns: the image, and whether it has been built anew.
    :raises BuildError: an input is missing, a step fails, or the options contradict each other.
    """
    if (series is not None) + from_host + tiny > 1:
        raise BuildError(
            "only one of --tiny, --from-host and --kernel-version can be chosen", "give one of them"
        )
    recipe = sources.recipe()
    name = image_name(series, from_host=from_host, tiny=tiny)
    store = Path(images.directory())
    compiler = sources.compiler() if tiny else ""
    with _lock(store):
        key = _key(series, from_host, tiny, compiler)
        image = None if force else _current(name, key)
        fresh = image is None
        if image is None:
            for stale in store.glob(".build-*"):  # left behind by a build that was killed
                shutil.rmtree(stale, ignore_errors=True)
            with tempfile.TemporaryDirectory(dir=store, prefix=".build-") as scratch:
                inputs: list[dict[str, str]] = []
                kernel, userland = _gather(
                    recipe, series, from_host, tiny, compiler, Path(scratch), inputs, progress
                )
                progress("packing the initramfs")
                initrd, loaded = _initramfs(recipe, kernel, userland, sources.init(Path(scratch)))
                files = {"vmlinux": kernel.vmlinux, "bzImage": kernel.bzimage, "initrd": initrd}
                info = {
                    "format": FORMAT,
                    "name": name,
                    "version": kernel.release,
                    "key": key,
                    "inputs": inputs,
                    "modules": loaded,
                    "files": {
                        n: {"size": len(d), "sha256": hashlib.sha256(d).hexdigest()}
                        for n, d in files.items()
                    },
                }
                files["image.json"] = (json.dumps(info, indent=1) + "\n").encode()
                image = _publish(name, files, store, Path(scratch))
    if output is not None:
        _copy(image, output)
    return image, fresh


def _gather(
    recipe: dict[str, Any],
    series: str | None,
    from_host: bool,
    tiny: bool,
    compiler: str,
    scratch: Path,
    inputs: list[dict[str, str]],
    progress: Progress,
) -> tuple[Kernel, Userland]:
    """Fetch or compile kernel and programs, and add the files and packages that they are made of to
    ``inputs``.
    """
    if from_host:
        return _host_kernel(inputs), _host_userland(recipe, inputs, progress)
    try:
        apt = Apt(progress=progress)
        userland = _package_userland(recipe, apt, scratch / "user", inputs)
        if tiny:
            return tiny_kernel(apt, compiler, inputs, progress), userland
        return _package_kernel(recipe, series, scratch / "kernel", inputs, progress), userland
    except HostError as e:
        raise BuildError(e.cause, f"{e.hint}, or build with --from-host") from None


# --- the inputs of an image -----------------------------------------------------------------------


def _key(series: str | None, from_host: bool, tiny: bool, compiler: str) -> str:
    """A hash of all inputs of an image except the versions of packages."""
    kernel = _host_release() if from_host else "tiny" if tiny else series or ""
    made_of = f"{FORMAT} {kernel} {from_host} {compiler} {sources.init_identity()}\n"
    digest = hashlib.sha256(made_of.encode())
    files = [p for p in sorted(RECIPE.parent.iterdir()) if p.is_file()]
    files += sorted(Path(__file__).parent.glob("*.py"))
    if tiny:
        files += sorted(sources.TINY.iterdir())
    for path in files:
        data = path.read_bytes()
        digest.update(f"{path.name} {len(data)}\n".encode() + data)
    return digest.hexdigest()[:32]


def _current(name: str, key: str) -> Image | None:
    """The image ``name`` if it is complete and has the inputs of ``key``, else None."""
    try:
        image = images.find(name)
        info: dict[str, Any] = image.info
        sizes = {n: Path(image.directory, n).stat().st_size for n in FILES[:3]}
        same = info["key"] == key and all(
            info["files"][n]["size"] == size for n, size in sizes.items()
        )
        files = [(i["name"], i["sha256"]) for i in info["inputs"] if i["name"].startswith("/")]
        return (
            image if same and all(_sha256(Path(path)) == sha256 for path, sha256 in files) else None
        )
    except (ImageError, OSError, KeyError, TypeError):
        return None


def _package_kernel(
    recipe: dict[str, Any],
    series: str | None,
    root: Path,
    inputs: list[dict[str, str]],
    progress: Progress,
) -> Kernel:
    """Debian's or Ubuntu's kernel of ``series``, or else the one that this release has, unpacked
    below ``root``.
    """
    apt, names = find_kernel_package(recipe["kernel"], series, progress)
    packages = apt.resolve(names)
    for deb in apt.download(packages):
        unpack(deb, root)
    inputs += map(_input, packages)
    modules = next(p for where in ("usr/lib", "lib") for p in root.glob(f"{where}/modules/*"))
    release = modules.name
    bzimage = root / "boot" / f"vmlinuz-{release}"
    if not bzimage.exists():
        bzimage = modules / "vmlinuz"  # where Debian 14 has it
    progress(f"extracting vmlinux {release}")
    data = bzimage.read_bytes()
    return Kernel(release, data, trim_zeros(extract_vmlinux(data)), Modules(modules))


def _package_userland(
    recipe: dict[str, Any], apt: Apt, root: Path, inputs: list[dict[str, str]]
) -> Userland:
    """The programs and libraries of the recipe's packages, which are unpacked below ``root``."""
    programs: dict[str, Path] = {}

    def find_programs() -> list[Path]:
        for name, package in recipe["programs"].items():
            places = [root / d / name for d in ("usr/bin", "bin", "usr/sbin", "sbin")]
            found = next((p for p in places if p.is_file()), None)
            if found is None:
                raise BuildError(f"package {package} has no program {name}", f"correct {RECIPE}")
            programs[name] = found
        return list(programs.values())

    inputs += map(_input, gather(apt, recipe["programs"].values(), find_programs, root))
    return Userland(programs, [root])


def _input(package: Package) -> dict[str, str]:
    return {"name": package.name, "version": package.version, "sha256": package.sha256}


def _host_release() -> str:
    """The release of the running kernel if its file and modules are there, else of the newest
    kernel that has both.
    """
    releases = [
        p.name for p in Path("/lib/modules").glob("*") if Path(f"/boot/vmlinuz-{p.name}").exists()
    ]
    releases.sort(key=lambda r: [int(n) for n in re.findall(r"\d+", r)])
    if not releases:
        raise BuildError(
            "no kernel with its modules in /boot and /lib/modules", "build without --from-host"
        )
    return platform.release() if platform.release() in releases else releases[-1]


def _host_kernel(inputs: list[dict[str, str]]) -> Kernel:
    release = _host_release()
    path = Path(f"/boot/vmlinuz-{release}")
    try:
        data = path.read_bytes()
    except PermissionError:
        raise BuildError(
            f"{path} may not be read", f"run: sudo chmod a+r {path}; or build without --from-host"
        ) from None
    inputs.append(_file_input(path))
    return Kernel(
        release, data, trim_zeros(extract_vmlinux(data)), Modules(Path("/lib/modules", release))
    )


def _host_userland(
    recipe: dict[str, Any], inputs: list[dict[str, str]], progress: Progress
) -> Userland:
    """The recipe's programs from this machine. A static busybox is required; other programs may be
    missing.
    """
    programs = {}
    for name, package in recipe["programs"].items():
        found = which(name, "/usr/sbin:/sbin:/usr/bin:/bin")
        if found:
            programs[name] = Path(found).resolve()
        elif name == "busybox":
            raise BuildError("busybox is not installed", install(package))
        else:
            progress(f"{name} is not installed: left out ({install(package)})")
    if any(needed(programs["busybox"])):
        raise BuildError("busybox is not static", install("busybox-static"))
    roots = [Path("/")]
    needs = {path for program in programs.values() for path in libraries(program, roots).values()}
    inputs += [_file_input(path) for path in sorted({*programs.values(), *needs})]
    return Userland(programs, roots)


def _file_input(path: Path) -> dict[str, str]:
    return {"name": str(path), "version": "", "sha256": _sha256(path)}


# --- the initramfs --------------------------------------------------------------------------------


def _initramfs(
    recipe: dict[str, Any], kernel: Kernel, userland: Userland, init: bytes
) -> tuple[bytes, list[str]]:
    """The initramfs as a cpio archive, and the paths of the modules that init loads, in order."""
    archive = Archive()
    for path in ("/dev", "/proc", "/sys", "/tmp", "/run", "/root", "/mnt", "/sbin"):
        archive.directory(path)
    archive.device("/dev/console", 5, 1)
    archive.device("/dev/null", 1, 3, 0o666)
    archive.file("/init", init, 0o755)
    for path, text in recipe["files"].items():
        archive.file(path, text.encode())
    for path, name in recipe["scripts"].items():
        archive.file(path, RECIPE.with_name(name).read_bytes(), 0o755)
    for name, file in userland.programs.items():
        archive.file(f"/bin/{name}", file.read_bytes(), 0o755)
        for path, library in libraries(file, userland.roots).items():
            archive.file(path, library.read_bytes(), 0o755)
    for path, target in recipe["links"].items():
        if target.startswith("/") or target in userland.programs:
            archive.symlink(path, target)
    taken = set(archive.paths())
    for applet in _applets(userland.programs["busybox"]):
        if f"/bin/{applet}" not in taken:
            archive.symlink(f"/bin/{applet}", "busybox")
    lists: list[list[str]] = [[] for _ in INIT_MODULES]
    if kernel.modules is not None:
        lists = _add_modules(archive, kernel, kernel.modules, recipe["modules"])
    for path, names in zip(INIT_MODULES, lists, strict=True):
        archive.file(f"/{path}", "".join(f"{name}\n" for name in names).encode())
    return archive.pack(), lists[0]


def _add_modules(
    archive: Archive, kernel: Kernel, modules: Modules, wanted: dict[str, list[str]]
) -> list[list[str]]:
    """Add the modules, and the list by which modprobe finds them, to the archive.

    :param wanted: names of modules: ``load`` for those that init loads; ``shares`` and ``disks``
        for those that it loads for shares and for disks, which are left out if the kernel does not
        have them; ``extra`` for others.
    :returns: the paths of the modules of each of INIT_MODULES, in order.
    """
    later = [[name for name in wanted[key] if modules.has(name)] for key in ("shares", "disks")]
    found = modules.closure(wanted["load"] + wanted["extra"] + later[0] + later[1])
    root = f"/lib/modules/{kernel.release}"
    depends = []
    for name, (path, _, data) in found.items():
        archive.file(f"{root}/{path}", data)
        # modprobe loads the modules of a line from the last to the first.
        needs = list(modules.closure([name]))[:-1]
        depends.append(f"{path}:{''.join(' ' + found[n][0] for n in reversed(needs))}\n")
    archive.file(f"{root}/modules.dep", "".join(sorted(depends)).encode())
    always = modules.closure(wanted["load"])
    others = [[n for n in modules.closure(names) if n not in always] for names in later]
    return [[found[n][0] for n in names] for names in ([*always], *others)]


def _applets(busybox: Path) -> list[str]:
    try:
        done = subprocess.run([busybox, "--list"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as e:
        raise BuildError(f"busybox does not run: {e}", "build on an x86-64 machine") from None
    return done.stdout.split()


# --- the store ------------------------------------------------------------------------------------


@contextlib.contextmanager
def _lock(store: Path) -> Iterator[None]:
    """Allow one build at a time in ``store``, which is created if necessary.

    :raises BuildError: a file cannot be written.
    """
    try:
        store.mkdir(parents=True, exist_ok=True)
        with (store / ".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield
    except PermissionError as e:
        raise BuildError(
            f"{e.filename} may not be written", "set XDG_CACHE_HOME to a directory of your own"
        ) from None
    except OSError as e:
        raise BuildError(
            f"cannot build the image: {e}", "make room, or set XDG_CACHE_HOME"
        ) from None


def _publish(name: str, files: dict[str, bytes], store: Path, scratch: Path) -> Image:
    """Put ``files`` into the store, move the link ``name`` to them, and remove all images to which
    no link points any more.
    """
    fresh = scratch / "image"
    fresh.mkdir()
    for file, data in files.items():
        (fresh / file).write_bytes(data)
    digest = hashlib.sha256(files["image.json"]).hexdigest()[:32]
    home = store / ".store" / digest
    home.parent.mkdir(exist_ok=True)
    if home.exists():
        shutil.rmtree(home)  # it is damaged, or the same image has been built again
    fresh.rename(home)
    link = scratch / "link"
    link.symlink_to(Path(".store", digest))
    link.rename(store / name)
    used = {path.resolve().name for path in store.iterdir() if path.is_symlink()}
    for old in home.parent.iterdir():
        if old.name not in used:
            shutil.rmtree(old, ignore_errors=True)
    return images.find(name)


def _copy(image: Image, output: Path) -> None:
    """Copy the files of ``image`` to ``output``, image.json last."""
    try:
        output.mkdir(parents=True, exist_ok=True)
        for file in FILES:
            part = output / f".{file}.part"
            shutil.copyfile(Path(image.directory, file), part)
            part.rename(output / file)
    except OSError as e:
        raise BuildError(
            f"cannot write to {output}: {e.strerror}", "choose another --output"
        ) from None


def _sha256(path: Path) -> str:
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()
