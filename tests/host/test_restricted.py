"""In containers and CI systems: ``pyvmm doctor`` says each restriction in a line, with a remedy,
and ``pyvmm run`` needs no more than it uses.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests import restrict

ROOT = Path(__file__).parents[2]
Guest = Callable[[str], str]
PYVMM = [sys.executable, "-m", "pyvmm"]
pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root to make namespaces")


def call(prefix: list[str], *argv: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*prefix, *PYVMM, *argv],
        cwd=ROOT,
        env={**os.environ, **env},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
    )


def doctor(prefix: list[str], **env: str) -> dict[str, dict[str, str]]:
    """The doctor's findings by name."""
    done = call(prefix, "doctor", "--json", **env)
    assert done.stderr == "" and done.returncode in (0, 1, 3), done
    return {f["name"]: f for f in json.loads(done.stdout)["findings"]}


def run(prefix: list[str], guest: Guest, *options: str, **env: str) -> tuple[int, str]:
    """Boot a small guest; the exit status and standard error."""
    words = ("--host", "local", "--kernel", guest("hello"), "--memory", "16M")
    done = call(prefix, "run", *words, *options, **env)
    return done.returncode, done.stderr


def one_line(err: str, *words: str) -> None:
    assert err.startswith("pyvmm: ") and err.count("\n") == 1, err
    assert all(word in err for word in words), err


def test_dockers_list_of_system_calls(guest: Guest) -> None:
    prefix = restrict.docker()
    found = doctor(prefix)
    for name, state in (("user namespaces", "note"), ("network namespaces", "missing")):
        assert found[name]["state"] == state
        assert "Operation not permitted" in found[name]["detail"]
        assert "--security-opt seccomp=unconfined" in found[name]["remedy"]
    assert "--net user" in found["network namespaces"]["remedy"]
    assert found["kvm vm"]["state"] == found["control sockets"]["state"] == "ok"
    status, err = run(prefix, guest)
    assert status == 107
    one_line(
        err, "may not make a network namespace (unshare: Operation not permitted)", "--net user"
    )
    assert run(prefix, guest, "--net", "user") == (0, "")
    assert run(prefix, guest, "--net", "none", "--sandbox", "on") == (0, "")


def test_no_user_namespaces(guest: Guest) -> None:
    prefix = restrict.no_user_namespaces()
    found = doctor(prefix)
    assert found["user namespaces"]["state"] == "note"
    assert found["network namespaces"]["state"] == "missing"
    for name in ("user namespaces", "network namespaces"):
        assert "sysctl user.max_user_namespaces=10000" in found[name]["remedy"], found
    status, err = run(prefix, guest)
    assert status == 107
    one_line(err, "sysctl user.max_user_namespaces=10000", "--net user")
    assert run(prefix, guest, "--net", "user") == (0, "")


def test_no_tun_device(guest: Guest) -> None:
    prefix = restrict.no_tun()
    found = doctor(prefix)
    assert found["tun"]["state"] == "note" and "no /dev/net/tun" in found["tun"]["detail"]
    assert found["network namespaces"]["state"] == "missing"
    assert "--net user" in found["network namespaces"]["remedy"]
    status, err = run(prefix, guest)
    assert status == 106
    one_line(err, "there is no /dev/net/tun", "docker run --device /dev/net/tun", "--net user")
    assert run(prefix, guest, "--net", "user") == (0, "")


def test_a_read_only_root(guest: Guest) -> None:
    prefix = restrict.read_only_root()
    env = {"XDG_RUNTIME_DIR": ""}
    found = doctor(prefix, **env)
    assert found["cache"]["state"] == "note"
    assert "Read-only file system" in found["cache"]["detail"]
    assert "XDG_CACHE_HOME" in found["cache"]["remedy"]
    assert found["control sockets"]["state"] == "note"
    assert "XDG_RUNTIME_DIR" in found["control sockets"]["remedy"]
    status, err = run(prefix, guest, "--net", "none", **env)
    assert status == 0
    one_line(err, "no control socket", "Read-only file system", "XDG_RUNTIME_DIR")
    status, err = run(prefix, guest, "--net", "none", "--name", "box", **env)
    assert status == 101
    one_line(err, "Read-only file system", "XDG_RUNTIME_DIR")
    done = call(prefix, "image", "build", **env)
    assert done.returncode in (101, 111) and done.stderr.count("pyvmm: ") == 1, done
    assert "Traceback" not in done.stderr and "XDG_CACHE_HOME" in done.stderr, done


def test_no_shared_memory_device(guest: Guest) -> None:
    """Nothing needs /dev/shm: guest memory is a memfd."""
    prefix = restrict.no_shm()
    assert subprocess.run([*prefix, "test", "!", "-e", "/dev/shm"]).returncode == 0
    found = doctor(prefix)
    assert found["kvm vm"]["state"] == "ok" and found["network namespaces"]["state"] == "ok"
    assert run(prefix, guest) == (0, "")


def test_a_limit_of_memory(guest: Guest) -> None:
    limit = restrict.memory_limit(200 << 20)
    with ExitStack() as stack:
        try:
            prefix = stack.enter_context(limit)
        except OSError as e:
            pytest.skip(f"no control group with a limit: {e}")
        found = doctor(prefix)
        status, err = run(prefix, guest, "--memory", "256M", "--net", "none")
    assert (
        found["memory"]["state"] == "note" and "200 MiB by the limit" in found["memory"]["detail"]
    )
    assert "docker run --memory" in found["memory"]["remedy"]
    assert status == 0
    one_line(err, "the guest's 256 MiB are more than the control group allows, 200 MiB")
