"""``make fuzz`` itself: what it reads of libFuzzer's words, and what it says of findings. A program
of a few lines plays libFuzzer, so that neither clang nor atheris is needed.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from tests.fuzz import __main__ as runner
from tests.fuzz import engine
from tests.fuzz.data import INTERESTING, Data
from tests.fuzz.registry import BY_NAME, TARGETS, C, Target

#: libFuzzer's words, with and without a crash; its last arguments are those of a run.
WORDS = """
echo 'INFO: Seed: 1'
printf '#2\\tINITED cov: 14 ft: 14 corp: 1/1b exec/s: 0 rss: 56Mb\\n'
printf '#6117\\tNEW    cov: 54 ft: 384 corp: 106/24Kb lim: 1024 exec/s: 679 rss: 58Mb\\n'
"""
CRASH = """
for a; do case $a in -artifact_prefix=*) echo input >"${a#*=}crash-1234" ;; esac; done
echo 'ERROR: it crashed'
exit 77
"""
GOOD = "echo 'stat::number_of_executed_units: 9000'"


@pytest.fixture(autouse=True)
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(engine, "WORK", tmp_path)
    monkeypatch.setattr(engine, "FOUND", tmp_path / "found")
    monkeypatch.setattr(engine, "check_atheris", lambda: None)
    return tmp_path


def play(monkeypatch: pytest.MonkeyPatch, *argv: str, crash: str = "") -> int:
    """Run ``make fuzz`` with such a program for each target; ``crash`` is the one that crashes."""

    def command(target: Target) -> list[str]:
        end = CRASH if target.name == crash else GOOD
        return ["sh", "-c", WORDS + end, "fuzz"]

    monkeypatch.setattr(engine, "command", command)
    monkeypatch.setattr(sys, "argv", ["fuzz", "--minutes", "0.01", *argv])
    return runner.main()


def test_a_run_without_a_finding(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], work: Path
) -> None:
    assert play(monkeypatch, "--seed", "7", "qmp", "agent") == 0
    report = json.loads((work / "report.json").read_text())
    assert (report["seed"], report["findings"], report["executions"]) == (7, 0, 18000)
    assert [(t["target"], t["edges"], t["finding"]) for t in report["targets"]] == [
        ("qmp", 54, ""),
        ("agent", 54, ""),
    ]
    out, err = capfd.readouterr()
    assert "seed 7: 18,000 executions, 0 findings" in out
    assert err.startswith("seed 7: 2 targets")


def test_a_finding_is_kept_and_said(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], work: Path
) -> None:
    assert play(monkeypatch, "qmp", "agent", "--json", str(work / "r"), crash="agent") == 1
    found = work / "found/agent-crash-1234"
    report = json.loads((work / "r").read_text())
    assert [t["finding"] for t in report["targets"]] == ["", str(found)]
    assert found.read_text() == "input\n"
    out = capfd.readouterr().out
    assert "ERROR: it crashed" in out
    assert f"again: .venv/bin/python -m tests.fuzz --again {found}" in out


def test_an_input_is_run_again_by_its_own_target(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []

    def command(target: Target) -> list[str]:
        ran.append(target.name)
        return ["false"]

    monkeypatch.setattr(engine, "command", command)
    monkeypatch.setattr(sys, "argv", ["fuzz", "--again", "x/life-tsan-crash-1"])
    assert runner.main() == 1
    assert ran == ["life-tsan"]
    monkeypatch.setattr(sys, "argv", ["fuzz", "--again", "x/nothing"])
    assert runner.main() == 3


def test_without_clang_it_says_so(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    monkeypatch.setattr(sys, "argv", ["fuzz", "vring"])
    assert runner.main() == 3
    assert capfd.readouterr().err == (
        "fuzz: fuzzing C needs clang: apt-get install clang, or make setup SETUP=--fuzz\n"
    )


@pytest.mark.parametrize("argv", [["nope"], ["--minutes", "0"], ["--jobs", "0"], ["--seed", "-1"]])
def test_wrong_usage(monkeypatch: pytest.MonkeyPatch, argv: list[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["fuzz", *argv])
    with pytest.raises(SystemExit) as e:
        runner.main()
    assert e.value.code == 2


def test_names_lead_to_one_target() -> None:
    assert len(BY_NAME) == len(TARGETS)
    assert all(t.share > 0 and (t.longest or isinstance(TARGETS[t], C)) for t in TARGETS)


def test_data_is_made_from_the_front_and_ends_in_zeros() -> None:
    d = Data(bytes([3, 0x34, 0x12, 2, 65, 66, 67]))
    assert (d.below(2), d.number(2), d.some(9), d.left) == (1, 0x1234, b"AB", 1)
    assert d.rest() == b"C" and d.number(4) == 0 and not d.one_in(4) and d.of((5, 6)) == 5
    assert Data(bytes([INTERESTING.index(0xFFFF)])).value(1) == 0xFF
