"""Guests in the testbed, driven from here: `pyvmm run` as a child process, and a shell on a guest's
console.

The tests run natively; only pyvmm and what it talks to run in the testbed (Python is about 20 times
slower there).
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from concurrent.futures import Future

    from pyvmm.testbed.testbed import Result, Testbed

PYVMM = [sys.executable, "-m", "pyvmm"]
#: Far beyond what anything here takes: the testbed is slow, and its machine may be busy.
PATIENCE = 180.0
#: ``tests/boot/echo.py``, whose arguments follow.
ECHO = (sys.executable, "-I", "-S", str(Path(__file__).with_name("echo.py")))

LEFTOVERS = """
grep -al '[-]m.pyvmm.run' /proc/[0-9]*/cmdline
ls -d /sys/kernel/debug/kvm/[0-9]*
ls /sys/class/net
ls /run/netns
readlink /proc/[0-9]*/ns/net | sort -u
true
"""


class Host:
    """The testbed as the machine that pyvmm runs on."""

    def __init__(self, testbed: Testbed) -> None:
        self.testbed = testbed
        self._pool = ThreadPoolExecutor(8)

    def run(self, *argv: str, input: bytes | None = None, timeout: float = PATIENCE) -> Result:
        """A command in the testbed."""
        return self.testbed.run(argv, input=input, timeout=timeout)

    def sh(self, script: str, timeout: float = PATIENCE) -> str:
        """A shell script in the testbed, which must succeed; its stdout."""
        result = self.run("sh", "-ec", script, timeout=timeout)
        assert result.status == 0, f"{script!r}: {result}"
        return result.out

    def start(self, *argv: str, timeout: float = PATIENCE) -> Future[Result]:
        """A command in the testbed, meanwhile."""
        return self._pool.submit(self.run, *argv, timeout=timeout)

    def leftovers(self) -> list[str]:
        """What a run could leave behind: processes, VMs, interfaces, named and nameless network
        namespaces.
        """
        return self.run("sh", "-c", LEFTOVERS).out.split("\n")

    def left_behind(self, before: list[str]) -> list[str]:
        """What there is now besides ``before``. What has gone is not left behind: a VM outlives its
        process for a moment, so that of the test before may have been seen.
        """
        return sorted(set(self.leftovers()) - set(before))

    @staticmethod
    def wait_until(
        good: Callable[[], bool], problem: Callable[[], str] | str, timeout: float = PATIENCE
    ) -> None:
        """Wait for a condition, or fail with what ``problem`` says."""
        until = time.monotonic() + timeout
        while not good():
            assert time.monotonic() < until, problem if isinstance(problem, str) else problem()
            time.sleep(0.2)


class Run:
    """`pyvmm run --host local ARGS` in the testbed, with its output as it comes. Ended by the
    ``with`` statement.

    :param wrapper: a command in front, such as ``ip netns exec X``.
    """

    def __init__(
        self, host: Host, *args: str, wrapper: Sequence[str] = (), report: bool = True
    ) -> None:
        self.host = host
        self._dir = tempfile.TemporaryDirectory(prefix="pyvmm-boot-")
        self._pidfile = Path(self._dir.name, "pid")
        self._reportfile = Path(self._dir.name, "report")
        self._report = ""
        if report:
            args = ("--report", str(self._reportfile), *args)
        remember = ["sh", "-c", 'echo $$ >"$0"; exec "$@"', str(self._pidfile)]
        self.process = subprocess.Popen(
            [
                *PYVMM,
                *("testbed", "-q", "--name", host.testbed.name, "--"),
                *remember,
                *wrapper,
                *PYVMM,
                *("run", "--host", "local", *args),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        self.stdout, self.stderr = bytearray(), bytearray()
        self._changed = threading.Condition()
        self._readers = [
            threading.Thread(target=self._read, args=(stream, into), daemon=True)
            for stream, into in (
                (self.process.stdout, self.stdout),
                (self.process.stderr, self.stderr),
            )
        ]
        for thread in self._readers:
            thread.start()

    def _read(self, stream: Any, into: bytearray) -> None:
        while data := os.read(stream.fileno(), 65536):
            with self._changed:
                into += data
                self._changed.notify_all()
        with self._changed:
            self._changed.notify_all()

    @property
    def out(self) -> str:
        """stdout so far, as text."""
        return self.stdout.decode(errors="replace")

    @property
    def err(self) -> str:
        """stderr so far, as text."""
        return self.stderr.decode(errors="replace")

    def __repr__(self) -> str:
        status = f"{self.process.args!r}: status {self.process.poll()}"
        return f"{status}\nstdout: {self.out}\nstderr: {self.err}"

    def expect(self, pattern: str, start: int = 0, timeout: float = PATIENCE) -> re.Match[bytes]:
        """Wait until stdout from ``start`` on matches; the match."""
        compiled = re.compile(pattern.encode(), re.MULTILINE | re.DOTALL)
        until = time.monotonic() + timeout
        with self._changed:
            while True:
                # Asked before the search, so that no output can come between them.
                over = self._over()
                match = compiled.search(bytes(self.stdout), start)
                if match:
                    return match
                assert not over, f"ended before {pattern!r} came: {self!r}"
                assert self._changed.wait(until - time.monotonic()), (
                    f"{pattern!r} did not come: {self!r}"
                )

    def _over(self) -> bool:
        """Whether it has ended, and everything that it printed has arrived."""
        return self.process.poll() is not None and not any(t.is_alive() for t in self._readers)

    @property
    def pid(self) -> int:
        """pyvmm's process in the testbed."""
        self.host.wait_until(
            lambda: self._pidfile.exists() and bool(self._pidfile.read_text()), "no process"
        )
        return int(self._pidfile.read_text())

    def type(self, text: str) -> None:
        """Send to stdin."""
        assert self.process.stdin
        self.process.stdin.write(text.encode())
        self.process.stdin.flush()

    @property
    def status(self) -> int | None:
        """The exit status, None while it runs."""
        return self.process.poll()

    def wait(self, timeout: float = PATIENCE) -> int:
        """Its exit status; everything that it printed has arrived."""
        status = self.process.wait(timeout)
        for thread in self._readers:
            thread.join(timeout)
        return status

    @property
    def report(self) -> dict[str, Any]:
        """The report, once it has ended, checked for what holds of every run."""
        report: dict[str, Any] = json.loads(self._report or self._reportfile.read_text())
        check_report(report)
        return report

    def wait_for(self, path: Path, timeout: float = PATIENCE) -> None:
        """Wait for a file, which the guest or its machine makes; fail if the run ends before."""
        self.host.wait_until(
            lambda: path.exists() or self.status is not None, lambda: repr(self), timeout
        )
        assert path.exists(), f"ended before {path} was there: {self!r}"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(PATIENCE)
            except subprocess.TimeoutExpired:
                self.process.kill()
        self.wait()
        if self._reportfile.exists():
            self._report = self._reportfile.read_text()
        for stream in (self.process.stdin, self.process.stdout, self.process.stderr):
            if stream:
                try:
                    stream.close()
                except BrokenPipeError:
                    pass
        self._dir.cleanup()


def run_all(host: Host, runs: dict[str, list[str]], *common: str) -> dict[str, Run]:
    """Run them to their ends, two at a time; the ended runs by name."""

    def one(args: list[str]) -> Run:
        with Run(host, *common, *args) as run:
            run.wait()
            return run

    with ThreadPoolExecutor(2) as pool:
        return dict(zip(runs, pool.map(one, runs.values()), strict=True))


class Answer:
    """What a command in a guest did; stdout and stderr together."""

    def __init__(self, status: int, text: str) -> None:
        self.status, self.text = status, text

    def __repr__(self) -> str:
        return f"status {self.status}: {self.text}"


class Guest(Run):
    """A guest whose console is typed at from here."""

    def __init__(self, host: Host, *args: str, **kwargs: Any) -> None:
        super().__init__(host, "--console", *args, **kwargs)
        self._namespaces: dict[int, int] = {}
        try:
            self.log_in()
        except BaseException:
            self.__exit__()
            raise

    def log_in(self, start: int = 0) -> None:
        """Wait for the shell's prompt, then make it silent: no prompt, no echo, no kernel
        messages.
        """
        self.expect(r"^~ # ", start)
        start = len(self.stdout)
        # A script, even from the terminal, is read without line editing.
        self.type("stty -echo -onlcr; dmesg -n 1; exec sh /dev/ttyS0\n")
        self.type("echo ready-$((6 * 7))\n")
        self.expect(r"^ready-42\n", start)

    def sh(self, command: str, timeout: float = PATIENCE) -> Answer:
        """Run a command in the guest's shell."""
        start = len(self.stdout)
        self.type(f"{{ {command}\n}} 2>&1 </dev/null; echo @@$?@@\n")
        match = self.expect(r"@@(\d+)@@\n", start, timeout)
        return Answer(int(match[1]), self.stdout[start : match.start()].decode(errors="replace"))

    def do(self, command: str, timeout: float = PATIENCE) -> str:
        """Run a command in the guest, which must succeed; its output."""
        answer = self.sh(command, timeout)
        assert answer.status == 0, f"{command!r}: {answer}"
        return answer.text

    def start(self, command: str) -> None:
        """Run a command in the guest in the background."""
        self.do(f"{{ {command} ; }} >/dev/null 2>&1 &")

    def inside(self, nic: int) -> list[str]:
        """The prefix of a command that runs in the network namespace behind card ``nic``."""
        if not self._namespaces:
            script = f"""
                for fd in /proc/{self.pid}/fd/*; do
                    case $(readlink "$fd") in net:*)
                        echo "$fd" $(nsenter --net="$fd" ip -o -4 addr show up |
                            grep -o '192.168.1[0-9][0-9]\\.');;
                    esac
                done"""
            for line in self.host.sh(script).splitlines():
                fd, _, address = line.partition(" ")
                if address:
                    self._namespaces[int(address.split(".")[2]) - 100] = int(fd.rpartition("/")[2])
        return ["nsenter", f"--net=/proc/{self.pid}/fd/{self._namespaces[nic]}"]

    def host_run(self, nic: int, *argv: str, timeout: float = PATIENCE) -> Result:
        """A command in the namespace behind card ``nic``."""
        return self.host.run(*self.inside(nic), *argv, timeout=timeout)

    def leave(self, status: int = 0) -> None:
        """End the guest's shell with ``status``, and so the run."""
        self.type(f"exit {status}\n")
        assert self.wait() == status, repr(self)


# --- checks ---------------------------------------------------------------------------------------


def check_report(report: dict[str, Any]) -> None:
    """What holds of the report of every run, whatever happened in it."""
    exits = report["exits"]
    total = exits["kvm_run_returns"]
    lines = exits["lines"]
    assert sum(line["count"] for line in lines) == total > 0
    assert sum(exits["by_reason"].values()) == total
    assert sum(exits["by_device"].values()) == total
    assert "overflow" not in exits["by_reason"]
    assert sum(phase["exits"]["kvm_run_returns"] for phase in report["phases"]) == total
    phases = report["phases_s"]
    assert list(phases.values()) == sorted(phases.values())
    assert all(stream["dropped_bytes"] == 0 for stream in report["streams"].values())
    for nic in report["nets"]:
        assert nic["faults"] == []
        assert set(nic["negotiated"]) <= set(nic["offered"])


def exits_by_device(report: dict[str, Any], name: str) -> int:
    """Exits that went to device ``name``."""
    count: int = report["exits"]["by_device"].get(name, 0)
    return count


def nic_address(nic: int, side: str) -> str:
    """The address that pyvmm gives the host's or the guest's end of card ``nic``."""
    return f"192.168.{100 + nic}.{1 if side == 'host' else 2}"


def pings(address: str, count: int = 3, options: str = "") -> str:
    """A guest's command that asks for echoes, one after another, and fails if one does not come.

    Each is a ping(8) of its own: for the last one of several, busybox waits for a second only. For
    a single one it waits as long as -W says.
    """
    return (
        f"(for _ in $(seq {count}); do "
        f"ping -q -c 1 -W {PATIENCE / 3:.0f} {options} {address} || exit 1; done)"
    )


def check_ping(guest: Guest, nic: int = 0, *, size: int = 56) -> None:
    """Ping both ways; every request answered."""
    guest.do(pings(nic_address(nic, "host"), options=f"-s {size}"))
    result = guest.host_run(nic, *ECHO, nic_address(nic, "guest"), "3", str(size))
    assert result.status == 0, result


def check_tcp(guest: Guest, nic: int = 0, *, megabytes: int = 2) -> None:
    """Random bytes over TCP to the guest and back; the receiver answers with their checksum."""
    data = os.urandom(megabytes << 20)
    want = hashlib.sha256(data).hexdigest()
    with tempfile.NamedTemporaryFile() as f:
        f.write(data)
        f.flush()
        guest.start("busybox nc -l -p 7001 -e sh -c 'tee /tmp/data | sha256sum'")
        send = f"until busybox nc {nic_address(nic, 'guest')} 7001 <{f.name}; do sleep 0.2; done"
        result = guest.host_run(nic, "sh", "-c", send)
        assert result.out.split()[:1] == [want], result
    server = guest.host.start(
        *guest.inside(nic), *["busybox", "nc", "-l", "-p", "7002", "-e", "sha256sum"]
    )
    text = guest.do(
        f"until busybox nc {nic_address(nic, 'host')} 7002 </tmp/data 2>/dev/null; do "
        "sleep 0.2; done; rm /tmp/data"
    )
    assert text.split()[:1] == [want], text
    assert server.result().status == 0, server.result()


def serve_iperf(guest: Guest, options: str = "") -> None:
    """Start an iperf3 server in the guest, and wait until it listens (proc(5), /proc/net/tcp)."""
    listens = "grep -q ':1451 .* 0A ' /proc/net/tcp /proc/net/tcp6"
    guest.do(f"while {listens}; do sleep 0.1; done")  # one that is ending
    guest.start(f"iperf3 -s {options}")
    guest.do(f"until {listens}; do sleep 0.1; done")


def check_iperf(guest: Guest, nic: int = 0, *, megabytes: int = 4) -> None:
    """iperf3 both ways; it moves at least what it was asked to."""
    serve_iperf(guest)
    address = nic_address(nic, "guest")
    try:
        for way in ("", "-R"):
            command = f"iperf3 -c {address} -n {megabytes}M --json {way}"
            # Only the last attempt is printed: the server may still be busy with the one before.
            script = (
                f'until text=$({command}) && echo "$text" | grep -q sum_sent; do sleep 0.5; done; '
                'echo "$text"'
            )
            result = guest.host_run(nic, "sh", "-c", script)
            end = json.loads(result.out)["end"]
            # The receiver stops counting when the sender says that it is done.
            assert end["sum_sent"]["bytes"] >= megabytes << 20, end
            assert end["sum_received"]["bytes"] > 0, end
    finally:
        guest.do("killall iperf3")


def check_traffic(guest: Guest, nic: int = 0) -> None:
    """Ping and TCP, both ways."""
    check_ping(guest, nic)
    check_tcp(guest, nic)
