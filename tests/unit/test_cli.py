"""The command line without a VM: bad input is one line and a documented exit status; start-up stays
light.
"""

from __future__ import annotations

import importlib
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pyvmm import cli, errors
from pyvmm.cli import guard
from pyvmm.cli.support.parser import Parser
from pyvmm.cli.support.plain import NotPlain, Plain
from pyvmm.errors import PyvmmError

ROOT = Path(__file__).resolve().parents[2]


def run(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str, str]:
    """(exit status, stdout, stderr) of ``pyvmm ARGV``, in this process."""
    try:
        status = cli.main(list(argv))
    except SystemExit as e:
        assert e.code is None or isinstance(e.code, int)
        status = e.code or 0
    out = capsys.readouterr()
    return status, out.out, out.err


BAD = {
    ("frobnicate",): "there is no command 'frobnicate'; see pyvmm --help",
    ("swtich", "vm0", "emulated"): "did you mean switch? see pyvmm --help",
    ("run", "--kernle", "x"): "--kernle; did you mean --kernel? see pyvmm run --help",
    ("--json", "ps"): "options come after the command: pyvmm ps --json; see pyvmm ps --help",
    ("ps", "--jsno"): "did you mean --json? see pyvmm ps --help",
    ("run", "uname", "-a"): "put -- before the guest's command: pyvmm run -- uname -a",
    ("run", "--cpus", "2", "ls", "-l", "a b"): "pyvmm run --cpus 2 -- ls -l 'a b'",
    ("run", "--net", "vhostnet"): "did you mean vhost-net? modes: none",
    ("run", "--net", "emulated,mtv=3"): "did you mean mtu? keys: tap",
    ("run", "--net", "none", "--detach", "--", "x"): "--detach without --name",
    ("run", "--net", "none", "--detach=/nonexistent/x", "--name", "n", "--", "x"): "--detach /non",
    ("run", "--net", "none", "--detach", "--name", "a/b", "--", "x"): "no name for a machine",
    ("run", "--frobnicate"): "unrecognized arguments: --frobnicate",
    ("run", "--cpu", "2"): "the host's; did you mean --cpus 2?",
    ("run", "--cp", "2"): "unrecognized arguments: --cp",  # no abbreviations
    ("run", "--cpus", "two"): "invalid int value: 'two'",
    ("run", "--cpus"): "expected one argument",
    ("run", "--host", "moon"): "choose from auto, local, testbed",
    ("nic", "lst", "vm0"): "did you mean list? see pyvmm nic --help",
    ("testbed", "stauts"): "did you mean status? for a command: pyvmm testbed -- stauts",
    ("testbed", "--json", "up"): "--json without status or doctor",
    ("matrix", "--json", "-", "--resume"): "--resume without --json; name the file",
    ("run", "--on-reboot", "dance"): "choose from exit, restart",
    ("run", "--timeout", "0"): "positive number of seconds",
    ("run", "--timeout", "-3"): "positive number of seconds",
    ("run", "--timeout", "nan"): "positive number of seconds",
    ("run", "--timeout", "inf"): "positive number of seconds",
    ("run", "--timeout", "1e300"): "positive number of seconds",
    ("run", "--timeout", "soon"): "invalid float value",
    ("run", "--boot-timeout", "0"): "--boot-timeout 0; use a positive number of seconds",
    ("run", "--hang-timeout", "0.05"): "--hang-timeout 0.05; use 0.1 seconds or more",
    ("run", "--trace-events", "3"): "--trace-events 3; use 16 to 16777216",
    ("run", "--trace-events", "3.5"): "invalid int value: '3.5'",
    ("run", "--pcap", "-", "--", "x"): "name a file, or: pyvmm capture NAME - | wireshark -k -i -",
    ("capture", "--snaplen", "0", "vm0", "x"): "--snaplen 0; use 1 to 262144",
    ("run", "--fail-on", "oops,ooops"): "--fail-on ooops; use panic, oops, bug, ",
    ("test", "-j", "257", "x"): "--jobs 257; use 1 to 256",
    ("top", "--interval", "nan", "vm0"): "--interval nan; use 0.1 to 3600 seconds",
    ("rings", "--watch", "0", "vm0"): "--watch 0; use 0.05 to 3600 seconds",
    ("powerdown", "--wait", "-1", "vm0"): "--wait -1; use a positive number of seconds",
    ("vhost-user", "probe", "--timeout", "0", "s"): "--timeout 0; use up to 3600 seconds",
    ("backend", "--queues", "33", "--socket", "s", "--loopback"): "--queues 33; use 1 to 32",
    ("compare", "--cpus", "256"): "--cpus 256; use 1 to 255",
    ("run", "--net", "bridge"): "modes: none, emulated",
    ("run", "--net", "emulated,wings=1"): "unknown key 'wings'",
    ("run", "--net", "emulated,mtu=1,mtu=2"): "mtu is given twice",
    ("run", "--net", "emulated,mac=nonsense"): "52:54:00:12:34:56",
    ("run", "--net", "emulated,mtu=10"): "use 68 to 65521",
    ("run", "--net", "emulated,tap=\udcff"): "no interface name",
    ("run", "--net", "none", "--cpus", "0"): "use 1 to 255",
    ("run", "--net", "none", "--cpus", "256"): "use 1 to 255",
    ("run", "--net", "none", "--memory", "lots"): "write 256M, 4G or 1T",
    ("run", "--net", "none", "--memory", ""): "write 256M, 4G or 1T",
    ("run", "--net", "none", "--memory", "-1"): "write 256M, 4G or 1T",
    ("run", "--net", "none", "--memory", "\u00b2M"): "write 256M, 4G or 1T",
    ("run", "--net", "none", "--memory", "512K"): "use 1M to 16T",
    ("run", "--net", "none", "--memory", "99999999999999999999G"): "use 1M to 16T",
    ("run", "--net", "none", "--memory", "9" * 5000): "write 256M, 4G or 1T",
    ("run", "--net", "none", "--report", "/nonexistent/report"): "--report /nonexistent/report",
    ("testbed", "up", "--memory", "\u00b2G"): "write 256M, 4G or 1T",
    ("testbed", "up", "--memory", "9" * 5000): "write 256M, 4G or 1T",
    ("testbed", "up", "--memory", "256M"): "use 512M to 64G",
}


@pytest.mark.parametrize("argv", BAD, ids=lambda argv: ascii(" ".join(argv))[:50])
def test_bad_usage_is_one_line_and_status_2(
    capsys: pytest.CaptureFixture[str], argv: tuple[Any, ...]
) -> None:
    extra = ("--host", "local", "--kernel", "/dev/null") if "--net" in argv else ()
    status, out, err = run(capsys, *argv, *extra)
    # From Python 3.12 on, argparse has no quotation marks round choices.
    assert BAD[argv].replace("'", "") in err.replace("'", "")
    assert (status, out) == (2, "")
    assert err.startswith("pyvmm: ") and err.count("\n") == 1 and "Traceback" not in err


@pytest.mark.parametrize(
    ("line", "name", "wanted"),
    [
        ("qmp vm0 --host local stop", "words", ["stop"]),
        ("qmp vm0 set_link --host local up=false", "words", ["set_link", "up=false"]),
        ("nic add vm0 --id net3 vhost-net", "net", "vhost-net"),
        ("matrix --kernels a --seconds 0", "kernels", "a"),
        ("test a --timeout 5 b", "kernels", ["a", "b"]),
        ("run --kernel a -- b --memory 1", "guest_command", ["b", "--memory", "1"]),
    ],
)
def test_an_argument_that_may_be_missing_stands_behind_an_option(
    line: str, name: str, wanted: object
) -> None:
    command, *args = line.split()
    module = importlib.import_module(f"pyvmm.cli.{command}")
    parser = Parser()
    module.add_arguments(parser)
    assert vars(parser.parse_args(args))[name] == wanted


PLAIN = (
    "run",
    "run -- uname -a",
    "run -- sh -c 'a b' -- -x --",
    "run --",
    "run --cpus 2 --memory 512M --net none -v -- x",
    "run --cpus=2 --append= --append=--x --host local --exits",
    "run --net emulated,mtu=9000 --net=none --initrd a --initrd b --timeout 5 -- x",
    "run --detach --name vm0 -- x",
    "run --detach=log --name vm0 --on-reboot restart -- x",
    "run --detach log -- x",
    "run --fail-on oops --budget notify==0 --cpu host,-x2apic --trace-events 4096",
    "ps --json",
    "ps",
    "doctor",
)
NOT_PLAIN = (
    "compare --cpus 2 --repeat 3 --seconds 2 --json x",
    "backend --socket s --loopback --poll 20 --queues 2",
    "run uname",
    "run --host local uname -a",
    "run --cpus two",
    "run --cpus",
    "run --cpus -2",
    "run --host=moon",
    "run --on-reboot dance",
    "run --exits=yes",
    "run --frobnicate 1 -- x",
    "run --cp 2",
    "run -h",
    "run --json -",
    "stop vm0",
    "nic add vm0 --id net3 vhost-net",
    "testbed up",
)


@pytest.mark.parametrize("line", [*PLAIN, *NOT_PLAIN])
def test_plain_lines_mean_what_argparse_takes_them_for(line: str) -> None:
    command, *words = shlex.split(line)
    module = importlib.import_module(f"pyvmm.cli.{command}")
    plain, parser = Plain(), Parser()
    try:
        module.add_arguments(plain)
    except NotPlain:
        assert line in NOT_PLAIN
        return
    read = plain.parse(words)
    assert (read is not None) == (line in PLAIN)
    if read is not None:
        module.add_arguments(parser)
        taken, rest = parser.parse_known_args(words)
        assert vars(read) == vars(taken) and not rest


def test_defaults_are_not_shared() -> None:
    plain = Plain()
    importlib.import_module("pyvmm.cli.run").add_arguments(plain)
    once = plain.parse(["--add", "a", "--share", "b"])
    again = plain.parse(["--add", "c"])
    assert once is not None and again is not None
    assert (once.add, once.share, again.add, again.share) == (["a"], ["b"], ["c"], [])


def test_a_known_line_needs_no_argparse() -> None:
    line = ["run", "--host", "local", "--net", "none", "--kernel", "/nonexistent", "--", "x"]
    assert not loaded(CALL.format(argv=line)) & {"argparse", "re", "enum", "socket", "signal"}


def test_32_cards_are_one_too_many(capsys: pytest.CaptureFixture[str]) -> None:
    nets = [word for _ in range(32) for word in ("--net", "emulated")]
    status, _, err = run(capsys, "run", "--host", "local", "--kernel", "/dev/null", *nets)
    assert (status, err.count("\n")) == (2, 1) and "at most 31" in err


def test_help_of_all_commands(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run(capsys, "--help")
    assert status == 0 and all(name in out for name in cli.COMMANDS) and "Examples:" in out
    for name in cli.COMMANDS:
        status, out, err = run(capsys, name, "--help")
        assert status == 0 and out.startswith(f"usage: pyvmm {name}") and not err


def test_help_of_run_has_examples_and_every_key_and_code(
    capsys: pytest.CaptureFixture[str],
) -> None:
    from pyvmm.netopt import COMMON_KEYS, GROUPS, MODES

    _, out, _ = run(capsys, "run", "--help")
    assert "Examples:" in out and "pyvmm run -- ip addr" in out
    for word in (*MODES, *COMMON_KEYS, *GROUPS, *(key for keys in MODES.values() for key in keys)):
        assert word in out, word


def test_the_workflow_of_the_example_uses_options_that_exist(
    capsys: pytest.CaptureFixture[str],
) -> None:
    text = (ROOT / "docs/examples/kernel-ci/.github/workflows/kernel.yml").read_text()
    commands = re.findall(r"pyvmm (run|testbed) (?!setup)((?:.*\\\n)*.*)", text)
    assert [name for name, _ in commands] == ["run", "testbed"]
    inner = commands[1][1].split("pyvmm run ")[1]
    for name, words in (*commands, ("run", inner)):
        _, out, _ = run(capsys, name, "--help")
        own = words.split("pyvmm run ")[0] if name == "testbed" else words
        options = re.findall(r"--[a-z-]+", own)
        assert len(options) > (8 if words == commands[0][1] else 2)
        assert [o for o in options if f"{o} " not in out] == []


def test_no_command_shows_help(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run(capsys)
    assert status == 2 and "usage: pyvmm" in out
    status, out, _ = run(capsys, "--version")
    assert status == 0 and out.startswith("pyvmm 0.")


def test_every_error_class_has_a_documented_exit_code() -> None:
    table = (ROOT / "docs" / "exit-codes.md").read_text()
    codes = {
        c.exit_code
        for c in vars(errors).values()
        if isinstance(c, type) and issubclass(c, PyvmmError)
    }
    for code in codes:
        assert f"| {code} |" in table, code
    assert not codes & set(range(3, 101))  # those are the guest's


def statuses(text: str) -> set[int]:
    """The numbers in a sentence about exit statuses; ``102..104`` and ``113 to 115`` are ranges."""
    found = set()
    for low, _, high in re.findall(r"(?<![\w.-])(\d{1,3})(?:(\.\.| to )(\d{1,3}))?(?![\w-])", text):
        found |= set(range(int(low), int(high or low) + 1))
    return found


def test_every_documented_exit_code_can_occur() -> None:
    """Those of errors, of signals, and of commands that have been told to end."""
    page = (ROOT / "docs/exit-codes.md").read_text().partition("## Statuses of other")[0]
    listed = {n for row in re.findall(r"(?m)^\| ([\d, ]+) \|", page) for n in statuses(row)}
    of_errors = {
        c.exit_code
        for c in vars(errors).values()
        if isinstance(c, type) and issubclass(c, PyvmmError)
    }
    others = {0, 130, 143, 129, 141}
    assert listed == of_errors | others
    assert not {n for n in listed - {0, 2} if not 101 <= n <= 143}


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_a_command_s_exit_codes_are_documented(command: str) -> None:
    """Each help text has its own; the page has all of them."""
    page = (ROOT / "docs/exit-codes.md").read_text()
    text = importlib.import_module(f"pyvmm.cli.{command.replace('-', '_')}").__doc__ or ""
    _, _, told = text.partition("Exit status:")
    assert told, "there are none in the help text"
    first, _, others = page.partition("## Statuses of other")
    row = next((r for r in others.splitlines() if f"`pyvmm {command}" in r), "")
    table = {n for r in re.findall(r"(?m)^\| ([\d, ]+) \|", first) for n in statuses(r)}
    assert statuses(told.partition("\n\n")[0]) <= table | statuses(row), command


def test_guard(capsys: pytest.CaptureFixture[str]) -> None:
    def fail(error: Any) -> Callable[..., Any]:
        def body() -> None:
            raise error

        return body

    assert guard(lambda: 7) == 7
    assert guard(fail(errors.NetError("no tap", "make one"))) == 106
    assert capsys.readouterr().err == "pyvmm: no tap; make one\n"
    assert guard(fail(KeyboardInterrupt())) == 130
    assert guard(fail(BrokenPipeError())) == 141


# --- start-up -------------------------------------------------------------------------------------

HEAVY = {
    "asyncio",
    "dataclasses",
    "elftools",
    "inspect",
    "json",
    "logging",
    "pathlib",
    "psutil",
    "ssl",
    "subprocess",
    "tempfile",
    "typing",
    "unittest",
}


def loaded(code: str) -> set[str]:
    """The modules loaded once a fresh interpreter has run ``code``."""
    code = f"import sys\n{code}\nprint(*sys.modules, file=sys.stderr)"
    argv = [
        sys.executable,
        "-S",
        "-c",
        f"sys_path={sys.path!r}\nimport sys; sys.path[:] = sys_path\n{code}",
    ]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return set(done.stderr.split())


CALL = "from pyvmm.cli import main\ntry: main({argv!r})\nexcept SystemExit: pass"


def test_help_loads_neither_the_extension_nor_anything_heavy() -> None:
    modules = loaded(CALL.format(argv=["run", "--help"]))
    ours = {m for m in modules if m.startswith("pyvmm")}
    cli = {"pyvmm.cli", "pyvmm.cli.run", "pyvmm.cli.support"}
    names = ("options", "parser", "plain", "helptext")
    support = {f"pyvmm.cli.support.{name}" for name in names}
    assert ours == {"pyvmm", "pyvmm.errors", *cli, *support}
    # From Python 3.14 on, argparse loads some of them for its colours.
    its = loaded("import argparse; argparse.ArgumentParser(prog='x').format_help()")
    assert not modules & (HEAVY | {"_cffi_backend", "threading", "signal"}) - its


def test_a_run_loads_nothing_heavy() -> None:
    """All that the start of `pyvmm run --host local` needs, short of the guest."""
    modules = loaded(
        "import pyvmm.machine, pyvmm.netopt, pyvmm.cli.run, pyvmm.cli.support.terminal, "
        "pyvmm.devices.console\n"
        "import pyvmm.control.server, pyvmm.control.commands, pyvmm.control.registry\n"
        "import pyvmm.virtio.net, pyvmm.virtio.pci.transport, pyvmm.datapath.emulated, "
        "pyvmm.hostnet.netns, pyvmm.hostnet.tap"
    )
    assert "pyvmm._ext" in modules
    assert not modules & HEAVY


@pytest.mark.parametrize("command", [("testbed", "setup"), ("image", "build"), ("image", "list")])
def test_a_cache_that_cannot_be_written(
    command: tuple[str, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    status, _out, err = run(capsys, *command)
    if command[-1] == "list":
        assert (status, err) == (0, "")
    else:
        assert status in (101, 111) and err.count("\n") == 1 and "XDG_CACHE_HOME" in err, err
        assert f"{tmp_path}/file" in err
