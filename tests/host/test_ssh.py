"""A testbed on another machine: a real sshd on this one, in a mount namespace of its own."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pyvmm.errors import PyvmmError
from pyvmm.host.apt import Apt
from pyvmm.host.paths import cache_dir
from pyvmm.testbed.testbed import Testbed
from tests.driver import PATIENCE

ROOT = Path(__file__).parents[2]
PYVMM = [sys.executable, "-B", "-m", "pyvmm"]
BUILDER = 61234  # a user who is nobody special
#: Only the server sees this /run, these users and a /dev/kvm that everybody may use.
SERVER = """
set -e
mount -t tmpfs run /run; mkdir /run/sshd
mount --bind {d}/passwd /etc/passwd
mknod {d}/kvm c 10 232; chmod 666 {d}/kvm; mount --bind {d}/kvm /dev/kvm
LD_LIBRARY_PATH={libraries} exec {sshd} -D -f {d}/sshd_config -E {d}/log
"""
CONFIG = """
Port {port}
ListenAddress 127.0.0.1
HostKey {d}/host
AuthorizedKeysFile {d}/authorized
PasswordAuthentication no
KbdInteractiveAuthentication no
StrictModes no
PidFile none
"""
CLIENT = """
Host nowhere
  HostName nowhere.invalid
Host stranger
  IdentityFile {d}/host
Host unknown
  UserKnownHostsFile {d}/none
Host without-kvm
  IdentityFile {d}/without-kvm
Host forbidden
  IdentityFile {d}/forbidden
Host builder
  User builder
Host box builder nowhere unknown
  IdentityFile {d}/key
Host *
  HostName 127.0.0.1
  Port {port}
  User root
  IdentitiesOnly yes
  UserKnownHostsFile {d}/known
"""
#: What two keys do instead of the command: the first one has no /dev/kvm, the second one's is
#: root's.
WITHOUT_KVM = """
mkdir {d}/dev; mount -t tmpfs dev {d}/dev
for n in null zero urandom; do touch {d}/dev/$n; mount --bind /dev/$n {d}/dev/$n; done
mount --rbind {d}/dev /dev; exec sh -c "$SSH_ORIGINAL_COMMAND"
"""
FORBIDDEN = """
mknod -m 600 {d}/kvm-of-root c 10 232; mount --bind {d}/kvm-of-root /dev/kvm
exec setpriv --reuid {builder} --clear-groups sh -c "$SSH_ORIGINAL_COMMAND"
"""


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def unpacked() -> Path:
    """Debian's sshd with its libraries: installed, it would be started."""
    root = Path(cache_dir()).parent / "openssh"
    with root.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # several workers of pytest may come at once
        if not root.is_dir():
            apt = Apt()
            names = [n for n in apt.closure(["openssh-server"]) if n.startswith(("lib", "zlib"))]
            apt.install(["openssh-server", *names], root)
    return root


@pytest.fixture(scope="module")
def hosts() -> Iterator[Path]:
    """A directory with a program ``ssh``, which knows the hosts of ``CLIENT``."""
    if os.geteuid() or not shutil.which("ssh"):
        pytest.skip("needs root and an ssh client")
    d, port, root = Path(tempfile.mkdtemp()), free_port(), unpacked()
    d.chmod(0o755)
    for name in ("host", "key", "without-kvm", "forbidden"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", d / name], check=True)
    public = {name: (d / f"{name}.pub").read_text() for name in ("key", "without-kvm", "forbidden")}
    (d / "authorized").write_text(
        f'{public["key"]}command="unshare -m sh {d}/hide" {public["without-kvm"]}'
        f'command="unshare -m sh {d}/deny" {public["forbidden"]}'
    )
    (d / "hide").write_text(WITHOUT_KVM.format(d=d))
    (d / "deny").write_text(FORBIDDEN.format(d=d, builder=BUILDER))
    (d / "passwd").write_text(
        "root:x:0:0:root:/root:/bin/sh\nsshd:x:61233:65534::/run/sshd:/usr/sbin/nologin\n"
        f"builder:x:{BUILDER}:65534::/:/bin/sh\n"
    )
    (d / "known").write_text(f"[127.0.0.1]:{port} {(d / 'host.pub').read_text()}")
    (d / "sshd_config").write_text(CONFIG.format(d=d, port=port))
    (d / "client").write_text(CLIENT.format(d=d, port=port))
    (d / "bin").mkdir()
    (d / "bin" / "ssh").write_text(f'#!/bin/sh\nexec {shutil.which("ssh")} -F {d}/client "$@"\n')
    (d / "bin" / "ssh").chmod(0o755)
    libraries = ":".join(str(root / p / "x86_64-linux-gnu") for p in ("usr/lib", "lib"))
    script = SERVER.format(d=d, libraries=libraries, sshd=root / "usr/sbin/sshd")
    with subprocess.Popen(["unshare", "-m", "sh", "-c", script]) as server:
        try:
            until = time.monotonic() + PATIENCE
            while "listening" not in ((d / "log").read_text() if (d / "log").exists() else ""):
                assert server.poll() is None and time.monotonic() < until, "sshd does not start"
                time.sleep(0.02)
            yield d / "bin"
        finally:
            server.terminate()
    shutil.rmtree(d)


@pytest.fixture(scope="module")
def path(hosts: Path) -> Iterator[None]:
    """Our ssh is the first one in PATH."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", f"{hosts}:{os.environ['PATH']}")
        patch.setenv("PYVMM_TESTBED", f"ssh-{os.getpid()}")
        yield


@pytest.fixture(scope="module")
def box(path: None) -> Iterator[Testbed]:
    """A testbed that is up."""
    with Testbed(f"ssh-{os.getpid()}", host="ssh://box") as bed:
        shared = bed.name
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("PYVMM_TESTBED", shared)
            yield bed


def pyvmm(*argv: str, cwd: Path | None = None, timeout: float = 120.0) -> tuple[int, str, str]:
    """Status, stdout and stderr of a command of pyvmm."""
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*PYVMM, *argv], cwd=cwd, env=env, capture_output=True, text=True, timeout=timeout
    )
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("nowhere", "nowhere: ssh: Could not resolve hostname nowhere.invalid: "),
        ("stranger", "Permission denied (publickey); let your key in there"),
        ("unknown", "unknown: Host key verification failed; connect once by hand"),
        ("without-kvm", "without-kvm: there is no /dev/kvm; load kvm_intel or kvm_amd there"),
        ("forbidden", "forbidden: /dev/kvm is forbidden for "),
        ("box:1", "port 1: Connection refused; does this work? ssh "),
    ],
)
def test_errors_are_one_line(path: None, name: str, told: str) -> None:
    with (
        pytest.raises(PyvmmError) as caught,
        Testbed(f"refused-{os.getpid()}", host=f"ssh://{name}"),
    ):
        pytest.fail("it is up")
    assert told in str(caught.value) and "\n" not in str(caught.value)


def test_streams_and_status(box: Testbed) -> None:
    result = box.run(["sh", "-c", "echo out; echo err >&2; cat; exit 7"], input=b"in")
    assert (result.status, result.out, result.err) == (7, "out\nin", "err\n")
    data = bytes(range(256)) * 8192  # more than any buffer holds
    assert box.run(["cat"], input=data).stdout == data
    assert box.run(["sh", "-c", "kill -SEGV $$"]).status == 139
    assert box.run(["no-such-command"]).status == 127
    status = box.status()
    assert status and status["kernel"] == os.uname().release and status["host"] == "ssh://box"


def test_it_is_shut_off_from_the_rest(box: Testbed) -> None:
    """It has a root, processes and a network of its own."""
    out = box.run(
        ["sh", "-c", "ls /; ip -o link | wc -l; ls /proc | grep -c '^[0-9]'; echo $$"]
    ).out
    assert "pyvmm.toml" not in out and "boot" not in out.split()
    links, processes, pid = out.split()[-3:]
    assert links == "1" and int(processes) < 8 and int(pid) < 1000
    assert Path("/proc/self/mountinfo").read_text().count("pyvmm /") == 0


def test_output_comes_as_it_is_written(box: Testbed) -> None:
    with subprocess.Popen(
        [*PYVMM, "testbed", "--host", "ssh://box", "--", "sh", "-c", "echo first; cat"],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as command:
        assert command.stdin and command.stdout
        assert command.stdout.readline() == b"first\n"
        command.stdin.write(b"second\n")
        command.stdin.flush()
        assert command.stdout.readline() == b"second\n"
        command.stdin.close()
        assert command.wait(60) == 0


def test_interrupt_and_time_out_reach_the_command(box: Testbed) -> None:
    script = "trap 'echo caught; exit 3' INT; echo ready; while :; do sleep 0.05; done"
    with subprocess.Popen(
        [*PYVMM, "testbed", "--host", "ssh://box", "--", "sh", "-c", script],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
    ) as command:
        assert command.stdout
        assert command.stdout.readline() == b"ready\n"
        command.send_signal(signal.SIGINT)
        assert command.stdout.read() == b"caught\n" and command.wait(60) == 3
    # With all of its descendants, in other sessions as well.
    script = "setsid sleep 4242 & sleep 4242 & sleep 4242"
    status, _, err = pyvmm(
        "testbed", "--host", "ssh://box", "--timeout", "1", "--", "sh", "-c", script
    )
    assert status == 124 and "did not end within 1 s" in err
    until = time.monotonic() + PATIENCE
    while "4242" in box.run(["ps"]).out:
        assert time.monotonic() < until, box.run(["ps"]).out
        time.sleep(0.05)


def test_a_terminal(box: Testbed) -> None:
    import pty

    master, slave = pty.openpty()
    try:
        with subprocess.Popen(
            [*PYVMM, "testbed", "--host", "ssh://box", "--", "tty"],
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdin=slave,
            stdout=slave,
            stderr=slave,
        ) as command:
            assert command.wait(60) == 0
        assert b"/dev/pts/" in os.read(master, 1000)
    finally:
        os.close(master)
        os.close(slave)


def test_doctor_there(box: Testbed) -> None:
    status, out, err = pyvmm("testbed", "--host", "ssh://box", "doctor", "--json")
    found = {f["name"]: f for f in json.loads(out)["findings"]}
    assert found["kvm"]["state"] == "ok" and found["extension"]["state"] == "ok", (status, err)


def test_commands_take_their_files_along(box: Testbed, guest: object, tmp_path: Path) -> None:
    assert callable(guest)
    shutil.copy(guest("hello"), tmp_path / "hello.elf")
    words = ["test", "--host", "ssh://box", "hello.elf", "--json=out.json", "--junit", "x.xml"]
    status, out, err = pyvmm(*words, cwd=tmp_path)
    assert status == 0 and "PASS hello" in out, err
    assert json.loads((tmp_path / "out.json").read_text())["summary"]["passed"] == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["hello.elf", "out.json", "x.xml"]
    (tmp_path / "link").symlink_to(tmp_path)  # they are found by whatever name the user gives
    words = ["run", "--host", "ssh://box", "--net=none", "--report=r.json"]
    status, out, err = pyvmm(*words, f"--kernel={tmp_path}/link/hello.elf", cwd=tmp_path)
    assert status == 0 and "hello" in out and json.loads((tmp_path / "r.json").read_text()), err


def test_an_ordinary_user(path: None, guest: object, tmp_path: Path) -> None:
    """Who is no root there is root of a user namespace."""
    assert callable(guest)
    shutil.copy(guest("hello"), tmp_path / "hello.elf")
    (tmp_path / "out").mkdir()
    bed = ["testbed", "--host", "ssh://builder", "-w", "out", "--add", "hello.elf", "--"]
    script = "id -u; cat /proc/self/uid_map; pyvmm test hello.elf --json out/x.json"
    status, out, err = pyvmm(*bed, "sh", "-ec", script, cwd=tmp_path)
    assert status == 0, (out, err)
    assert out.split()[:4] == ["0", "0", str(BUILDER), "1"] and "PASS hello" in out
    assert f"came back: {tmp_path}/out/x.json" in err and (tmp_path / "out/x.json").exists()


def command_lines() -> list[str]:
    """The command lines of all processes of this machine."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                found.append((entry / "cmdline").read_bytes().replace(b"\0", b" ").decode())
            except (OSError, UnicodeDecodeError):
                pass
    return found


def test_nothing_stays_there_when_the_connection_ends(path: None) -> None:
    """The supervisor is killed, and with it ssh: a daemon in there and the agent end."""
    name = f"killed-{os.getpid()}"
    marker = f"sleep {os.getpid()}4243"
    bed = Testbed(name, host="ssh://box")
    bed.up()
    bed.run(["sh", "-c", f"setsid {marker} >/dev/null 2>&1 </dev/null & echo data >/tmp/left"])
    assert any(marker in line for line in command_lines())
    status = bed.status()
    assert status
    os.kill(status["pid"], signal.SIGKILL)
    assert bed._child
    bed._child.wait()
    until = time.monotonic() + PATIENCE
    while any(marker in line for line in command_lines()):
        assert time.monotonic() < until
        time.sleep(0.05)
    assert not Path("/tmp/left").exists()
    shutil.rmtree(bed.dir)
