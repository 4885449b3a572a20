"""The configuration file: whose it may be, what it may say, and what becomes of it."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pyvmm import cli
from pyvmm.cli.support.parser import Parser
from pyvmm.cli.support.settings import Settings, applied
from pyvmm.errors import UsageError

Pyvmm = Callable[..., tuple[int, str, str]]


@pytest.fixture
def pyvmm(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Pyvmm:
    """Run a command, with an environment of its own: exit status, stdout, stderr."""

    def run(*argv: str) -> tuple[int, str, str]:
        with monkeypatch.context() as context:
            context.setattr(os, "environ", os.environ.copy())
            return in_environment(*argv)

    def in_environment(*argv: str) -> tuple[int, str, str]:
        try:
            status = cli.main(list(argv))
        except SystemExit as e:
            assert e.code is None or isinstance(e.code, int)
            status = e.code or 0
        out = capsys.readouterr()
        return status, out.out, out.err

    return run


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The path of the user's own file, in a directory that is there."""
    monkeypatch.delenv("PYVMM_CONFIG", raising=False)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    path = tmp_path / "config/pyvmm/config.toml"
    path.parent.mkdir(parents=True)
    return path


def parser(command: str) -> Parser:
    made = Parser(prog=f"pyvmm {command}")
    __import__(f"pyvmm.cli.{command}", fromlist=["x"]).add_arguments(made)
    return made


def line(command: str, *words: str, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The command line that a command gets."""
    with monkeypatch.context() as context:
        context.setattr(os, "environ", dict(os.environ))
        return applied([command, *words], parser(command), cli.COMMANDS, None)[0]


def test_settings_are_options_that_the_user_has_not_given(
    own: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own.write_text(
        '[run]\nmemory = "1G"\ncpus = 2\nverbose = true\nexits = false\nnet = ["none", "user"]\n'
        '[image.build]\nkernel-version = "6.12"\n'
    )
    settings = ["--memory=1G", "--cpus=2", "--verbose", "--net=none", "--net=user"]
    assert line("run", "--", "x", monkeypatch=monkeypatch) == ["run", *settings, "--", "x"]
    assert line("run", "--cpus", "4", "--net=emulated", "--", "x", monkeypatch=monkeypatch) == [
        *("run", "--memory=1G", "--verbose", "--cpus", "4", "--net=emulated", "--", "x")
    ]
    # What belongs to the guest's command is not the user's option.
    assert line("run", "--", "x", "--memory", monkeypatch=monkeypatch)[1:6] == settings
    assert line("image", "build", "--tiny", monkeypatch=monkeypatch) == [
        *("image", "build", "--kernel-version=6.12", "--tiny")
    ]
    assert line("image", "list", monkeypatch=monkeypatch) == ["image", "list"]
    assert line("trace", "explain", "x", monkeypatch=monkeypatch) == ["trace", "explain", "x"]


def test_a_command_uses_its_settings(own: Path, pyvmm: Pyvmm) -> None:
    """The proof that main() takes them: a value that only the command itself finds wrong."""
    own.write_text('[run]\nmemory = "lots"\n')
    status, _, err = pyvmm("run", "--host", "local", "--kernel", "/dev/null", "--net", "none")
    assert status == 2 and err.count("\n") == 1
    assert err.startswith(f"pyvmm: {own}: run.memory: --memory 'lots' is no size; write 256M")
    status, _, err = pyvmm(
        *("run", "--host", "local", "--kernel", "/dev/null", "--net", "none", "--memory", "512K")
    )
    assert err.startswith("pyvmm: guest memory of 524288 bytes;")


def test_the_current_directory_is_not_searched(
    own: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pyvmm: Pyvmm
) -> None:
    """Whoever owns it may be hostile."""
    for name in ("pyvmm.toml", "config.toml", ".pyvmm.toml", "pyproject.toml"):
        (tmp_path / name).write_text("[run]\nnonsense = 1\n")
    monkeypatch.chdir(tmp_path)
    assert pyvmm("config") == (0, f"no configuration: there is no {own}\n", "")
    monkeypatch.setenv("XDG_CONFIG_HOME", ".")  # to be ignored, as the XDG specification says
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert pyvmm("config")[1] == (
        f"no configuration: there is no {tmp_path}/home/.config/pyvmm/config.toml\n"
    )
    monkeypatch.setenv("PYVMM_CONFIG", "pyvmm.toml")
    assert "PYVMM_CONFIG=pyvmm.toml is no absolute path" in pyvmm("config")[2]


def test_a_file_that_others_may_write_is_refused(own: Path, pyvmm: Pyvmm) -> None:
    own.write_text("")
    own.chmod(0o664)
    assert pyvmm("doctor") == (
        *(2, ""),
        f"pyvmm: {own} may be written by others; chmod go-w {own}\n",
    )
    own.chmod(0o644)
    own.parent.chmod(0o777)
    assert f"{own.parent} may be written by others" in pyvmm("doctor")[2]
    assert pyvmm("--help")[0] == 0 and pyvmm("doctor", "--help")[0] == 0
    # The user vouches for a file by naming it.
    own.parent.chmod(0o755)
    own.chmod(0o664)
    assert pyvmm("--config", str(own), "config")[0] == 0


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")
def test_a_file_of_another_user_is_refused(own: Path, pyvmm: Pyvmm) -> None:
    own.write_text("")
    os.chown(own, 12345, 12345)
    status, _, err = pyvmm("config")
    assert status == 2 and f"{own} belongs to user 12345, and this is user 0; " in err
    assert "pyvmm --config '' COMMAND" in err and pyvmm("--config", "", "config")[0] == 0
    os.chown(own, 0, 0)
    os.chown(own.parent, 12345, 12345)
    assert f"{own.parent} belongs to user 12345" in pyvmm("config")[2]


BAD = {
    "[rnu]\nx = 1": ": rnu: there is no such command; did you mean run?",
    "x = 1": ": x: there is no such command; its tables are commands, such as [run]",
    "run = 1": ": run: not a table; write [run]",
    "[run]\nmemroy = '1G'": ": run.memroy: there is no such option; did you mean memory?",
    "[run]\nhelp = true": ": run.help: there is no such option; ",
    "[run]\nverbose = 'yes'": ": run.verbose: 'yes' is no boolean; use true or false",
    "[run]\nmemory = true": ": run.memory: True is no value for --memory; use text or a number",
    "[run]\nmemory = ['1G']": ": run.memory: ['1G'] is no value for --memory; use text or a",
    "[run]\nnet = [['x']]": ": run.net: ['x'] is no value for --net; use text, a number or a list",
    "[image.biuld]\ntiny = true": ": image.biuld: there is no such option; ",
    "[image.build]\ntiyn = true": ": image.build.tiyn: there is no such option; did you mean tiny?",
    "[run": " is not TOML: ",
    "a = '\udcff'": " is not TOML: ",
}


@pytest.mark.parametrize("text", BAD, ids=ascii)
def test_what_is_wrong_is_one_line_with_file_and_key(own: Path, pyvmm: Pyvmm, text: str) -> None:
    own.write_bytes(text.encode(errors="surrogateescape"))
    status, out, err = pyvmm("config")
    assert (status, out, err.count("\n")) == (2, "", 1), err
    assert err.startswith(f"pyvmm: {own}{BAD[text]}"), err


def test_a_bad_value_names_its_key(own: Path, pyvmm: Pyvmm) -> None:
    own.write_text("[run]\nhost = 'moon'\n[test]\njobs = 0\n")
    assert f"{own}: test.jobs: --jobs 0; use 1 to 256" in pyvmm("test", "x")[2]
    assert f"{own}: run.host: " in pyvmm("run", "--net", "none", "--", "x")[2]


def test_files_that_are_none(
    own: Path, tmp_path: Path, pyvmm: Pyvmm, monkeypatch: pytest.MonkeyPatch
) -> None:
    status, _, err = pyvmm("--config", str(tmp_path / "none"), "config")
    assert status == 2 and "No such file or directory" in err and err.count("\n") == 1
    os.mkfifo(tmp_path / "fifo")
    assert "fifo is no regular file" in pyvmm(f"--config={tmp_path}/fifo", "config")[2]
    (tmp_path / "large").write_bytes(b"#" * (1 << 21))
    assert "larger than 1 MiB" in pyvmm("--config", str(tmp_path / "large"), "config")[2]
    own.write_text("[run]\nnonsense = 1\n")
    assert pyvmm("--config", "", "config")[0] == 0
    monkeypatch.setenv("PYVMM_CONFIG", "")
    assert pyvmm("config")[0] == 0
    own.unlink()
    own.mkdir()
    monkeypatch.delenv("PYVMM_CONFIG")
    assert "is no regular file" in pyvmm("config")[2]


def test_config_shows_what_is_in_force(
    own: Path, pyvmm: Pyvmm, monkeypatch: pytest.MonkeyPatch
) -> None:
    own.write_text('[run]\nmemory = "1G"\ncpus = 2\n[image.build]\ntiny = true\n')
    text = 'run.memory = "1G"\nrun.cpus = 2\nimage.build.tiny = true\n'
    assert pyvmm("config") == (0, f"{own}\n{text}", "")
    monkeypatch.setenv("PYVMM_CONFIG", str(own))
    assert pyvmm("config") == (0, f"{own} (PYVMM_CONFIG)\n{text}", "")
    _, out, _ = pyvmm("--config", str(own), "config", "--json")
    document: dict[str, Any] = json.loads(out)
    assert document == {
        "file": str(own),
        "named_by": "--config",
        "exists": True,
        "settings": {"run.memory": "1G", "run.cpus": 2, "image.build.tiny": True},
    }


def test_other_processes_of_a_command_read_no_file(
    own: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They have been given the settings; a file of the testbed's would come on top."""
    own.write_text("[run]\ncpus = 2\n")
    monkeypatch.setenv("PYVMM_CONFIG", str(own))
    applied(["run"], parser("run"), cli.COMMANDS, None)
    assert os.environ["PYVMM_CONFIG"] == ""
    assert Settings(cli.COMMANDS).table == {}
    with pytest.raises(UsageError, match="No such file"):
        Settings(cli.COMMANDS, "/nonexistent")


@pytest.mark.parametrize("named", ["", "empty"])
def test_no_process_of_a_command_reads_what_the_user_has_put_aside(
    own: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, named: str
) -> None:
    """Such as the machine of ``--detach``, also if the file of ``--config`` has no settings."""
    own.write_text("[run]\ncpus = 2\n")
    monkeypatch.setenv("PYVMM_CONFIG", str(own))
    if named:
        named = str(tmp_path / named)
        Path(named).touch()
    assert applied(["run"], parser("run"), cli.COMMANDS, named) == (["run"], {})
    assert Settings(cli.COMMANDS).table == {}
