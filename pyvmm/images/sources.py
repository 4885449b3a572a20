"""The files of which images are made: recipes, init and the configuration of the tiny kernel.

A checkout has them in ``images/`` and ``guest/``. An installed package has them in ``pyvmm/share``,
where init and the library of ``host.shim`` are compiled already: its user needs no compiler.
setup.py calls ``fill`` to make that directory.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import tomllib
from pathlib import Path

from pyvmm.errors import BuildError
from pyvmm.host import shim
from pyvmm.programs import install, program

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

PACKAGE = Path(__file__).resolve().parents[1]
SHARE = PACKAGE / "share"
ROOT = SHARE if SHARE.is_dir() else PACKAGE.parent
RECIPE = ROOT / "images" / "default.toml"
TINY = ROOT / "images" / "tiny"
INIT = ROOT / "guest" / "init.c"
INIT_HEADERS = (INIT.with_name("pyvmm_port.h"),)
#: init, compiled when the package was built.
INIT_BUILT = SHARE / "guest" / "init"
CFLAGS = (
    "-std=gnu11",
    "-Os",
    "-static",
    "-s",
    "-fno-asynchronous-unwind-tables",
    "-Wl,--build-id=none",
)


def recipe() -> dict[str, Any]:
    """What images are made of, from ``images/default.toml``.

    :raises BuildError: the file is missing.
    """
    if not RECIPE.exists():
        raise BuildError(f"{RECIPE} is missing", "install pyvmm again")
    return tomllib.loads(RECIPE.read_text())


def compiler() -> str:
    """One line that identifies compiler and C library.

    :raises BuildError: one of them is missing.
    """
    try:
        version = subprocess.run(
            [program("gcc"), "--version"], capture_output=True, text=True, check=True
        ).stdout
        libc = subprocess.run(
            [program("gcc"), "-print-file-name=libc.a"], capture_output=True, text=True, check=True
        ).stdout
        return f"{version.splitlines()[0]}, libc.a {_sha256(Path(libc.strip()))[:16]}"
    except (OSError, subprocess.CalledProcessError):
        raise BuildError(
            "gcc or its static C library is missing", install("gcc", "libc6-dev")
        ) from None


def init_identity() -> str:
    """One line that says of what init is made. Two lines that are equal mean equal bytes.

    :raises BuildError: init has to be compiled, and the compiler is missing.
    """
    if INIT_BUILT.is_file():
        return f"init {_sha256(INIT_BUILT)}"
    sources = " ".join(_sha256(path) for path in (INIT, *INIT_HEADERS))
    return f"{compiler()} {sources}"


def init(scratch: Path) -> bytes:
    """The program init.

    :param scratch: a directory for the compiler's output.
    :raises BuildError: init has to be compiled, and that fails.
    """
    return INIT_BUILT.read_bytes() if INIT_BUILT.is_file() else _compile(INIT, scratch / "init")


def _compile(source: Path, to: Path) -> bytes:
    command = [program("gcc"), *CFLAGS, f"-ffile-prefix-map={source.parent}=."]
    done = subprocess.run(
        [*command, "-o", str(to), str(source)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        line = next(
            (x for x in done.stderr.splitlines() if "error" in x), done.stderr.strip()[-200:]
        )
        raise BuildError(f"guest/init.c does not compile: {line}", "correct it")
    return to.read_bytes()


def fill(share: Path) -> None:
    """Make the directory ``share`` of an installed package from a checkout.

    :raises BuildError: the compiler is missing, or init does not compile.
    """
    compiler()
    shutil.rmtree(share, ignore_errors=True)
    shutil.copytree(RECIPE.parent, share / "images")
    (share / "guest").mkdir()
    for path in (INIT, *INIT_HEADERS):
        shutil.copy(path, share / "guest")
    _compile(INIT, share / "guest" / "init")
    (share / "testbed").mkdir()
    shim.compile_shim(shim.SOURCE, str(share / "testbed" / "shim.so"))


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
