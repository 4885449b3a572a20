"""The files for CI systems: what GitHub and GitLab demand of their form, and that their commands
exist. ``tests/install`` runs them.
"""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.commands import parsers

ROOT = Path(__file__).resolve().parents[2]
CI = ROOT / "docs" / "ci"
WORKFLOW = ROOT / "docs/examples/kernel-ci/.github/workflows/kernel.yml"
PARSERS = dict(parsers())


def load(path: Path) -> dict[str, Any]:
    found = yaml.safe_load(path.read_text())
    assert isinstance(found, dict)
    return found


def scripts() -> dict[str, str]:
    """All shell scripts in the files, by file and step."""
    found = {}
    for step in load(CI / "action.yml")["runs"]["steps"]:
        found[f"action.yml: {step['name']}"] = step["run"]
    template = load(CI / "gitlab.yml")[".pyvmm"]
    found["gitlab.yml"] = "\n".join(template["before_script"])
    for name, job in load(WORKFLOW)["jobs"].items():
        for step in job["steps"]:
            if "run" in step:
                found[f"kernel.yml: {name}: {step['name']}"] = step["run"]
    text = (CI / "Containerfile").read_text().replace("\\\n", " ")
    for number, run in enumerate(re.findall(r"(?m)^RUN (.*)$", text)):
        found[f"Containerfile: {number}"] = run
    return found


SCRIPTS = scripts()


def test_an_action_that_github_takes() -> None:
    """docs.github.com, metadata syntax: what an action of steps must have."""
    action = load(CI / "action.yml")
    assert (
        {"name", "description", "runs"}
        <= action.keys()
        <= {
            "name",
            "description",
            "inputs",
            "runs",
        }
    )
    assert action["runs"]["using"] == "composite"
    for step in action["runs"]["steps"]:
        assert {"name", "shell", "run"} <= step.keys() <= {"name", "shell", "run", "env"}
        for name in re.findall(r"\$\{\{ inputs\.(\w+) \}\}", str(step)):
            assert name in action["inputs"]
        assert "${{" not in step["run"], "an input in a script could be a command"
    for about in action["inputs"].values():
        assert about.keys() == {"description", "default"}


def test_a_template_that_gitlab_takes() -> None:
    """docs.gitlab.com, keyword reference: a hidden job, with keywords that exist."""
    (name,) = load(CI / "gitlab.yml")
    job = load(CI / "gitlab.yml")[name]
    assert name.startswith(".")
    assert job.keys() == {"image", "variables", "cache", "before_script", "artifacts"}
    assert all(isinstance(line, str) for line in job["before_script"])
    assert all(isinstance(value, str) for value in job["variables"].values())
    assert "junit" in job["artifacts"]["reports"]


@pytest.mark.parametrize("name", SCRIPTS)
def test_scripts_are_good_shell(name: str) -> None:
    done = subprocess.run(
        ["sh", "-n"], input=SCRIPTS[name], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", SCRIPTS)
def test_options_of_pyvmm_in_scripts_exist(name: str) -> None:
    for call in re.findall(r"(?<![\w/])pyvmm ([a-z][^;&|\n]*)", SCRIPTS[name].replace("\\\n", " ")):
        words = call.partition(" -- ")[0].split()
        parser = PARSERS.get(" ".join(words[:2])) or PARSERS[words[0]]
        for word in words:
            if word.startswith("--"):
                assert word.partition("=")[0] in parser._option_string_actions, call


def test_the_container_has_what_the_wheel_needs() -> None:
    """The packages that tools/setup.sh installs for a demonstration."""
    text = (ROOT / "tools/setup.sh").read_text()
    lists = re.findall(r'(?m)^PACKAGES="([^"]+)"', text)
    needed = set(lists[0].split()) - {"python3", "make"}
    assert needed <= set(SCRIPTS["Containerfile: 0"].split()), needed
