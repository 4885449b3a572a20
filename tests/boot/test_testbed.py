"""The testbed itself: what a command in it has, and that all of it is carried."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import psutil
import pytest

from pyvmm.errors import TestbedError
from pyvmm.testbed import assets
from pyvmm.testbed.testbed import Testbed, TestbedTimeout

PYVMM = [sys.executable, "-m", "pyvmm"]
NOBODY = 65534
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def shared(tmp_path: Path) -> Path:
    """A directory that is the same here and in the testbed."""
    return tmp_path


def test_has_what_it_is_for(testbed: Testbed) -> None:
    r = testbed.run(
        [
            "sh",
            "-c",
            "ls /dev/kvm /dev/net/tun /dev/vhost-net /sys/module/kvm_amd/parameters/nested",
        ]
    )
    assert r.status == 0, r.err
    r = testbed.run([*PYVMM, "doctor"])
    assert r.status == 0, r.out
    assert "kvm_amd" in r.out


def test_commands_keep_off_cpu_0(testbed: Testbed) -> None:
    """QEMU corrupts guests there; what was promised is to be had on the other CPUs."""
    status = testbed.status()
    assert status
    allowed = set(map(int, testbed.run(
        [sys.executable, "-c", "import os; print(*os.sched_getaffinity(0))"]
    ).out.split()))  # fmt: skip
    assert len(allowed) == status["cpus"]
    assert status["cpus"] == 1 or 0 not in allowed


def test_streams_are_apart(testbed: Testbed) -> None:
    r = testbed.run(["sh", "-c", "echo out; echo err >&2; cat; exit 7"], input=b"in\n")
    assert (r.status, r.out, r.err) == (7, "out\nin\n", "err\n")


def test_status_of_a_signal(testbed: Testbed) -> None:
    assert testbed.run(["sh", "-c", "kill -SEGV $$"]).status == 128 + signal.SIGSEGV


def test_unknown_command(testbed: Testbed) -> None:
    assert testbed.run(["no-such-command"]).status == 127
    assert testbed.run(["/etc/passwd"]).status == 126


def test_environment_and_directory(testbed: Testbed, shared: Path) -> None:
    odd = "a b\n\udcff'$x"
    r = testbed.run(
        ["sh", "-c", 'pwd; printf %s "$ODD"; umask'],
        cwd=str(shared),
        env={**os.environ, "ODD": odd},
    )
    assert r.stdout == os.fsencode(f"{shared}\n{odd}") + f"{umask():04o}\n".encode()


def umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_missing_directory(testbed: Testbed) -> None:
    r = testbed.run(["true"], cwd="/no/such/directory")
    assert r.status == 126
    assert "/no/such/directory" in r.err


def test_files_are_shared_both_ways(testbed: Testbed, shared: Path) -> None:
    (shared / "here").write_text("from the host")
    r = testbed.run(
        ["sh", "-c", "cat here; echo from L1 >there; mkdir d; ln -s here link"], cwd=str(shared)
    )
    assert r.out == "from the host"
    assert (shared / "there").read_text() == "from L1\n"
    assert (shared / "link").is_symlink()


def test_changes_are_seen_at_once(testbed: Testbed, shared: Path) -> None:
    """Edited in place, replaced, removed, made anew: each before a command that follows
    immediately.
    """
    file = shared / "file"
    for n in range(6):
        text = f"version {n}"
        if n % 2:
            file.write_text(text)
        else:
            (shared / "new").write_text(text)
            (shared / "new").rename(file)
        assert testbed.run(["cat", str(file)]).out == text
    file.unlink()
    assert testbed.run(["cat", str(file)]).status == 1
    (shared / "another").touch()
    assert testbed.run(["ls", str(shared)]).out == "another\n"


def test_the_rest_of_the_host_is_protected(testbed: Testbed) -> None:
    mark = Path(f"/etc/pyvmm-test-{os.getpid()}")
    assert testbed.run(["sh", "-c", f"echo x >{mark} && cat {mark}"]).out == "x\n", (
        "the overlay takes writes"
    )
    assert not mark.exists()
    status = testbed.status()
    assert status
    if any("not write-protected" in note for note in status["notes"]):
        pytest.skip(str(status["notes"]))
    # Not even through the share itself: the daemon that serves it sees a read-only tree.
    r = testbed.run(["sh", "-c", f"echo x >/.work{mark}"])
    assert r.status != 0
    assert "Read-only" in r.err
    assert not mark.exists()


def test_flood_is_whole(testbed: Testbed) -> None:
    size = 30_000_000
    r = testbed.run(["sh", "-c", f"head -c {size} /dev/zero; echo end >&2"])
    assert len(r.stdout) == size
    assert r.err == "end\n"


def test_much_input(testbed: Testbed) -> None:
    data = os.urandom(1 << 20)
    r = testbed.run(["cat"], input=data)
    assert r.stdout == data


def test_input_that_nobody_reads(testbed: Testbed) -> None:
    assert testbed.run(["true"], input=bytes(1 << 20)).status == 0


def test_background_process_does_not_hold_the_command(testbed: Testbed) -> None:
    r = testbed.run(["sh", "-c", "sleep 3600 & echo started"], timeout=180)
    assert r.out == "started\n"
    testbed.run(["pkill", "-x", "sleep"])


def test_many_at_once(testbed: Testbed, shared: Path) -> None:
    """Each waits for all the others."""
    results: dict[int, str] = {}

    def one(n: int) -> None:
        script = (
            f"touch {shared}/{n}; until [ $(ls {shared} | wc -l) = 12 ]; do sleep 0.2; done; "
            f"echo {n}"
        )
        results[n] = testbed.run(["sh", "-c", script], timeout=180).out

    threads = [threading.Thread(target=one, args=(n,)) for n in range(12)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert results == {n: f"{n}\n" for n in range(12)}


def test_a_reader_that_stops_does_not_stop_others(testbed: Testbed) -> None:
    slow = subprocess.Popen(
        [*PYVMM, "testbed", "--name", testbed.name, "--", "yes"], stdout=subprocess.PIPE
    )
    try:
        assert slow.stdout
        assert slow.stdout.read(2) == b"y\n"
        time.sleep(1)
        assert testbed.run(["echo", "hi"], timeout=180).out == "hi\n"
        slow.stdout.close()
        assert slow.wait(180) == 128 + signal.SIGPIPE
    finally:
        slow.kill()
        slow.wait()


def test_timeout_kills(testbed: Testbed) -> None:
    with pytest.raises(TestbedTimeout):
        testbed.run(["sleep", "4321"], timeout=1)
    gone(testbed, "sleep 4321")


def gone(testbed: Testbed, command: str) -> None:
    """Wait for ``command``, which would run for an hour, to have no process in the testbed."""
    until = time.monotonic() + 60
    while time.monotonic() < until:
        if testbed.run(["pgrep", "-x", "-f", command]).status == 1:
            return
        time.sleep(0.25)
    pytest.fail(f"{command!r} still runs in the testbed")


def attached(testbed: Testbed, *command: str, **kwargs: object) -> subprocess.Popen[bytes]:
    """The command line, with its command known to have started."""
    child = subprocess.Popen(
        [
            *PYVMM,
            "testbed",
            "--name",
            testbed.name,
            "--",
            "sh",
            "-c",
            f"echo up; {' '.join(command)}",
        ],
        stdout=subprocess.PIPE,
    )
    assert child.stdout
    assert child.stdout.readline() == b"up\n"
    return child


def test_client_that_vanishes_takes_its_command_along(testbed: Testbed) -> None:
    child = attached(testbed, "setsid sleep 4322 & sleep 4323")
    child.kill()
    child.wait()
    gone(testbed, "sleep 4322")
    gone(testbed, "sleep 4323")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_are_forwarded(testbed: Testbed, number: signal.Signals) -> None:
    child = attached(testbed, "exec sleep 4324")
    child.send_signal(number)
    assert child.wait(60) == 128 + number
    gone(testbed, "sleep 4324")


def test_second_signal_kills_what_ignores_the_first(testbed: Testbed) -> None:
    child = attached(testbed, "trap 'echo ignored' INT; while :; do sleep 0.1; done")
    child.send_signal(signal.SIGINT)
    assert child.stdout and child.stdout.readline() == b"ignored\n"
    child.send_signal(signal.SIGINT)
    assert child.wait(60) == 128 + signal.SIGKILL


class Terminal:
    """A pseudo-terminal with ``pyvmm testbed -- ...`` on it."""

    def __init__(self, testbed: Testbed, *command: str) -> None:
        import fcntl
        import termios

        self.master, slave = os.openpty()
        termios.tcsetwinsize(slave, (33, 99))
        self.before = termios.tcgetattr(slave)
        self.slave = slave

        def own() -> None:
            os.setsid()
            fcntl.ioctl(0, termios.TIOCSCTTY, 0)

        self.child = subprocess.Popen(
            [*PYVMM, "testbed", "--name", testbed.name, "--", *command],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            preexec_fn=own,
        )
        self.seen = b""

    def until(self, text: bytes) -> None:
        """Read until ``text`` has appeared."""
        import select

        end = time.monotonic() + 120
        while text not in self.seen:
            assert time.monotonic() < end, self.seen
            if select.select([self.master], [], [], 0.2)[0]:
                self.seen += os.read(self.master, 4096)

    def type(self, keys: bytes) -> None:
        os.write(self.master, keys)

    def close(self) -> int:
        """Wait for the end; the terminal's modes must be what they were."""
        import termios

        status = self.child.wait(120)
        assert termios.tcgetattr(self.slave) == self.before
        os.close(self.slave)
        os.close(self.master)
        return status


def test_terminal(testbed: Testbed) -> None:
    import termios

    t = Terminal(
        testbed,
        "sh",
        "-c",
        "trap 'stty size' WINCH; test -t 0 && test -t 1 && stty size; while read x; do :; done; "
        "exit 9",
    )
    t.until(b"33 99")
    termios.tcsetwinsize(t.slave, (44, 88))
    os.kill(t.child.pid, signal.SIGWINCH)
    t.type(b"line\n")
    t.until(b"44 88")
    t.type(b"\x04")
    assert t.close() == 9


def test_control_c_in_a_terminal(testbed: Testbed) -> None:
    t = Terminal(testbed, "sh", "-c", "echo up; sleep 4325")
    t.until(b"up")
    t.type(b"\x03")
    assert t.close() == 128 + signal.SIGINT
    gone(testbed, "sleep 4325")


def test_terminal_in_output_redirected_elsewhere(testbed: Testbed, shared: Path) -> None:
    """stdin is a terminal, stdout a file: the command finds exactly that, and no carriage returns
    in the file.
    """
    t = Terminal(testbed, "true")
    t.close()
    out = shared / "out"
    master, slave = os.openpty()
    with out.open("wb") as f:
        status = subprocess.run(
            [
                *PYVMM,
                "testbed",
                "--name",
                testbed.name,
                "--",
                "sh",
                "-c",
                "test -t 0 && ! test -t 1 && echo fine",
            ],
            stdin=slave,
            stdout=f,
        ).returncode
    os.close(master)
    os.close(slave)
    assert (status, out.read_bytes()) == (0, b"fine\n")


def test_two_testbeds_side_by_side_and_an_emulator_that_hangs(
    testbed: Testbed, tmp_path: Path
) -> None:
    """Stop QEMU as a hang would: the watchdog tells every client, and nothing of that testbed is
    left.
    """
    with Testbed("hang", watchdog=10, cpus=1, memory=1 << 30) as other:
        status = other.status()
        assert status
        assert other.run(["uname", "-n"]).out == "l1\n"
        qemu = children(status["pid"], "qemu-system")
        os.kill(qemu, signal.SIGSTOP)
        client = subprocess.run(
            [*PYVMM, "testbed", "--name", other.name, "--", "true"],
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert client.returncode == 110
        assert "no sign of life" in client.stderr
        assert not other.is_up()
        wait_gone(qemu)
    assert testbed.run(["true"]).status == 0


def children(pid: int, name: str) -> int:
    """The child of ``pid`` whose program's name contains ``name``."""
    for child in psutil.Process(pid).children():
        if name in " ".join(child.cmdline()):
            return child.pid
    raise AssertionError(f"process {pid} has no child {name}")


def test_a_panic_is_named() -> None:
    with Testbed("panic", cpus=1, memory=1 << 30) as other:
        with pytest.raises(TestbedError, match=r"QEMU ended with 0.*Kernel panic.*last.log"):
            other.run(["sh", "-c", "echo c >/proc/sysrq-trigger"])
        assert not other.is_up()


def test_dies_with_its_owner(testbed: Testbed) -> None:
    """A tethered testbed whose owner is killed goes away, and so does one whose supervisor is
    killed.
    """
    code = (
        "import os, sys, time; from pyvmm.testbed.testbed import Testbed; "
        "t = Testbed('owner', cpus=1, memory=1 << 30).__enter__(); "
        "print(t.status()['pid'], t.name, flush=True); time.sleep(99)"
    )
    owner = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, cwd=ROOT)
    assert owner.stdout
    pid, name = owner.stdout.readline().decode().split()
    supervisor = int(pid)
    qemu = children(supervisor, "qemu-system")
    owner.kill()
    owner.wait()
    wait_gone(supervisor)
    wait_gone(qemu)
    left = Testbed(name)
    assert not left.is_up()
    shutil.rmtree(left.dir)


def wait_gone(pid: int) -> None:
    until = time.monotonic() + 60
    while time.monotonic() < until:
        if not psutil.pid_exists(pid):
            return
        time.sleep(0.1)
    pytest.fail(f"process {pid} is still there")


def test_supervisor_killed(testbed: Testbed) -> None:
    with Testbed("killed", cpus=1, memory=1 << 30) as other:
        status = other.status()
        assert status
        qemu = children(status["pid"], "qemu-system")
        os.kill(status["pid"], signal.SIGKILL)
        wait_gone(qemu)
        assert not other.is_up()
        assert other.up(tethered=True), "its remains do not hinder the next one"
        assert other.down()
        assert not other.down()


def test_as_an_ordinary_user(testbed: Testbed) -> None:
    """Without a capability of root's, and with nothing but a kernel in the cache: so with the
    system's QEMU and what vCPUs that bears."""
    if os.geteuid():
        return  # then all the other tests show it
    home = Path(tempfile.mkdtemp(prefix="pyvmm-user-"))
    try:
        os.chown(home, NOBODY, NOBODY)
        root = assets.find_kernel(None).root
        if root:  # else the system's own, which everybody may read
            shutil.copytree(
                root, home / "cache/pyvmm/testbed/kernel" / Path(root).name, symlinks=True
            )
            subprocess.run(["chown", "-R", f"{NOBODY}:{NOBODY}", home / "cache"], check=True)
        drop = [
            "setpriv",
            f"--reuid={NOBODY}",
            f"--regid={NOBODY}",
            "--clear-groups",
            "--inh-caps=-all",
        ]
        env = {
            **os.environ,
            "HOME": str(home),
            "XDG_CACHE_HOME": f"{home}/cache",
            "PYTHONPATH": str(ROOT),
        }
        env.pop("XDG_RUNTIME_DIR", None)
        look = subprocess.run(
            [*drop, sys.executable, "-c", "import pyvmm"], env=env, cwd=home, capture_output=True
        )
        if look.returncode:
            pytest.skip(f"user {NOBODY} cannot read {ROOT}")
        script = (
            f"id -u; touch {home}/mine; echo x >/etc/thrown-away && cat /etc/thrown-away; "
            "ls /dev/kvm /dev/vhost-net"
        )
        done = subprocess.run(
            [*drop, *PYVMM, "testbed", "--memory", "1G", "--", "sh", "-c", script],
            env=env, cwd=home, capture_output=True, text=True, timeout=600,
        )  # fmt: skip
        assert (done.returncode, done.stdout) == (0, "0\nx\n/dev/kvm\n/dev/vhost-net\n"), (
            done.stderr
        )
        assert (home / "mine").stat().st_uid == NOBODY
    finally:
        shutil.rmtree(home)
        shutil.rmtree(f"/tmp/pyvmm-{NOBODY}", ignore_errors=True)
