"""A small kernel, compiled from Debian's linux-source package with ``images/tiny/config``. It has
all of virtio-net built in, and no modules.

Compiling takes minutes. The result is therefore kept in a cache of its own, under the hash of its
inputs.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

from pyvmm.errors import BuildError
from pyvmm.host.apt import unpack
from pyvmm.host.paths import cache_root
from pyvmm.images.kernel import Kernel, extract_vmlinux
from pyvmm.images.sources import TINY
from pyvmm.programs import install, program, which

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from pyvmm.host.apt import Apt, Package

PACKAGE = "linux-source-6.1"
CONFIG = TINY / "config"
JOBS = 2  # compile in so many processes at most, so that a small machine stays usable
#: Fixed values for everything in the kernel that would depend on user, host and time.
FIXED = {
    "KBUILD_BUILD_TIMESTAMP": "Thu Jan  1 00:00:00 UTC 1970",
    "KBUILD_BUILD_USER": "pyvmm",
    "KBUILD_BUILD_HOST": "pyvmm",
    "KBUILD_BUILD_VERSION": "1",
}
TOOLS = {
    "make": "make",
    "gcc": "gcc",
    "ld": "binutils",
    "flex": "flex",
    "bison": "bison",
    "bc": "bc",
    "xz": "xz-utils",
    "perl": "perl",
}
#: Parts of the source whose C files the tiny kernel does not need; they are most of its size. Their
#: Kconfig files and Makefiles are still needed.
UNUSED = (
    "drivers/gpu",
    "drivers/media",
    "drivers/staging",
    "drivers/net/ethernet",
    "drivers/net/wireless",
    "drivers/scsi",
    "sound",
)


def tiny_kernel(
    apt: Apt, compiler: str, inputs: list[dict[str, str]], progress: Callable[[str], None]
) -> Kernel:
    """The tiny kernel, which is compiled unless it is in the cache.

    :param compiler: one line that identifies the compiler.
    :param inputs: gets the source package.
    :raises BuildError: a tool is missing, or the build fails.
    :raises HostError: the source package cannot be had.
    """
    package = apt.resolve([PACKAGE])[0]
    inputs.append({"name": package.name, "version": package.version, "sha256": package.sha256})
    config = CONFIG.read_text()
    key = hashlib.sha256(
        "\n".join([package.sha256, compiler, json.dumps(FIXED), config]).encode()
    ).hexdigest()[:32]
    home = Path(cache_root()) / "kernels" / key
    if not home.exists():
        _compile(apt, package, config, home, progress)
    bzimage = (home / "bzImage").read_bytes()
    return Kernel((home / "release").read_text(), bzimage, extract_vmlinux(bzimage), None)


def _compile(
    apt: Apt, package: Package, config: str, home: Path, progress: Callable[[str], None]
) -> None:
    missing = sorted({deb for tool, deb in TOOLS.items() if which(tool) is None})
    if not Path("/usr/include/libelf.h").exists():
        missing.append("libelf-dev")
    if missing:
        raise BuildError("tools to compile a kernel are missing", install(*missing))
    home.parent.mkdir(parents=True, exist_ok=True)
    deb = apt.download([package])[0]
    for stale in home.parent.glob(".build-*"):  # left behind by a build that was killed
        shutil.rmtree(stale, ignore_errors=True)
    with tempfile.TemporaryDirectory(dir=home.parent, prefix=".build-") as scratch:
        tree, out = Path(scratch, "tree"), Path(scratch, "out")
        progress("unpacking the kernel's source")
        unpack(deb, Path(scratch, "deb"))
        tree.mkdir()
        out.mkdir()
        # Leaving out these C files saves half the time and space.
        excluded = [f"--exclude=*/{part}/*.{kind}" for part in UNUSED for kind in "ch"]
        tarball = next(Path(scratch, "deb", "usr", "src").glob("linux-source-*.tar.xz"))
        _run(
            [
                "tar",
                "-xf",
                str(tarball),
                "-C",
                str(tree),
                "--strip-components=1",
                "--wildcards",
                *excluded,
            ]
        )
        progress("configuring the kernel")
        make = ["make", "-C", str(tree), f"O={out}"]
        (out / "fragment").write_text(config)
        _run([*make, f"KCONFIG_ALLCONFIG={out}/fragment", "allnoconfig"])
        check_config(config, (out / ".config").read_text())
        _make(
            [*make, f"-j{min(JOBS, os.cpu_count() or 1)}", "bzImage"],
            Path(scratch, "log"),
            progress,
        )
        result = Path(scratch, "result")
        result.mkdir()
        shutil.copy(out / "arch" / "x86" / "boot" / "bzImage", result)
        shutil.copy(out / ".config", result / "config")
        (result / "release").write_text(
            (out / "include" / "config" / "kernel.release").read_text().strip()
        )
        result.rename(home)


def check_config(wanted: str, got: str) -> None:
    """Check that the configuration ``got`` has each option of ``wanted``. Kconfig silently drops
    options that it does not know or allow.

    :raises BuildError: options are missing; the error names the first.
    """
    have = set(got.splitlines())
    lost = [
        line
        for line in wanted.splitlines()
        if line.removeprefix("# ").startswith("CONFIG_") and line not in have
    ]
    # An option whose menu is not shown at all counts as unset.
    lost = [
        line
        for line in lost
        if not (line.endswith(" is not set") and f"\n{line.split()[1]}=" not in f"\n{got}")
    ]
    if lost:
        raise BuildError(
            f"{CONFIG.name}: '{lost[0]}' has no effect (one of {len(lost)} such lines)",
            "correct images/tiny/config",
        )


def _make(command: list[str], log: Path, progress: Callable[[str], None]) -> None:
    """Run make, which takes long, and report progress every 10 s."""
    start = last = time.monotonic()
    progress("compiling the kernel (some minutes)")
    with log.open("w+") as out:
        process = subprocess.Popen(
            command,
            executable=program(command[0]),
            env={**_environment(), **FIXED},
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
        )
        try:
            while process.poll() is None:
                time.sleep(0.2)
                if time.monotonic() - last >= 10:
                    last = time.monotonic()
                    files = sum(
                        line.startswith("  ")
                        for line in log.read_text(errors="replace").splitlines()
                    )
                    progress(f"compiling the kernel: {files} steps in {last - start:.0f} s")
        finally:
            if process.poll() is None:
                process.terminate()
                process.wait()
        if process.returncode:
            lines = log.read_text(errors="replace").splitlines()
            line = next((x for x in lines if "rror" in x), lines[-1] if lines else "")
            raise BuildError(
                f"the kernel does not compile: {line.strip()[:300]}", "see images/tiny/config"
            )


def _run(command: list[str]) -> None:
    done = subprocess.run(
        command,
        executable=program(command[0]),
        env={**_environment(), **FIXED},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        lines = done.stderr.strip().splitlines()
        raise BuildError(
            f"{command[0]} failed: {lines[-1] if lines else done.returncode}",
            "check that the disk is not full",
        )


def _environment() -> dict[str, str]:
    """The environment without the variables that could change a kernel build."""
    return {k: v for k, v in os.environ.items() if k in ("PATH", "HOME", "TMPDIR", "USER")} | {
        "LC_ALL": "C"
    }
