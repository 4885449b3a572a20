"""A testbed on another machine, as far as it needs none: addresses, what travels, the upload."""

from __future__ import annotations

import argparse
import fcntl
import importlib
import marshal
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from pyvmm.cli.support.options import add_host
from pyvmm.errors import TestbedError
from pyvmm.images.cpio import Listing
from pyvmm.testbed import layers, ssh, travel
from pyvmm.testbed import protocol as p
from pyvmm.testbed.testbed import Testbed, emulated

AGENT = str(Path(ssh.__file__).parent)


@pytest.mark.parametrize(
    ("text", "argv"),
    [
        ("ssh://box", ["--", "box"]),
        ("ssh://me@box.example:2222/", ["-l", "me", "-p", "2222", "--", "box.example"]),
        ("ssh://[2001:db8::1%eth0]:22", ["-p", "22", "--", "2001:db8::1%eth0"]),
    ],
)
def test_addresses(text: str, argv: list[str]) -> None:
    assert ssh.Address(text).argv == argv


@pytest.mark.parametrize(
    "text",
    ["ssh://", "ssh://-oProxyCommand=x", "ssh://-l@box", "ssh://a b", "ssh://box:0", "ssh://box:x",
     "ssh://box:65536", "ssh://box/path", "ssh://box\n", "ssh://$(id)", "http://box"],
)  # fmt: skip
def test_what_is_no_address_is_refused(text: str) -> None:
    with pytest.raises(TestbedError, match="is no address"):
        Testbed("x", host=text)


def test_a_real_machine_cannot_be_chosen_from_parts() -> None:
    with pytest.raises(TestbedError, match="leave these options out"):
        Testbed("x", host="ssh://box", cpus=2)
    bed = Testbed("x", host="ssh://box")
    assert bed.dir != Testbed("x").dir != Testbed("x", host="ssh://other").dir != bed.dir


def test_host_option(capsys: pytest.CaptureFixture[str]) -> None:
    parser = argparse.ArgumentParser()
    add_host(parser, "where")
    assert parser.parse_args(["--host", "ssh://box"]).host == "ssh://box"
    assert parser.parse_args([]).host == "auto"
    with pytest.raises(SystemExit):
        parser.parse_args(["--host", "box"])
    assert "invalid choice: 'box'" in capsys.readouterr().err


def test_the_paths_that_words_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "d").mkdir()
    (tmp_path / "link").symlink_to("d")
    os.mkfifo("fifo")
    argv = ["run", "--kernel=k.elf", "--disk", "path=d/img,format=raw", "--add", "link/f:/bin/f",
            "--memory", "d", "--share", "link:rw", "--report", "missing/r", "--log", "fifo",
            "--junit", "j", "--qmp", "ssh://box/x", "--root", "/", "--add=", "ls", "d/command",
            "--", "d/secret"]  # fmt: skip
    read = travel.named(travel.values(argv, travel.READ))
    real = {"k.elf": "k.elf", "d/img": "d/img", "link/f": "d/f", "link": "d"}
    assert {
        f"{tmp_path}/{name}": f"{tmp_path}/{real[name]}" for name in real
    }.items() <= read.items()
    for other in ("/", str(tmp_path), f"{tmp_path}/d/secret", f"{tmp_path}/d/command"):
        assert other not in read
    # What is only read must not come back.
    assert travel.named(travel.values(argv, travel.WRITTEN)) == {f"{tmp_path}/j": f"{tmp_path}/j"}
    kernels = travel.values(["matrix", "--kernels", "a", "b,c", "--seconds", "0"], travel.READ)
    assert kernels == ["a", "b,c"]


def test_single_files_come_back_and_no_others(tmp_path: Path) -> None:
    from tests.unit.test_testbed_intel import REGULAR, packed

    (tmp_path / "d").mkdir()
    (tmp_path / "link").symlink_to("d")
    places = [f"{tmp_path}/out", f"{tmp_path}/link/out"]
    assert travel.unpack(packed((f"{tmp_path}/out", REGULAR)), places) == [f"{tmp_path}/out"]
    for name in ("other", "out2", "d/out", "link/out"):
        with pytest.raises(TestbedError, match="for another directory"):
            travel.unpack(packed((f"{tmp_path}/{name}", REGULAR)), places)


def test_an_upload_sends_everything_before_the_frames(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"a" * 100_000)
    (tmp_path / "b").write_bytes(b"")
    (tmp_path / "c").write_bytes(b"c" * 5)
    r, w = os.pipe()
    os.set_blocking(w, False)
    fcntl.fcntl(w, fcntl.F_SETPIPE_SZ, 4096)
    files = [os.open(tmp_path / name, os.O_RDONLY) for name in "abc"]
    port = ssh.Upload(-1, w, b"head", files)
    came = bytearray()
    assert port.prelude() and port.busy
    assert not port.prelude(), "the pipe is full"
    while port.busy:
        came += os.read(r, 4096)
        port.prelude()
    os.close(w)
    while data := os.read(r, 4096):
        came += data
    os.close(r)
    assert bytes(came) == b"head" + b"a" * 100_000 + b"c" * 5


def test_why_ssh_has_ended() -> None:
    there = ssh.Ssh.__new__(ssh.Ssh)
    there.address, there._release = ssh.Address("ssh://me@box"), ""
    said = "Warning: x\npyvmm: there is no /dev/kvm\nConnection closed.\n"
    assert there.reason(113, said) == (
        "box: there is no /dev/kvm",
        "load kvm_intel or kvm_amd there, or use another machine",
    )
    assert there.reason(255, "") == (
        "box: ssh ended with 255, and said nothing",
        "does this work? ssh -o BatchMode=yes -l me -- box true",
    )
    for hello in ("1 6.1.0 8 x", "1 6.1.0", "1 \x1b[2J 8 1"):  # L1 is not trusted
        there.started(hello)
    assert there.release == ""
    there.started("1 6.1.0 8 1024")
    assert (there.release, there.cpus, there.memory) == ("6.1.0", 8, 1024)
    told = there.reason(255, "Timeout, server box not responding.")
    assert told == ("the connection to box has ended: Timeout, server box not responding", "")


def test_a_family_is_killed_without_a_cgroup(monkeypatch: pytest.MonkeyPatch) -> None:
    """Children in the session and in other sessions; not their siblings."""
    monkeypatch.syspath_prepend(AGENT)
    agent = importlib.import_module("agent")
    script = "setsid sh -c 'sleep 60 & sleep 60' & sleep 60 & echo ready; wait"
    with (
        subprocess.Popen(["sleep", "60"]) as other,
        subprocess.Popen(
            ["sh", "-c", script], stdout=subprocess.PIPE, start_new_session=True
        ) as command,
    ):
        assert command.stdout and command.stdout.readline() == b"ready\n"
        agent.kill_family(command.pid)
        assert command.wait(20) == -signal.SIGKILL
        assert command.stdout.read() == b"", "nobody has the pipe any more"
        assert other.poll() is None
        other.kill()


def test_the_agent_ends_with_its_input() -> None:
    """As process 1 of namespaces of its own; also if the other side is silent."""
    script = f"""import sys
sys.path.insert(0, {AGENT!r})
import agent
agent.os.kill = lambda pid, number: None  # it would be everybody
agent.os.path.exists = lambda path: True
agent.main()
"""
    for silence in (0.0, 0.2):
        with subprocess.Popen(
            [sys.executable, "-c", script, "-"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        ) as process:
            assert process.stdin and process.stdout
            assert process.stdout.read(8)[6] == p.HELLO
            if silence:
                config = marshal.dumps({"binds": [], "files": [], "silence": silence}, 2)
                process.stdin.write(p.frame(p.CONFIG, 0, config))
                process.stdin.flush()
            else:
                process.stdin.close()
                process.stdin = None
            assert process.wait(60) == 0


def test_figures_of_a_real_machine_are_none_of_an_emulated_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for value, expected in (("1", True), ("ssh", False)):
        monkeypatch.setenv("PYVMM_IN_TESTBED", value)
        assert emulated() == expected
    monkeypatch.delenv("PYVMM_IN_TESTBED")
    assert not emulated()


def test_layers_without_a_kernel() -> None:
    made = layers._agent().paths()
    assert "/run/pyvmm/agent.pyc" in made and "/run/pyvmm/loaded" in made and "/init" not in made


def test_the_links_by_which_files_are_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Relative, absolute, one behind another, and a home and a cache that are links; a loop leads
    nowhere, and /bin is a link there already.
    """
    (tmp_path / "data/her").mkdir(parents=True)
    (tmp_path / "far/cache").mkdir(parents=True)
    (tmp_path / "home").symlink_to("data")
    (tmp_path / "again").symlink_to(tmp_path / "home/her")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "data/her/.cache").symlink_to("../../far/cache")
    monkeypatch.setenv("HOME", str(tmp_path / "home/her"))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    names = [f"{tmp_path}/again", f"{tmp_path}/home/her", f"{tmp_path}/loop/x", "/bin", "/"]
    monkeypatch.setattr(layers, "lower", lambda kernel, progress: [])
    made = layers.archives(None, [], names, str(tmp_path / "top"), print)
    assert made == [str(tmp_path / "top")]
    listing = Listing()
    listing.add(made[0])
    for name in ("again", "home/her", "home/her/.cache/pyvmm", "data/her"):
        assert listing.has(listing.resolve(f"{tmp_path}/{name}".lstrip("/")))
    real = str(tmp_path).lstrip("/")
    assert listing.resolve(f"{real}/home/her/.cache/pyvmm") == f"{real}/far/cache/pyvmm"
    assert listing.resolve(f"{real}/again") == f"{real}/data/her"
    assert not listing.has("bin")
