"""A command in the guest: its arguments, its input, its output and its surroundings are those that
it would have at home, and nothing is lost in silence.
"""

from __future__ import annotations

import os
import subprocess
import time
from pathlib import Path

import pytest

from tests.boot.guest import PATIENCE, PYVMM, Host, Run

pytestmark = pytest.mark.usefixtures("nothing_left")


def local(host: Host, *args: str) -> list[str]:
    """`pyvmm run` in the testbed, as an argv."""
    inside = [*PYVMM, "run", "--host", "local", "--net", "none", *args]
    return [*PYVMM, "testbed", "-q", "--name", host.testbed.name, "--", *inside]


def test_all_arguments_arrive(host: Host) -> None:
    """Those of a list of files, and a whole script as one argument."""
    words = [f"argument {i} of many" for i in range(3000)]
    script = 'echo $#; shift 2999; echo "$1"; printf %s "$0" | wc -c; exit 6 # ' + "x" * 100_000
    zeroth = "z" * 120_000
    with Run(host, "--net", "none", "--", "sh", "-c", script, zeroth, *words) as run:
        assert run.wait() == 6, repr(run)
        assert run.out == f"3000\n{words[-1]}\n{len(zeroth)}\n"


def test_a_slow_reader_gets_the_last_byte(host: Host) -> None:
    """A reader may stall for longer than init waits for processes that the command left behind."""
    size = 250_000  # more than the pipes from the command to the reader hold
    script = f"yes | head -c {size}; echo end >&2"
    with subprocess.Popen(
        local(host, "--", "sh", "-c", script),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        pipesize=4096,
    ) as run:
        assert run.stdout is not None and run.stderr is not None
        got = os.read(run.stdout.fileno(), 1)
        time.sleep(4)  # longer than init's DRAIN_MS; a longer time makes no difference
        got += run.stdout.read()
        assert run.stderr.read() == b"end\n"
        assert run.wait(PATIENCE) == 0
    assert got == b"y\n" * (size // 2)


def test_output_that_comes_after_the_end_arrives(host: Host) -> None:
    """Of processes that the command leaves behind, as long as they go on writing."""
    script = "yes | head -c 3000000 & exit 5"
    with Run(host, "--net", "none", "--", "sh", "-c", script) as run:
        assert run.wait() == 5, repr(run)
        assert len(run.stdout) == 3_000_000


@pytest.mark.parametrize(
    ("script", "status"),
    [("exec yes", 141), ("yes; exit 4", 4), ("trap '' PIPE; yes 2>/dev/null; exit 0", 141)],
    ids=["yes", "shell", "deaf"],
)
def test_a_command_ends_whose_reader_has_gone(host: Host, script: str, status: int) -> None:
    with subprocess.Popen(
        local(host, "--", "sh", "-c", script),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as run:
        assert run.stdout is not None and run.stderr is not None
        assert os.read(run.stdout.fileno(), 2) == b"y\n"
        run.stdout.close()
        assert run.wait(PATIENCE) == status
        assert run.stderr.read() == b""


@pytest.mark.parametrize("kind", ["pipe", "file"])
def test_a_shell_reads_its_commands(host: Host, tmp_path: Path, kind: str) -> None:
    """As at home, `echo cmd | sh`: no prompt, no echo, the shell's own status, at the end of the
    input. Bytes that mean something on a terminal are bytes.
    """
    text = b"echo one; x='two \x03\x04\x10\x10\x01x \xff'\necho \"<$x>\"; echo >&2\n(exit 3)\n"
    (tmp_path / "input").write_bytes(text)
    with (
        (tmp_path / "input").open("rb") as file,
        subprocess.Popen(
            local(host),
            stdin=file if kind == "file" else subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        ) as run,
    ):
        out, err = run.communicate(text if kind == "pipe" else None, PATIENCE)
    assert (run.returncode, out, err) == (3, b"one\n<two \x03\x04\x10\x10\x01x \xff>\n", b"\n")


SURROUNDINGS = r"""
stat -c '%a %n' / /dev/null /tmp
mkdir -p /usr/bin /tmp/first
printf '#!/bin/sh\necho mine\n' >/tmp/first/seq
printf '#!/bin/sh\necho added\n' >/usr/bin/factor
chmod 755 /tmp/first/seq /usr/bin/factor
PATH=/tmp/first:$PATH sh -c 'seq 1'
sh -c 'factor 6; busybox factor 6'
echo "$PATH"
mask=24 ip=10.9.8.7 router='10.9.8.1 10.9.8.2' dns='10.9.8.3' domain=example.org interface=eth0 \
    mtu=1400 /usr/share/udhcpc/default.script bound
ip -o -4 addr show dev eth0 | grep -o 'inet [0-9./]*'
ip route | grep -o 'default via [0-9.]*'
cat /sys/class/net/eth0/mtu /etc/resolv.conf
"""


def test_the_surroundings(host: Host) -> None:
    """The root directory is nobody's to write, PATH comes before busybox' applets, and udhcpc sets
    what it is given.
    """
    with Run(host, "--net", "emulated,guest=", "--", "sh", "-ec", SURROUNDINGS) as run:
        assert run.wait() == 0, repr(run)
        assert run.out.splitlines() == [
            "755 /",
            "666 /dev/null",
            "1777 /tmp",
            "mine",
            "added",
            "6: 2 3",
            "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
            "inet 10.9.8.7/24",
            "default via 10.9.8.1",
            "1400",
            "search example.org",
            "nameserver 10.9.8.3",
        ]
