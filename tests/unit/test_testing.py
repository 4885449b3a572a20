"""Verdicts, JUnit, single results in a console, symbols, and the format of unittests.cfg."""

from __future__ import annotations

import os
import re
import time
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyvmm import errors
from pyvmm.cli.support.outputs import Outputs
from pyvmm.cli.test import _let_go
from pyvmm.errors import UsageError
from pyvmm.outcome import Outcome
from pyvmm.testing import points, suite, unittests
from pyvmm.testing.junit import TestCase, document
from pyvmm.testing.symbols import Symbols
from pyvmm.testing.verdict import CODES, Verdict, clean, judge_test, last_lines, of_error

if TYPE_CHECKING:
    from pyvmm.outcome import Kind
    from pyvmm.testing.junit import Result

ROOT = Path(__file__).parents[2]


# --- verdicts -------------------------------------------------------------------------------------


def outcome(kind: Kind, status: int | None = None, detail: str = "") -> Outcome:
    made = Outcome(kind, detail)
    made.status = status
    return made


@pytest.mark.parametrize(
    ("end", "kind", "text"),
    [
        (outcome("debug-exit", 1), "passed", ""),
        (outcome("poweroff", 0), "passed", ""),
        (outcome("debug-exit", 77), "skipped", "cannot test"),
        (outcome("poweroff", 77), "skipped", "cannot test"),
        (outcome("debug-exit", 3), "failed", "debug-exit with 1, status 3"),
        (outcome("poweroff", 1), "failed", "status 1"),
        (outcome("poweroff"), "ended", "without a status"),
        (outcome("stopped"), "interrupted", "stopped"),
        (outcome("panic", None, "Attempted to kill init"), "panic", "Attempted to kill init"),
        (outcome("reboot"), "reboot", "rebooted"),
        (outcome("triple-fault", None, "vCPU 1"), "triple-fault", "vCPU 1"),
        (outcome("kvm-error", None, "x"), "kvm-error", "KVM_RUN failed: x"),
        (outcome("timeout", None, "2 s are over"), "timeout", "2 s are over"),
    ],
)
def test_verdict_of_a_test_kernel(end: Outcome, kind: str, text: str) -> None:
    verdict = judge_test(end)
    assert verdict.kind == kind
    assert text in verdict.message and "\n" not in verdict.message
    assert verdict.good == (kind in ("passed", "skipped"))


def test_codes_are_the_errors_own_and_documented() -> None:
    table = (ROOT / "docs" / "exit-codes.md").read_text()
    for kind, (cls, _) in Outcome.ERRORS.items():
        assert CODES[kind] == cls.exit_code
    assert CODES["ended"] == errors.GuestEnded.exit_code
    assert CODES["error"] == errors.ImageError.exit_code
    assert CODES["host-problem"] == errors.HostError.exit_code
    for name, code in CODES.items():
        if name not in ("failed", "skipped"):
            assert re.search(rf"^\| [^|]*\b{code}\b", table, re.M), name
    assert Verdict("failed", status=5).code == 5
    for error in (errors.UsageError("x"), errors.BuildError("x"), errors.ImageError("x")):
        assert (of_error(error).kind, of_error(error).code) == ("error", error.exit_code)
    for host_error in (errors.KvmMissing("x"), errors.NetError("x"), errors.TestbedError("x")):
        verdict = of_error(host_error)
        assert (verdict.kind, verdict.code) == ("host-problem", host_error.exit_code)
    assert Verdict("failed").code == 1


def test_last_lines() -> None:
    assert last_lines(b"") == []
    assert last_lines(b"a\r\nb\x1b[2J\xff\n", 5) == [
        "a",
        "b\N{REPLACEMENT CHARACTER}[2J\N{REPLACEMENT CHARACTER}",
    ]
    assert last_lines(b"".join(b"%d\n" % i for i in range(100)), 2) == ["98", "99"]
    assert clean("tab\tkept \r") == "tab\tkept"


# --- JUnit ----------------------------------------------------------------------------------------


def test_junit_is_xml_whatever_the_console_says() -> None:
    nasty = bytes(range(256)) + b"]]> <&\"' \xf0\x9f\x98\x80 \xed\xa0\x80" + b"\x00" * 10
    cases = [
        TestCase(
            "pyvmm",
            'a & <b> "q" \x1b\udcff',
            1.5,
            "passed",
            output=nasty,
            properties={"k\x00": "<v>\n\t"},
        ),
        TestCase(
            "pyvmm",
            "b",
            0.1,
            "failed",
            kind="panic",
            message="not <syncing>\nx",
            text="trace\x07\n&",
            output=b"x" * (1 << 17),
        ),
        TestCase("pyvmm", "c", 0, "error", kind="error", message="m"),
        TestCase("pyvmm", "d", 0, "skipped", message="why"),
    ]
    suite = ET.fromstring(document("s", cases, 2.0).encode()).find("testsuite")
    assert suite is not None
    assert [suite.get(k) for k in ("tests", "failures", "errors", "skipped")] == [
        "4",
        "1",
        "1",
        "1",
    ]
    found = suite.findall("testcase")
    assert found[0].get("name", "").startswith('a & <b> "q" ')
    assert [c.tag for c in found[1]] == ["failure", "system-out"]
    assert found[1][0].get("type") == "panic"
    assert len(found[1][1].text or "") <= 1 << 16
    assert [c.tag for c in found[2]] == ["error"] and [c.tag for c in found[3]] == ["skipped"]


ANY = st.text(st.characters(codec=None), max_size=20)  # surrogates, too: undecodable arguments


@given(st.binary(max_size=100), ANY, ANY, ANY, st.sampled_from(["failed", "error", "skipped"]))
def test_junit_says_what_it_was_told(
    output: bytes, name: str, message: str, text: str, result: Result
) -> None:
    def kept(words: str) -> str:
        return "\n".join(clean(line) for line in words.splitlines())

    case = TestCase(name, name, 1, result, message=message, text=text, output=output)
    case.properties = {name: message}
    written = document(name, [case], 1)
    assert written.isascii()  # right in any locale
    suite = ET.fromstring(written.encode()).find("testsuite")
    assert suite is not None and suite.get("name") == kept(name)
    found = suite[0]
    assert (found.get("name"), found.get("classname")) == (kept(name), kept(name))
    assert found[0][0].attrib == {"name": kept(name), "value": kept(message)}
    assert found[1].get("message") == kept(message)
    assert (found[1].text or "") == ("" if result == "skipped" else kept(text))
    said = found.findtext("system-out") or ""
    assert said == kept(output.decode(errors="replace"))


# --- single results -------------------------------------------------------------------------------


def told(text: str) -> list[tuple[str, str]]:
    return [(p.name, p.result) for p in points.parse(text.encode())]


def test_lines_of_test_kernels() -> None:
    text = (
        "enabling apic\r\nPASS: one\r\nFAIL: two: x\r\nSKIP: three\n"
        "XFAIL: four\nnot PASS: five\nSUMMARY: 4 tests\n"
    )
    assert told(text) == [
        ("one", "passed"),
        ("two: x", "failed"),
        ("three", "skipped"),
        ("four", "passed"),
    ]


def test_kunit() -> None:
    text = """[    0.060000] KTAP version 1
[    0.060000] 1..2
[    0.060000]     KTAP version 1
[    0.060000]     # Subtest: suite
[    0.060000]     # module: a_test
[    0.060000]     1..3
[    0.061000]     ok 1 adds
[    0.061000]     # takes: EXPECTATION FAILED at lib/a_test.c:12
[    0.061000][    T1]     not ok 2 takes
[    0.062000]         KTAP version 1
[    0.062000]         # Subtest: params
[    0.062000]         ok 1 zero
[    0.062000]         ok 2 one # SKIP no hardware
[    0.062000]     ok 3 params
[    0.062000] # suite: pass:2 fail:1 skip:0 total:3
[    0.062000] not ok 1 suite
[    0.070000] ok 2 other
"""
    assert told(text) == [
        ("suite/adds", "passed"),
        ("suite/takes", "failed"),
        ("suite/params/zero", "passed"),
        ("suite/params/one", "skipped"),
        ("other", "passed"),
    ]


def test_kselftest() -> None:
    text = """TAP version 13
1..3
# selftests: net: a.sh
# TAP version 13
# 1..2
# ok 1 - first
# not ok 2 - second # TODO later
ok 1 selftests: net: a.sh
# selftests: net: b.sh
# something
not ok 2 selftests: net: b.sh # exit=1
# selftests: net: c.sh
not ok 3 selftests: net: c.sh # TIMEOUT 45 seconds
"""
    found = points.parse(text.encode())
    assert [(p.name, p.result) for p in found] == [
        ("selftests: net: a.sh/first", "passed"),
        ("selftests: net: a.sh/second", "skipped"),
        ("selftests: net: b.sh", "failed"),
        ("selftests: net: c.sh", "failed"),
    ]
    assert [p.message for p in found[2:]] == ["exit=1", "TIMEOUT 45 seconds"]


def test_results_that_never_came() -> None:
    text = (
        "KTAP version 1\n1..3\nok 1 a\n    KTAP version 1\n    1..2\n    ok 1 b\n"
        "Kernel panic - not syncing: x\n"
    )
    assert told(text) == [
        ("b", "passed"),
        ("(plan)", "failed"),
        ("a", "passed"),
        ("(plan)", "failed"),
    ]


def test_a_sum_worse_than_its_parts() -> None:
    text = "TAP version 14\n    ok 1 a\nnot ok 1 s # crashed\n"
    assert told(text) == [("s/a", "passed"), ("s", "failed")]


def test_no_results_without_a_version_line() -> None:
    assert told("ok 1 looks like it\n1..4\nnot ok 2\n") == []
    assert told("") == []


def test_a_flood_of_results_is_bounded() -> None:
    many = points.parse(b"PASS: x\n" * 100_000)
    assert len(many) == points.POINTS_MAX + 1
    assert (many[-1].name, many[-1].result) == ("(results)", "failed")


def test_long_names_are_bounded() -> None:
    """Each result in an outer one has its name, too, and so many times."""
    inner = b"".join(b"    ok %d x\n" % n for n in range(10_000))
    many = points.parse(b"TAP version 13\n" + inner + b"ok 1 " + b"y" * (1 << 19))
    assert sum(len(p.name) for p in many) < points.TEXT_MAX + 100
    assert max(len(p.name) for p in many) == points.NAME_MAX
    assert (many[-1].name, many[-1].result) == ("(results)", "failed")
    assert f"{len(many) - 1} are read" in many[-1].message


@pytest.mark.parametrize(
    ("options", "console", "told", "reported"),
    [
        ((), 0, 0, False),
        (("--junit",), 1 << 16, 1, False),
        (("--json",), 0, 1, True),
        (("--junit", "--json"), 1 << 16, 1, True),
    ],
)
def test_what_is_kept_of_a_result(
    options: tuple[str, ...], console: int, told: int, reported: bool, tmp_path: Path
) -> None:
    """Of many kernels, what no output will have takes no memory."""
    result = suite.Result(suite.Case("x", "x"), Verdict("failed", "why"))
    result.console = bytes(1 << 20)
    result.points, result.report = [points.Point("a", "failed")], {"a": 1}
    with Outputs({option: str(tmp_path / option) for option in options}) as outputs:
        _let_go(result, outputs)
    assert (len(result.console), len(result.points)) == (console, told)
    assert (result.report is not None) == reported and result.verdict.message == "why"


# --- symbols --------------------------------------------------------------------------------------


def test_symbols_of_this_extension(tmp_path: Path) -> None:
    table = Symbols(str(tmp_path / "missing"))
    assert table.name(0x1000) == "" and "No such file" in table.problem
    for data, text in ((b"text", "no ELF"), (b"\x7fELF\x02\x01\x01" + bytes(9), "no symbols")):
        (tmp_path / "bad").write_bytes(data)
        table = Symbols(str(tmp_path / "bad"))
        assert table.name(0x1000) == "" and text in table.problem


# --- unittests.cfg --------------------------------------------------------------------------------

CONFIG = '''# a comment
[smptest]
file = smptest.flat
smp = 2
groups = smp quick

[max]
file = smptest.flat
smp = $MAX_SMP

[args]
file = vmexit.flat
extra_params = -cpu qemu64,+x2apic -m 2048 -append 'cpuid "a b"' -smp 3
timeout = 3m

[new-style]
file = vmexit.flat
test_args = "one two"
qemu_params = """-cpu max -m 4g
  -device pc-testdev"""
novelty = 1

[clock]
file = kvmclock.flat
extra_params = --append "10000000 `date +%s`"

[manual]
file=vmexit.flat
groups = nodefault vmexit
'''
SKIPPED = {
    "arch = i386": "i386 only",
    "accel = tcg": "tcg only",
    "check = /proc/sys/kernel/ostype=Hurd": "/proc/sys/kernel/ostype is not 'Hurd'",
    "check = /proc/sys/kernel/ostype": "names no value",
    "check = /dev/zero=0": "/dev/zero is no regular file",
    "check = /etc=x": "/etc is no regular file",
    "check = /proc/self/mem=x": "/proc/self/mem cannot be read",
    "check = /nonexistent=1": "/nonexistent cannot be read",
    "smp = $((MAX_SMP/2))": "is no number",
    "smp = 0": "is no number",
    "extra_params = -machine kernel_irqchip=split": "kernel_irqchip=split",
    "extra_params = -M q35,kernel-irqchip=on": "machine with q35",
    "extra_params = -device intel-iommu,intremap=on": "device intel-iommu",
    "extra_params = -cpu qemu64,-monoid": "unknown feature 'monoid'",
    "extra_params = -cpu max,vendor=Nobody": "vendor=Nobody",
    "extra_params = -cpu max,level=7": "with level=7",
    "extra_params = -cpu kvm64,hv_vpindex": "hv_vpindex",
    "extra_params = -append `cat /etc/passwd`": "needs a shell",
    "extra_params = -append 'open": "No closing quotation",
    "extra_params = -kernel": "needs QEMU's -kernel",
    "extra_params = -icount 3": "needs QEMU's -icount 3",
}


def config(tmp_path: Path, text: str) -> dict[str, unittests.Test]:
    path = tmp_path / "unittests.cfg"
    path.write_text(text)
    return {t.name: t for t in unittests.read(str(path), 8)}


def test_configuration(tmp_path: Path) -> None:
    tests = config(tmp_path, CONFIG)
    assert list(tests) == ["smptest", "max", "args", "new-style", "clock", "manual"]
    assert not any(t.skip for t in tests.values())
    one = tests["smptest"]
    assert (one.kernel, one.cpus, one.groups) == (
        str(tmp_path / "smptest.flat"),
        2,
        ["smp", "quick"],
    )
    assert tests["max"].cpus == 8
    args = tests["args"]
    assert (args.append, args.memory, args.cpus, args.timeout) == ('cpuid "a b"', "2048M", 3, 180.0)
    assert args.notes == ["-cpu qemu64,+x2apic: the CPU is host"] and args.cpu is None
    new = tests["new-style"]
    assert (new.append, new.memory) == ("one two", "4G")
    assert "key 'novelty' is not known and was left out" in new.notes
    first, second = tests["clock"].append.split()
    assert first == "10000000" and abs(int(second) - time.time()) < 600
    assert [t.name for t in tests.values() if t.manual] == ["manual"]


#: -cpu of QEMU -> --cpu of ours, None for the host's.
CPUS = {
    "host": "host,+pmu",
    "max,host-phys-bits": "host,+pmu",
    "max,pmu=off": None,
    "qemu64": None,
    "qemu64,+x2apic,-pcid,-invpcid": "host,-pcid,-invpcid",
    "max,+svm,-rdtscp": "host,-rdtscp,+pmu",
    "Opteron_G1,vendor=AuthenticAMD": "host,vendor=AuthenticAMD",
    "IvyBridge,phys-bits=36,host-phys-bits=off,+vmx": "host,phys-bits=36",
    "Skylake-Server,-vmx-mbec,+vmx-mbec": None,
    "host,migratable=no,smap=off": "host,-smap,+pmu",
}


@pytest.mark.parametrize("cpu", CPUS)
def test_cpus(tmp_path: Path, cpu: str) -> None:
    test = config(tmp_path, f"[t]\nfile = t.flat\nqemu_params = -cpu {cpu}\n")["t"]
    assert (test.cpu, test.skip) == (CPUS[cpu], "")


def test_options_that_make_no_difference(tmp_path: Path) -> None:
    test = config(tmp_path, "[t]\nfile = t.flat\nqemu_params = -machine pit=off\n")["t"]
    assert not test.skip and "AVIC" in test.notes[0]


@pytest.mark.parametrize("line", SKIPPED)
def test_what_cannot_be_had_is_skipped_with_the_reason(tmp_path: Path, line: str) -> None:
    test = config(tmp_path, f"[t]\nfile = t.flat\n{line}\n")["t"]
    assert SKIPPED[line] in test.skip


def test_a_check_neither_waits_nor_tells(tmp_path: Path) -> None:
    """A FIFO that nobody writes to, a file that is a secret, one that
    is long, and one that is no text.
    """
    fifo, secret, long = (tmp_path / name for name in ("fifo", "secret", "long"))
    os.mkfifo(fifo)
    secret.write_bytes(b"root:\xff:20228\n")
    long.write_bytes(b"1" + b" " * 5000)
    for path, said in ((fifo, "is no regular file"), (secret, "is not '1'"), (long, "is not '1'")):
        skip = config(tmp_path, f"[t]\nfile = t\ncheck = {path}=1\n")["t"].skip
        assert said in skip and "20228" not in skip
    secret.write_bytes(b" 1\n")
    assert not config(tmp_path, f"[t]\nfile = t\ncheck = {secret}=1\n")["t"].skip


def test_checks_add_up(tmp_path: Path) -> None:
    good = "check = /proc/sys/kernel/ostype=Linux"
    assert not config(tmp_path, f"[t]\nfile = t\n{good} /proc/sys/kernel/ostype=Linux\n")["t"].skip
    assert config(tmp_path, f"[t]\nfile = t\ncheck = /nonexistent=1\n{good}\n")["t"].skip


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("file = x\n", "line 1"),
        ("[a]\nfile = x\nnonsense\n", "line 3"),
        ("[a]\nsmp = 1\n", "test 'a' names no file"),
        ("[a]\nfile = x\ntimeout = soon\n", "timeout 'soon'"),
        ('[a]\nfile = x\nextra_params = """-m 1\n', "line 3: the quotes"),
        ("[]\n", "line 1"),
    ],
)
def test_malformed_configuration(tmp_path: Path, text: str, problem: str) -> None:
    with pytest.raises(UsageError, match=problem):
        config(tmp_path, text)


def test_missing_configuration(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="No such file"):
        unittests.read(str(tmp_path / "none.cfg"), 1)


@pytest.mark.parametrize(
    ("text", "value"), [("90", 90.0), ("90s", 90.0), ("0.5m", 30.0), ("1h", 3600.0), ("0", None)]
)
def test_times(text: str, value: float | None) -> None:
    assert unittests.seconds(text, "t") == value
