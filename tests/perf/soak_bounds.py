"""``make soak-bounds``: what never ends costs nothing that grows. A guest that reboots for ever, a
back-end and front-ends that connect again for ever, and a thousand clients of the control socket;
in minutes, with the real commands and guests that need no Linux, on this machine's /dev/kvm.

Each process is measured when a quarter is done and at the end: resident memory, descriptors,
threads and the files that it has made. Exits with 1 where one of them has grown.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack, closing, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pyvmm.control.client import connect
from pyvmm.errors import PyvmmError
from pyvmm.spec import vhost_user as spec
from pyvmm.vhostuser.wire import Listener
from pyvmm.vhostuser.wire import connect as dial
from tests.driver import wait_for
from tests.vu_fake import Fake

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

ROOT = Path(__file__).resolve().parents[2]
PYVMM = [sys.executable, "-P", "-m", "pyvmm"]
PATIENCE = 120.0
SAMPLES, SAMPLE_S = 15, 0.1
#: Bytes of resident memory that are no growth: arenas and caches of the allocator.
MEMORY_SLACK = 2 << 20
NAME = f"soak-{os.getpid()}"
#: Connections to the control socket at once.
CLIENTS = 1000
IDLE = ["--append", "how=idle"]


class Usage:
    """What a process has now. :ivar disk: bytes of the files in its directories."""

    def __init__(self, pid: int, directory: Path) -> None:
        status = Path(f"/proc/{pid}/status").read_text()
        fields = dict(line.split(":", 1) for line in status.splitlines())
        self.memory = int(fields["VmRSS"].split()[0]) << 10
        self.threads = int(fields["Threads"])
        self.descriptors = len(list(Path(f"/proc/{pid}/fd").iterdir()))
        files = [f for f in directory.rglob("*") if f.is_file()]
        self.disk = sum(f.stat().st_size for f in files)

    def grown(self, before: Usage) -> list[str]:
        """What is more than before, as words."""
        grown = []
        if self.memory > before.memory + MEMORY_SLACK:
            grown.append("memory")
        # One of each may be on its way at the moment.
        grown += ["threads"] * (self.threads > before.threads + 1)
        grown += ["descriptors"] * (self.descriptors > before.descriptors + 2)
        grown += ["disk"] * (self.disk > before.disk + (64 << 10))
        return grown


class Soak:
    """One part: it does something ``count`` times with a process of ours."""

    def __init__(self, name: str, directory: Path) -> None:
        self.name, self.directory = name, directory
        self.begun = time.monotonic()

    def run(self, pid: int, count: int, act: Callable[[int], object]) -> dict[str, Any]:
        """Act so many times; returns the account."""
        before: Usage | None = None
        for n in range(count):
            if n == count // 4:
                before = self._usage(pid)
            act(n)
        assert before is not None
        after = self._usage(pid)
        return {
            "name": self.name,
            "count": count,
            "seconds": round(time.monotonic() - self.begun, 1),
            "before": vars(before),
            "after": vars(after),
            "grown": after.grown(before),
        }

    def _usage(self, pid: int) -> Usage:
        """The least of some samples: what comes and goes all the time is no growth."""
        least = Usage(pid, self.directory)
        for _ in range(SAMPLES):
            time.sleep(SAMPLE_S)
            now = Usage(pid, self.directory)
            for name, value in vars(now).items():
                setattr(least, name, min(value, getattr(least, name)))
        return least


@contextmanager
def command(directory: Path, *argv: str) -> Iterator[subprocess.Popen[bytes]]:
    """A command of ours. What it says on stderr goes to a file in the directory, what its guest
    says does not: it may say what it likes.
    """
    with open(directory / "said", "wb") as said:
        process = subprocess.Popen(
            [*PYVMM, *argv], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=said
        )
        try:
            yield process
            assert process.poll() is None, (directory / "said").read_text()
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(PATIENCE)


def guest(name: str) -> str:
    return str(ROOT / "guest/build" / f"{name}.elf")


def machine(kernel: str, *options: str) -> list[str]:
    base = ["run", "--host", "local", "--memory", "8M", "--name", NAME]
    return [*base, "--kernel", guest(kernel), *options]


def ready() -> bool:
    try:
        with connect(NAME) as client:
            return bool(client.command("query-status")["running"])
    except PyvmmError:
        return False


def reboots(soak: Soak, count: int) -> dict[str, Any]:
    """A guest that resets the machine as soon as it runs; with a trace, which has a limit, too."""
    options = ["--append", "how=acpi", "--on-reboot", "restart", "--net", "none"]
    options += ["--trace", str(soak.directory / "trace.json"), "--trace-events", "256"]
    with command(soak.directory, *machine("reset", *options)) as process:
        assert wait_for(ready, PATIENCE)
        with connect(NAME) as client:

            def reboot(n: int) -> None:
                until = time.monotonic() + PATIENCE
                while client.command("x-pyvmm-machine")["reboots"] < n:
                    assert time.monotonic() < until
                    time.sleep(0.005)

            return soak.run(process.pid, count, reboot)


def back_ends(soak: Soak, count: int) -> dict[str, Any]:
    """A back-end that serves the card and goes, again and again."""
    path = str(soak.directory / "s")
    with ExitStack() as stack:
        listener = stack.enter_context(closing(Listener(path)))
        fake = stack.enter_context(Fake(listener))
        net = ["--net", f"vhost-user,socket={path}"]
        process = stack.enter_context(command(soak.directory, *machine("pcinet", *net)))
        assert wait_for(lambda: fake.seen.count(spec.VHOST_USER_SET_VRING_ENABLE) == 2, PATIENCE)

        def come_and_go(n: int) -> None:
            come = fake.connections
            fake.seen.clear()
            fake.drop()
            assert wait_for(lambda: fake.connections > come, PATIENCE)
            assert wait_for(lambda: spec.VHOST_USER_SET_VRING_ENABLE in fake.seen, PATIENCE)
            del fake._socks[:-1]

        return soak.run(process.pid, count, come_and_go)


def front_ends(soak: Soak, count: int) -> dict[str, Any]:
    """Front-ends that connect to ``pyvmm backend``, say something or garbage, and go."""
    path = str(soak.directory / "s")
    with command(soak.directory, "backend", "--socket", path, "--loopback") as process:

        def come(n: int) -> None:
            assert wait_for(lambda: Path(path).exists(), PATIENCE)
            with suppress(PyvmmError), closing(dial(path)) as channel:
                if n % 3:
                    channel.ask(spec.VHOST_USER_GET_FEATURES, timeout=PATIENCE).close()
                if n % 3 == 1:
                    channel.send(0x1234, b"garbage", timeout=PATIENCE)

        return soak.run(process.pid, count, come)


def clients(soak: Soak, count: int) -> dict[str, Any]:
    """Clients of the control socket, a thousand at once: good ones, half a command, garbage."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(max(soft, 4 * CLIENTS), hard), hard))
    with command(soak.directory, *machine("reset", *IDLE, "--net", "none")) as process:
        assert wait_for(ready, PATIENCE)
        with connect(NAME) as client:
            path = client._path
        kept: list[socket.socket] = []

        def come(n: int) -> None:
            s = socket.socket(socket.AF_UNIX)
            s.settimeout(PATIENCE)
            s.connect(path)
            assert s.recv(1 << 16)
            kinds = (b'{"execute":"qmp_capabilities"}', b'{"exec', b"\xff" * 5000, b"[" * 100)
            with suppress(BrokenPipeError, ConnectionResetError):
                s.sendall(kinds[n % len(kinds)])
            kept.append(s)
            if len(kept) == CLIENTS:  # more than are served at once
                while kept:
                    kept.pop().close()

        # Whole thousands, at a quarter and at the end.
        account = soak.run(process.pid, -(-count // (4 * CLIENTS)) * 4 * CLIENTS, come)
        assert ready(), "it serves on"
        return account


PARTS: dict[str, tuple[Callable[[Soak, int], dict[str, Any]], int]] = {
    "reboots": (reboots, 1000),
    "back-ends": (back_ends, 2000),
    "front-ends": (front_ends, 20000),
    "clients": (clients, 8000),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("parts", nargs="*", metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--times", type=float, default=1.0, help="so many times the usual counts")
    parser.add_argument("--json", metavar="FILE", help="the accounts")
    args = parser.parse_args()
    for name in args.parts:
        if name not in PARTS:
            parser.error(f"{name} is no part: {', '.join(PARTS)}")
    subprocess.run(["make", "-s", "-C", ROOT / "guest"], check=True)
    accounts = []
    for name in args.parts or PARTS:
        part, count = PARTS[name]
        directory = Path(tempfile.mkdtemp(prefix="pyvmm-soak-"))
        for variable in ("XDG_RUNTIME_DIR", "XDG_CACHE_HOME", "TMPDIR"):
            os.environ[variable] = str(directory)
        try:
            account = part(Soak(name, directory), max(8, int(count * args.times)))
        finally:
            shutil.rmtree(directory)
        accounts.append(account)
        before, after = account["before"], account["after"]
        figures = ", ".join(
            f"{key} {before[key] >> 10} to {after[key] >> 10} KiB"
            if key in ("memory", "disk")
            else f"{key} {before[key]} to {after[key]}"
            for key in before
        )
        grown = f"; GROWN: {', '.join(account['grown'])}" if account["grown"] else ""
        print(f"{name}: {account['count']} in {account['seconds']} s: {figures}{grown}", flush=True)
    if args.json:
        Path(args.json).write_text(json.dumps(accounts, indent=2) + "\n")
    return 1 if any(account["grown"] for account in accounts) else 0


if __name__ == "__main__":
    sys.exit(main())
