"""The Python fuzz targets on the inputs of tests/fuzz/corpus, without a fuzzer: what was found once
is looked at again, and no target is rotten when somebody runs make fuzz.
"""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.fuzz.engine import environment
from tests.fuzz.registry import HERE, TARGETS, C, Python

#: Bytes of all inputs in the repository.
CORPUS_MAX = 300 << 10
#: Inputs of a target that are run here: every so many-th.
INPUTS = 25


@pytest.mark.parametrize("name", [t.name for t, how in TARGETS.items() if isinstance(how, Python)])
def test_inputs_of_the_corpus(name: str, tmp_path: Path) -> None:
    with zipfile.ZipFile(HERE / f"corpus/{name}.zip") as archive:
        names = archive.namelist()
        files = [archive.extract(n, tmp_path) for n in names[:: max(1, len(names) // INPUTS)]]
    assert len(files) >= 5
    command = [sys.executable, "-P", "-m", "tests.fuzz.guided", name, "--once", *files]
    with environment() as env:
        run = subprocess.run(
            command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=600
        )
    assert run.returncode == 0, run.stdout + run.stderr


def test_the_corpus_is_small_and_has_every_target() -> None:
    files = {file.stem: file.stat().st_size for file in (HERE / "corpus").iterdir()}
    assert sum(files.values()) <= CORPUS_MAX
    guided = {t.name for t, how in TARGETS.items() if isinstance(how, Python) or how.guided}
    assert set(files) == guided
    assert all((HERE / how.source).exists() for how in TARGETS.values() if isinstance(how, C))
