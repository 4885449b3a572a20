"""Programs and their shared libraries out of Debian's packages.

Which packages have the libraries is not listed anywhere, because that differs between releases
(``libssl3`` became ``libssl3t64``). The packages that a program's package depends on are asked, as
far as the program needs them.
"""

from __future__ import annotations

import re

from pyvmm.errors import BuildError
from pyvmm.host.apt import unpack
from pyvmm.images.elf import lacking

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from pathlib import Path

    from pyvmm.host.apt import Apt, Package


def gather(
    apt: Apt, names: Iterable[str], programs: Callable[[], Iterable[Path]], root: Path
) -> list[Package]:
    """Unpack the packages ``names``, and those from which ``programs`` need shared libraries.

    :param programs: returns the ELF files whose libraries are wanted; called when the packages
        ``names`` have been unpacked.
    :param root: directory below which all is unpacked.
    :returns: the packages, in the order in which they were unpacked.
    :raises BuildError: no package that was asked has a library that is needed.
    :raises HostError: apt fails.
    """
    got: list[Package] = []
    wanted = list(dict.fromkeys(names))
    needs = apt.closure(wanted)
    pool = _libraries(needs, wanted)
    while True:
        packages = apt.resolve(wanted)
        for package, deb in zip(packages, apt.download(packages), strict=True):
            unpack(deb, root)
            got.append(package)
        lacks = {name for program in programs() for name in lacking(program, [root])}
        if not lacks:
            return got
        have = {package.name for package in got}
        left = [name for name in pool if name not in have]
        # A library's package is named after the library, in most cases. Else ask what the packages
        # so far need directly.
        plain = {_plain(name) for name in lacks}
        direct = {name for one in have for name in needs.get(one, ())}
        wanted = [name for name in left if _plain(name) in plain] or [
            name for name in left if name in direct and not name.endswith("-dev")
        ]
        if not wanted:
            raise BuildError(
                f"{', '.join(sorted(lacks))}: in no package that {', '.join(names)} depends on",
                "check the apt sources",
            )


def _libraries(needs: dict[str, list[str]], names: list[str]) -> list[str]:
    """The packages of libraries that ``names`` need, directly or through other libraries."""
    found: dict[str, None] = {}
    left = list(names)
    while left:
        for name in needs.get(left.pop(0), ()):
            if name.startswith(("lib", "zlib")) and name in needs and name not in found:
                found[name] = None
                left.append(name)
    return list(found)


def _plain(name: str) -> str:
    """What the name of a library and that of its package have in common: ``libnl3200`` for
    ``libnl-3.so.200`` and ``libnl-3-200``, ``libssl3`` for ``libssl.so.3`` and ``libssl3t64``.
    """
    return "libz1" if name == "zlib1g" else re.sub(r"t64$|\.so|[-_.]", "", name)
