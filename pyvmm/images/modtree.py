"""Trees of kernel modules for the guest (``--modules``): what ``make modules_install`` makes, or
the build tree of a kernel.
"""

from __future__ import annotations

import os
import zlib
from lzma import LZMAError

from pyvmm.errors import ImageError
from pyvmm.images import kmod
from pyvmm.images.cpio import HostFile
from pyvmm.images.kernel import decompress, modinfo_items, module_name

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from pyvmm.images.cpio import Archive

SUFFIXES = (".ko", ".ko.gz", ".ko.xz", ".ko.zst")
#: Files of a tree by which it is known.
MARKS = ("kernel", "modules.dep", "modules.order", "modules.builtin")
#: Indexes that kmod's modprobe reads in place of texts (pyvmm/images/kmod.py).
DEP_BIN, ALIAS_BIN, BUILTIN_BIN = "modules.dep.bin", "modules.alias.bin", "modules.builtin.bin"
#: What is not packed as it is: paths may have changed, and without modules.dep, aliases are made.
REMADE = ("modules.dep", "modules.order", DEP_BIN)
ALIASES = ("modules.alias", ALIAS_BIN)


class Tree:
    """The modules of one kernel.

    :param directory: an INSTALL_MOD_PATH, its ``lib/modules``, one ``lib/modules/VERSION``, or the
        build tree of a kernel.
    :param release: gives the release of the guest's kernel; empty if it is unknown.
    :ivar version: the release that the modules are for.
    :ivar notes: what the user should know, one line each.
    :ivar needs: per module, by its path below ``lib/modules/VERSION``, the paths of the modules
        that it needs, in modules.dep's order: the last one is loaded first.
    :raises ImageError: there are no modules, or none for this kernel.
    """

    def __init__(self, directory: str, release: Callable[[], str]) -> None:
        self.notes: list[str] = []
        self._directory = directory
        self._modules: dict[str, str] = {}  # files of the host by the paths in the tree
        self._others: dict[str, str] = {}
        built = _text(f"{directory}/include/config/kernel.release").strip()
        if built:
            self._root, self.version = directory, built
        else:
            self._root, self.version = self._choose(release)
        kernel = release()
        if kernel and kernel != self.version:
            self.notes.append(
                f"the modules in {directory} are for {self.version}, but the kernel is {kernel}:"
                " modprobe will not find them"
            )
        if built:
            self._from_build_tree()
        else:
            self._from_installed()
        if not self._modules:
            raise self._bad("has no kernel modules")
        self.needs: dict[str, list[str]] = {}
        self._aliases: list[tuple[str, str]] = []  # pattern, module

    def _bad(self, cause: str) -> ImageError:
        return ImageError(
            f"--modules {self._directory!r} {cause}",
            "name the INSTALL_MOD_PATH of `make modules_install`, a lib/modules/VERSION, or a"
            " kernel's build tree after `make modules`",
        )

    def _choose(self, release: Callable[[], str]) -> tuple[str, str]:
        """The directory of one kernel's modules, and their release."""
        top = os.path.abspath(self._directory)
        try:
            os.listdir(top)
        except OSError as e:
            raise self._bad(f"cannot be read: {e.strerror}") from e
        if _is_tree(top):
            return top, os.path.basename(os.path.realpath(top))
        for base in (f"{top}/lib/modules", f"{top}/usr/lib/modules", top):
            try:
                names = sorted(os.listdir(base))
            except OSError:
                continue
            trees = [name for name in names if _is_tree(f"{base}/{name}")]
            if len(trees) == 1:
                return f"{base}/{trees[0]}", trees[0]
            if trees:
                kernel = release()
                if kernel in trees:
                    return f"{base}/{kernel}", kernel
                raise ImageError(
                    f"--modules {self._directory!r} has no modules for"
                    f" {kernel or 'this kernel, whose release is unknown'}: only"
                    f" {', '.join(trees)}",
                    f"name one of them: --modules {base}/{trees[-1]}",
                )
        raise self._bad("has no kernel modules")

    def _from_installed(self) -> None:
        def fail(e: OSError) -> None:
            raise self._bad(f"cannot be read: {e.filename}: {e.strerror}")

        for where, _, names in os.walk(self._root, onerror=fail):
            inside = os.path.relpath(where, self._root)
            for name in names:
                path = name if inside == "." else f"{inside}/{name}"
                if name.endswith(SUFFIXES):
                    self._modules[path] = f"{where}/{name}"
                elif inside == "." and name.startswith("modules."):
                    self._others[path] = f"{where}/{name}"

    def _from_build_tree(self) -> None:
        order = _text(f"{self._root}/modules.order").split()
        for line in order:
            path = line.removeprefix("kernel/")
            if path.endswith(".o"):  # since Linux 6.3
                path = path[:-2] + ".ko"
            if not os.path.isfile(f"{self._root}/{path}"):
                raise self._bad(f"lacks {path}")
            self._modules[f"kernel/{path}"] = f"{self._root}/{path}"
        for name in ("modules.builtin", "modules.builtin.modinfo"):
            if os.path.isfile(f"{self._root}/{name}"):
                self._others[name] = f"{self._root}/{name}"

    def add_to(self, place: Callable[[str, str], str], archive: Archive, beneath: str = "") -> None:
        """Add the modules, and what modprobe needs, to an archive.

        :param beneath: modules.dep of the initrd, whose other modules can be loaded as before.
        :param place: gives the path in the archive for a path in the guest and for what comes from
            a file of the host.
        :raises ImageError: a module cannot be read or unpacked.
        """
        base = f"lib/modules/{self.version}"
        dep = _text(self._others.get("modules.dep", ""))
        infos: dict[str, list[tuple[str, str]]] = {}
        for path, host in sorted(self._modules.items()):
            plain = _plain(path)
            where = place(f"{base}/{plain}", host)
            try:
                if path == plain:
                    archive.host_file(where, HostFile(host))
                if path == plain and dep:
                    continue
                with open(host, "rb") as f:
                    data = f.read()
                if path != plain:
                    data = decompress(data)
                    archive.file(where, data)
                if not dep:
                    infos[plain] = modinfo_items(data)
            except (OSError, ValueError, EOFError, zlib.error, LZMAError) as e:
                raise ImageError(
                    f"module {host!r} cannot be packed for the guest: {e}",
                    "install the modules again, or remove this one",
                ) from e
        names = {_name(path) for path in self._modules}
        for path, needs in _parse(beneath).items():
            if _name(path) not in names:
                self.needs[path] = needs
        if dep:
            self.needs |= _parse(dep)
        else:
            self._make(infos)
        for name, host in sorted(self._others.items()):
            if name in REMADE or (not dep and name in ALIASES):
                continue
            archive.host_file(place(f"{base}/{name}", host), HostFile(host))

        def made(name: str, data: bytes) -> None:
            archive.file(place(f"{base}/{name}", name), data)

        # Of two modules with one name the last is loaded, mostly that of updates/.
        lines = {
            _name(path): f"{path}:{''.join(f' {n}' for n in needs)}"
            for path, needs in self.needs.items()
        }
        made("modules.dep", os.fsencode("".join(f"{line}\n" for line in lines.values())))
        made(DEP_BIN, kmod.index(lines.items()))
        aliases = self._aliases
        if not dep:
            text = "".join(f"alias {alias} {name}\n" for alias, name in aliases)
            made("modules.alias", text.encode())
        elif "modules.alias" in self._others:
            words = (line.split() for line in _text(self._others["modules.alias"]).splitlines())
            aliases = [(w[1], w[2]) for w in words if len(w) == 3 and w[0] == "alias"]
        if not dep or ("modules.alias" in self._others and ALIAS_BIN not in self._others):
            made(ALIAS_BIN, kmod.index((kmod.pattern(a), name) for a, name in aliases))
        if BUILTIN_BIN not in self._others:
            builtin = _text(self._others.get("modules.builtin", "")).split()
            made(BUILTIN_BIN, kmod.index((_name(path), "") for path in builtin))

    def _make(self, infos: dict[str, list[tuple[str, str]]]) -> None:
        """Find dependencies and aliases, as depmod does, by what the modules say."""
        by_name = {_name(path): path for path in (*self.needs, *infos)}
        direct = self.needs | {
            path: [
                by_name[module_name(name)]
                for key, value in info
                if key == "depends"
                for name in value.split(",")
                if module_name(name) in by_name
            ]
            for path, info in infos.items()
        }

        def closure(path: str, found: dict[str, None], seen: set[str]) -> dict[str, None]:
            """What a module needs; each comes after what it needs itself."""
            for need in direct[path]:
                if need not in seen:
                    seen.add(need)
                    closure(need, found, seen)
                    found[need] = None
            return found

        for path in infos:
            self.needs[path] = list(closure(path, {}, {path}))[::-1]
        self._aliases = [
            (value, _name(path))
            for path, info in infos.items()
            if by_name[_name(path)] == path
            for key, value in info
            if key == "alias"
        ]

    def load_order(self, names: list[str]) -> list[str]:
        """The paths of these modules and of all that they need, in the order of loading. A module
        that the tree does not have may be built in, and is left out.
        """
        by_name = {_name(path): path for path in self.needs}
        out: dict[str, None] = {}
        for name in names:
            if name in by_name:
                path = by_name[name]
                out.update(dict.fromkeys([*reversed(self.needs[path]), path]))
        return list(out)


def _name(path: str) -> str:
    """The name of the module in a file."""
    return module_name(os.path.basename(path))


def _is_tree(path: str) -> bool:
    try:
        names = os.listdir(path)
    except OSError:
        return False
    return any(mark in names for mark in MARKS) and "Kconfig" not in names


def _parse(dep: str) -> dict[str, list[str]]:
    """The lines of modules.dep; a file may have lost the suffix of its compression."""
    lines = (line.partition(":") for line in dep.splitlines())
    return {
        _plain(path): [_plain(need) for need in needs.split()]
        for path, colon, needs in lines
        if colon
    }


def _plain(path: str) -> str:
    """The path of a module without the suffix of its compression."""
    head, ko, _ = path.rpartition(".ko")
    return head + ko if ko else path


def _text(path: str) -> str:
    """The content of a file; empty if it cannot be read."""
    try:
        with open(path, encoding="utf-8", errors="surrogateescape") as f:
            return f.read()
    except OSError:
        return ""
