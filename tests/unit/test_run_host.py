"""What `pyvmm run` says before a guest boots: nobody could use its console; it runs elsewhere."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pyvmm import cli
from pyvmm.errors import PyvmmError, TestbedError
from pyvmm.testbed import testbed
from tests.unit.test_boot import make_bzimage

ROOT = Path(__file__).resolve().parents[2]
PYVMM = [sys.executable, "-m", "pyvmm"]


class Bed:
    """A testbed that is set up, and remembers what it is to run."""

    seen: list[list[str]] = []

    def __init__(self, **_: object) -> None: ...

    def is_set_up(self) -> bool:
        return True

    def run_attached(self, argv: list[str]) -> int:
        self.seen.append(argv)
        return 7


@pytest.fixture
def bed(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    monkeypatch.setattr(testbed, "Testbed", Bed)
    monkeypatch.setattr(Bed, "seen", [])
    return Bed.seen


# --- nobody at the console ------------------------------------------------------------------------


def run(stdin: Any, *args: str) -> tuple[int, str]:
    """Without any KVM a run that is not refused ends by another error: no such image."""
    env = {**os.environ, "XDG_CACHE_HOME": "/nonexistent"}
    command = [*PYVMM, "run", "--host", "local", *args]
    done = subprocess.run(command, cwd=ROOT, env=env, stdin=stdin, capture_output=True, text=True)
    return done.returncode, done.stderr


REFUSED = (
    "pyvmm: no command, and standard input is empty: nobody could use the guest's console; "
    "give a command: pyvmm run -- COMMAND; or, for a machine in the background, "
    "--detach --name NAME\n"
)


def test_an_empty_input_without_a_command_is_refused(tmp_path: Path) -> None:
    """In a CI job it would wait for ever."""
    assert run(subprocess.DEVNULL) == (2, REFUSED)
    (tmp_path / "empty").touch()
    with (tmp_path / "empty").open() as empty:
        assert run(empty, "--net", "none") == (2, REFUSED)
    with (tmp_path / "empty").open("r+") as file:
        file.write("exit\n")
        file.flush()
        assert run(file) == (2, REFUSED), "it has been read to its end"
        file.seek(0)
        assert run(file)[0] == 105
    shell = ["bash", "-c", '"$@" <&-', "sh", *PYVMM, "run"]
    done = subprocess.run(shell, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (2, REFUSED)


@pytest.mark.parametrize(
    "args",
    [
        ("--", "true"),
        ("--name", "background"),
        ("--qmp", "/tmp/qmp"),
        ("--timeout", "5"),
        ("--kernel", "/nonexistent/kernel"),
        ("--initrd", "/nonexistent/initrd"),
    ],
    ids=lambda args: args[0],
)
def test_what_ends_by_itself_or_by_others_is_not(args: tuple[str, ...]) -> None:
    status, err = run(subprocess.DEVNULL, *args)
    assert status == 105 and err != REFUSED


def test_an_open_pipe_may_still_bring_words() -> None:
    read, write = os.pipe()
    try:
        assert run(read)[0] == 105
    finally:
        os.close(read)
        os.close(write)


@pytest.mark.parametrize("option", ["--root", "--share"])
def test_what_our_init_mounts_brings_the_image_s_initrd(option: str, tmp_path: Path) -> None:
    """There is no image, and so no initrd, unless one is named."""
    (tmp_path / "kernel").write_bytes(make_bzimage())
    own = ("--kernel", str(tmp_path / "kernel"))
    without = run(subprocess.DEVNULL, "--image", "other", "--", "true")
    assert without[0] == 105 and "'other'" in without[1]
    asked = run(subprocess.DEVNULL, *own, "--image", "other", option, "/usr", "--", "true")
    assert asked == without
    disk = tmp_path / "disk.raw"
    disk.write_bytes(bytes(4096))
    words = (*own, "--disk", str(disk), "--image", "other", option, "/usr", "--", "true")
    with_disk = run(subprocess.DEVNULL, *words)
    assert ("'other'" in with_disk[1]) == (option == "--root"), with_disk
    (tmp_path / "kernel").write_text("no kernel\n")
    for args in ((option, "/usr"), (option, "/usr", "--initrd", "/nonexistent/initrd"), ()):
        status, err = run(subprocess.DEVNULL, *own, *args, "--", "true")
        assert status == 105 and own[1] in err, "no image is looked for"


def test_a_kernel_from_a_pipe_gets_the_image_s_initrd(tmp_path: Path) -> None:
    """Nothing is read of the pipe to find out what the kernel is."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    own = ("--kernel", str(pipe), "--image", "other", "--root", "/usr", "--", "true")
    status, err = run(subprocess.DEVNULL, *own)
    assert status == 105 and "'other'" in err


# --- where it runs --------------------------------------------------------------------------------


def test_in_the_testbed_host_testbed_is_here(
    bed: list[list[str]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A forwarded command still has the option. It must not start a testbed within the testbed."""
    argv = ["run", "--host", "testbed", "--kernel", "/nonexistent/kernel", "--net", "none"]
    assert cli.main(argv) == 7 and len(bed) == 1
    assert bed[0][-len(argv) + 1 :] == argv[1:]
    monkeypatch.setenv("PYVMM_IN_TESTBED", "1")
    assert cli.main(argv) == 105 and len(bed) == 1
    assert "/nonexistent/kernel" in capsys.readouterr().err


# --- a socket that is not where the guest is ------------------------------------------------------


def test_a_socket_here_is_none_in_the_testbed(
    bed: list[list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    """It is told before the boot, with a command that works."""
    argv = ["run", "--host", "testbed", "--net", "vhost-user,socket=/tmp/my s", "--", "ping", "x"]
    assert cli.main(argv) == 7 and len(bed) == 1
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    said, _, command = err.rstrip("\n").partition("pyvmm testbed -- sh -c ")
    assert said == (
        "pyvmm: socket=/tmp/my s: the guest runs in the testbed, so the back-end must, too: "
    )
    words = subprocess.run(
        ["sh", "-c", f"printf '%s\\n' {command}"], capture_output=True, text=True, check=True
    ).stdout
    assert words == (
        "pyvmm backend --socket '/tmp/my s' --tap tap0 --address 192.168.100.1/24 & "
        "pyvmm run --host local --host testbed --net 'vhost-user,socket=/tmp/my s' -- ping x; "
        "kill $!\n"
    )


def test_a_server_is_called_by_the_back_end(
    bed: list[list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    net = "emulated,switchable=vhost-user,socket=/tmp/s,server=on"
    assert cli.main(["run", "--host", "testbed", "--net", net, "--", "true"]) == 7
    assert "pyvmm backend --socket /tmp/s --client --tap tap0 " in capsys.readouterr().err


@pytest.mark.parametrize("net", ["vhost-user", "emulated", "none"])
def test_nothing_is_said_where_nothing_is_wrong(
    bed: list[list[str]], capsys: pytest.CaptureFixture[str], net: str
) -> None:
    assert cli.main(["run", "--host", "testbed", "--net", net, "--", "true"]) == 7
    assert cli.main(["run", "--host", "testbed", "--", "true"]) == 7
    assert (len(bed), capsys.readouterr().err) == (2, "")


# --- mistakes are told before a testbed starts ----------------------------------------------------


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--net", "vhostnet"], "did you mean vhost-net?"),
        (["--net", "emulated,mac=2:0:0:0:0:1", "--net", "emulated,mac=2:0:0:0:0:1"], "cards 0 and"),
        (["--image", "ubuntu"], "there is no image 'ubuntu'"),
        (["--cpus", "0"], "--cpus 0"),
        (["--memory", "lots"], "write 256M, 4G or 1T"),
        (["--budget", "no<=1"], "nothing is called 'no'"),
    ],
)
def test_a_mistake_is_told_at_once(bed: list[list[str]], args: list[str], said: str) -> None:
    with pytest.raises(PyvmmError, match=re.escape(said)):
        cli._main(["run", "--host", "testbed", *args, "--", "true"])
    assert bed == []


def test_a_machine_in_the_background_needs_a_testbed_that_stays(
    bed: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise no other command would find the machine."""
    monkeypatch.setenv("PYVMM_DETACHED", "1")
    argv = ["run", "--host", "testbed", "--kernel", "/dev/null", "--detach", "--name", "n", "--"]
    monkeypatch.setattr(Bed, "is_up", lambda self: False, raising=False)
    with pytest.raises(TestbedError, match="start it: pyvmm testbed up"):
        cli._main([*argv, "true"])
    monkeypatch.setattr(Bed, "is_up", lambda self: True, raising=False)
    assert cli._main([*argv, "true"]) == 7
    assert "--detach" in bed[0]


def test_commands_from_a_pipe_do_not_go_into_the_background() -> None:
    done = subprocess.run(
        [*PYVMM, "run", "--detach", "--name", "n"],
        cwd=ROOT,
        input="echo lost",
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and "cannot read standard input" in done.stderr
