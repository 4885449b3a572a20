"""`make bench` itself: every kind of contestant boots, with the back-end that serves its card."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from tests.boot.guest import Host
from tests.perf import bench

pytestmark = pytest.mark.usefixtures("nothing_left")


def test_contestants_boot(host: Host, tmp_path: Path) -> None:
    names = "pyvmm", "pyvmm vhost-user", "qemu q35 vhost-user"
    out = tmp_path / "bench.json"
    options = ["--boot-only", "--rounds", "1", "--only", ",".join(names)]
    options += ["--json", str(out), "--log-dir", str(tmp_path)]
    result = host.run(sys.executable, bench.__file__, *options, timeout=300)
    assert result.status == 0 and "failed" not in result.err, result
    rounds = json.loads(out.read_text())["rounds"]
    assert {name: len(measured) for name, measured in rounds.items()} == dict.fromkeys(names, 1)
