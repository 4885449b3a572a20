"""DPDK's dpdk-testpmd as a foreign vhost-user back-end and front-end: where it is, how it is
fetched, how it is started.

Debian's package dpdk-dev, which has it, depends on 226 others, systemd among them. What testpmd
loads is 6 MB, which ``python -m tests.dpdk`` (part of ``make setup``) unpacks into the cache,
unless it is installed.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import IO, TYPE_CHECKING

from pyvmm.errors import HostError, PyvmmError
from pyvmm.host.apt import Apt
from pyvmm.host.paths import cache_root
from pyvmm.images.packages import gather

if TYPE_CHECKING:
    from collections.abc import Sequence

#: Its program is linked with all of DPDK's libraries, and the drivers are loaded at run time.
PACKAGE, PROGRAM = "dpdk-dev", "usr/bin/dpdk-testpmd"
DRIVERS = ("mempool-ring", "net-tap", "net-vhost", "net-virtio")
#: Has libraries that are not named after it.
PROVIDERS = "ibverbs-providers"
LIB = "usr/lib/x86_64-linux-gnu"
REMEDY = "run: make check (or install the packages dpdk and dpdk-dev)"


def root() -> Path:
    """Where it is unpacked."""
    return Path(cache_root()) / "dpdk" / "root"


def drivers() -> list[Path]:
    """The files of the drivers that the tests name."""
    return [
        path
        for name in DRIVERS
        for path in sorted((root() / LIB).glob(f"librte_{name.replace('-', '_')}.so.??"))
    ]


def fetch() -> None:
    """Unpack it into the cache, unless it is there or installed. :raises PyvmmError: apt fails."""
    if shutil.which("dpdk-testpmd") or (root() / PROGRAM).exists():
        return
    apt = Apt(progress=lambda line: print(f"dpdk: {line}", file=sys.stderr))
    # The number in the names of its libraries changes with each release.
    abi = next(m[1] for n in apt.depends(PACKAGE) if (m := re.fullmatch(r"librte-eal(\d+)", n)))
    names = [PACKAGE, PROVIDERS, *(f"librte-{name}{abi}" for name in DRIVERS)]
    shutil.rmtree(root(), ignore_errors=True)
    fresh = root().with_name(f"root.{os.getpid()}")
    gather(
        apt,
        names,
        lambda: [fresh / PROGRAM, *(fresh / LIB).glob("librte_*.so.??")],
        fresh,
    )
    # DPDK refuses drivers in directories that others may write to.
    for path in fresh.rglob("*"):
        if path.is_dir():
            path.chmod(0o755)
    fresh.rename(root())


def command(*vdevs: str, options: Sequence[str] = (), memory: int = 128, cpu: int = 0) -> list[str]:
    """argv of testpmd on one core, without huge pages and without a console of its own.

    :param vdevs: virtual devices, in the order of their ports. :param options: testpmd's own, as
        ``--forward-mode=io``.
    :param memory: MiB. :param cpu: its core. :raises HostError: it is not there.
    """
    program, installed = root() / PROGRAM, shutil.which("dpdk-testpmd")
    if (
        installed
    ):  # first: each loads all drivers of the system's directory, and two of a kind do not get on
        argv = [installed]
    elif program.exists():
        argv = ["env", f"LD_LIBRARY_PATH={root() / LIB}", str(program)]
        for path in drivers():
            argv += ["-d", str(path)]
    else:
        raise HostError("dpdk-testpmd is missing", REMEDY)
    argv += [
        "--no-huge",
        "-m",
        str(memory),
        "--no-shconf",
        "--no-pci",
        "--no-telemetry",
        "--lcores",
        f"0@{cpu},1@{cpu}",
    ]
    for vdev in vdevs:
        argv += ["--vdev", vdev]
    return [*argv, "--", "--total-num-mbufs=4096", "--no-mlockall", *options]


class TestPmd:
    """testpmd as a child process here, told what to do by its interactive console.

    :param within: a command that executes the words behind its own.
    """

    __test__ = False

    def __init__(
        self,
        *vdevs: str,
        options: Sequence[str] = (),
        cpu: int = 0,
        within: Sequence[str] = (),
    ) -> None:
        argv = command(*vdevs, options=("--interactive", *options), cpu=cpu)
        self.process = subprocess.Popen(
            [
                *within,
                "stdbuf",
                "-oL",
                *argv,
            ],  # its output is to a pipe, so that it would come late
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            bufsize=1,
        )
        self.lines: list[str] = []
        self._changed = threading.Condition()
        assert self.process.stdout
        self._reader = threading.Thread(target=self._read, args=(self.process.stdout,), daemon=True)
        self._reader.start()

    def _read(self, stream: IO[str]) -> None:
        while line := stream.readline():
            with self._changed:
                self.lines.append(line.rstrip())
                self._changed.notify_all()
        with self._changed:
            self._changed.notify_all()

    def say(self, line: str) -> None:
        """One line for its console."""
        assert self.process.stdin
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()

    def expect(self, text: str, patience: float, start: int = 0) -> None:
        """Wait until it has printed ``text`` from line ``start`` on."""
        with self._changed:
            found = self._changed.wait_for(
                lambda: (
                    any(text in line for line in self.lines[start:]) or not self._reader.is_alive()
                ),
                patience,
            )
            assert found and any(text in line for line in self.lines[start:]), (text, self.lines)

    def __enter__(self) -> TestPmd:
        return self

    def __exit__(self, *exc: object) -> None:
        assert self.process.stdin and self.process.stdout
        try:
            self.say("quit")
            self.process.stdin.close()
        except BrokenPipeError:
            pass  # it is dead
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self._reader.join()
        self.process.stdout.close()


if __name__ == "__main__":
    os.umask(0o022)
    try:
        fetch()
    except PyvmmError as e:
        sys.exit(f"dpdk: {e}")
