"""`pyvmm compare --ladder` without a guest: rungs, what a step gained, table, picture, refusals."""

from __future__ import annotations

import argparse
import copy
import json
import subprocess
import xml.etree.ElementTree as ET
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from pyvmm import cli
from pyvmm.cli import compare
from pyvmm.compare import html, ladder, plan, schema, stats
from pyvmm.errors import UsageError
from pyvmm.netopt import Net
from tests.unit.test_compare import RECORD


def climb(speeds: dict[str, list[float]]) -> dict[str, Any]:
    """A record of a ladder: Mbit/s of tcp-tx per round. A rung without rounds could not be had."""
    record: dict[str, Any] = json.loads(Path(RECORD).read_text())
    workload = next(w for w in record["runs"][0]["workloads"] if w["name"] == "tcp-tx")
    like = record["modes"][0]
    record["settings"]["repeat"] = max(map(len, speeds.values()))
    record["settings"]["workloads"] = [{"name": "tcp-tx", "what": "a stream"}]
    record["modes"] = [
        {**like, "name": name, "problem": None if rounds else "no such device"}
        for name, rounds in speeds.items()
    ]
    record["runs"] = [
        {
            "mode": name,
            "repeat": repeat,
            "error": None,
            "boot_s": 1.0,
            "workloads": [{**copy.deepcopy(workload), "throughput_mbit_s": speed}],
        }
        for name, rounds in speeds.items()
        for repeat, speed in enumerate(rounds)
    ]
    record["summary"] = stats.summarise(record)
    record["ladder"] = ladder.steps(record)
    return record


SPEEDS = {"mmio": [90.0, 100.0, 110.0], "thread": [105.0, 150.0, 160.0], "vhost-vdpa": []}
SPEEDS |= {"vhost-net": [300.0, 310.0, 330.0]}


def speed_steps(record: dict[str, Any]) -> list[tuple[Any, ...]]:
    return [
        (s["below"], s["rung"], s["ratio"], s["verdict"])
        for s in record["ladder"]
        if s["measure"] == "throughput_mbit_s"
    ]


def test_every_rung_is_a_card_that_can_be_had() -> None:
    names = [rung.name for rung in ladder.RUNGS]
    assert len(set(names)) == len(names) == 13
    nets = {rung.name: Net.parse(rung.net) for rung in ladder.RUNGS}
    assert nets["pio"].legacy and nets["mmio"].worker == "vcpu"
    # From the textbook device to today's, each rung changes one thing.
    order = ["mmio", "thread", "ioeventfd", "irqfd", "event-idx", "indirect", "offloads", "batch"]
    for below, above in pairwise(order):
        a, b = nets[below], nets[above]
        keys = ("mode", "worker", "notify", "interrupt", "batch", "without")
        changed = [key for key in keys if getattr(a, key) != getattr(b, key)]
        assert len(changed) == 1, (below, above, changed)
    assert nets["batch"].without == [] and nets["batch"].batch
    assert [rung.name for rung in ladder.RUNGS if rung.vhost] == ["vhost-net"]
    assert [rung.name for rung in ladder.RUNGS if rung.huge] == ["huge"]


def test_rungs_are_chosen_in_the_ladder_s_order() -> None:
    assert [r.name for r in ladder.choose("batch, mmio")] == ["mmio", "batch"]
    assert ladder.choose("") == list(ladder.RUNGS)
    for text, why in (("mmoi", "did you mean mmio?"), ("mmio,mmio", "name each once")):
        with pytest.raises(UsageError, match=why):
            ladder.choose(text)


def test_a_step_is_the_ratio_to_the_rung_below_that_was_measured() -> None:
    record = climb(SPEEDS)
    assert speed_steps(record) == [
        ("mmio", "thread", 1.5, "noise"),  # 105..160 overlaps with 90..110
        ("thread", "vhost-net", round(310 / 150, 4), "differs"),
    ]
    assert schema.check(record) == ""
    alone = climb({name: rounds[:1] for name, rounds in SPEEDS.items()})
    assert [step[3] for step in speed_steps(alone)] == ["unknown", "unknown"]
    assert "of one round" in ladder.remark(alone)


def test_cpu_time_and_packets_per_second_are_worked_out() -> None:
    record = climb({"mmio": [100.0]})
    workload = record["runs"][0]["workloads"][0]
    workload["seconds"] = 2.0
    workload["packets"] |= {"packets_to_guest": 100, "packets_from_guest": 300}
    workload["packets"] |= {"bytes_to_guest": 1000, "bytes_from_guest": 9000}
    role = {"voluntary": 0, "involuntary": 0, "threads": 1}
    workload["threads"] = {"vcpu": {**role, "cpu_s": 0.5}, "worker": {**role, "cpu_s": 0.3}}
    value = {key: stats.BY_KEY[key].of(workload) for key in stats.DERIVED}
    assert value == {"packets_per_s": 200, "cpu_us_per_packet": 2000, "cpu_ns_per_byte": 80_000}
    workload["threads"] = {}
    assert stats.BY_KEY["cpu_us_per_packet"].of(workload) is None
    workload["packets"] = dict.fromkeys(workload["packets"], 0)
    assert stats.BY_KEY["cpu_ns_per_byte"].of(workload) is None


def test_the_table_names_each_rung_and_its_step(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "ladder.json"
    file.write_text(json.dumps(climb(SPEEDS)))
    picture = tmp_path / "ladder.svg"
    status = cli.main(["compare", "--from", str(file), "--svg", str(picture)])
    out = capsys.readouterr().out
    assert status == 1  # a rung is missing
    assert "100 (90..110)" in out and "x1.50 ≈" in out and "x2.07 ≈" not in out
    assert "x2.07" in out
    assert "vhost-vdpa cannot run here: no such device" in out
    assert "≈: within the noise, because the ranges of the 3 rounds overlap." in out
    assert "that of mmio" not in out  # the other comparison's remark
    root = ET.fromstring(picture.read_text())
    texts = [e.text for e in root.iter() if e.text]
    assert "From the textbook device to the offloaded one" in texts
    assert texts.count("vhost-net") >= 3 and {"150  x1.50 ≈", "310  x2.07"} <= set(texts)
    assert not [e for e in root.iter() if e.tag.endswith(("script", "image", "link"))]


def test_the_picture_of_a_whole_ladder_fits() -> None:
    names = [rung.name for rung in ladder.RUNGS]
    record = climb({name: [1.0 + i, 2.0 + i] for i, name in enumerate(names)})
    record["modes"][3]["name"] = record["runs"][6]["mode"] = "<b>&"
    root = ET.fromstring(html.ladder_figure(record))
    assert float(root.attrib["width"]) < 1400 and float(root.attrib["height"]) < 2500


@pytest.mark.parametrize(
    ("argv", "why"),
    [
        (["--rungs", "mmio"], "without --ladder"),
        (["--ladder", "--modes", "emulated"], "the rungs are the modes"),
        (["--ladder", "--peers", "qemu"], "the rungs are the modes"),
        (["--ladder", "--rungs", "top"], "unknown 'top'"),
        (["--ladder", "--rounds", "0"], "use 1 to 1000"),
    ],
)
def test_bad_usage_is_one_line(
    argv: list[str], why: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["compare", *argv]) == 2
    err = capsys.readouterr().err
    assert why in err and err.count("\n") == 1


def test_a_plan_of_rungs_runs_what_the_ladder_measures() -> None:
    p = plan.Plan(rungs=ladder.choose("mmio,batch"), workloads=",".join(ladder.WORKLOADS))
    assert p.ladder and [m.name for m in p.modes] == ["mmio", "batch"]
    assert p.servers() == ["tcp-tx", "tcp-rx", "pps-tx", "pps-rx"]


SCRIPT = Path(__file__).resolve().parents[2] / "tools/measure-here.sh"


def test_the_script_for_a_real_machine_shows_what_it_would_do(tmp_path: Path) -> None:
    """It runs this checkout's pyvmm wherever the shell stands, with options that exist."""
    done = subprocess.run(
        [SCRIPT, "--dry-run", "--rounds", "2", "here"], cwd=tmp_path, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (0, "") and not list(tmp_path.iterdir())
    lines = done.stderr.splitlines()
    assert lines[0] == "+ mkdir here" and "+ modprobe -q vhost_net" in lines
    words = lines[-1].split(" -m pyvmm ")[1].split()
    parser = argparse.ArgumentParser()
    compare.add_arguments(parser)
    args = parser.parse_args(words[1:])
    assert words[0] == "compare" and args.ladder and (args.repeat, args.host) == (2, "local")
    assert (args.json, args.svg) == ("here/ladder.json", "here/ladder.svg")


@pytest.mark.parametrize("argv", [["--host", "mars"], ["--fast"], ["a", "b"], ["."]])
def test_the_script_refuses_nonsense(argv: list[str], tmp_path: Path) -> None:
    done = subprocess.run(
        [SCRIPT, "--dry-run", *argv], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 2 and done.stderr and not list(tmp_path.iterdir())
