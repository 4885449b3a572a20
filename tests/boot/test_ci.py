"""What a kernel developer's CI does, with Linux: the example project of the documentation, and the
matrix.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.boot.guest import Host

pytestmark = pytest.mark.usefixtures("nothing_left")
ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "docs" / "examples" / "kernel-ci"


def test_example_project(host: Host, tmp_path: Path) -> None:
    """As its user calls it, but for the place: `pyvmm_host = auto` starts a testbed where none is
    up.
    """
    junit = tmp_path / "junit.xml"
    env = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")} | {
        "PYVMM_TESTBED": host.testbed.name
    }
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-p",
        "no:cacheprovider",
        "--pyvmm-host",
        "testbed",
        f"--junitxml={junit}",
    ]
    done = subprocess.run(
        command, cwd=EXAMPLE, env=env, capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    cases = ET.parse(junit).getroot().findall("testsuite/testcase")
    names = {c.get("name") for c in cases}
    assert {"test_packets_cost_no_exits", "test_panic_is_told", "test_ping[8000]"} <= names and len(
        cases
    ) == 12
    assert "the tests run in the testbed" in done.stderr


def test_matrix(host: Host, tmp_path: Path) -> None:
    """Two data paths; the second is added by another run, which takes the first as it is. The
    processes are confined, and tools, back-end and kernel thread do what they do without.
    """
    out = tmp_path / "matrix.json"
    args = [
        "--features",
        "no-mrg-rxbuf",
        "--seconds",
        "1",
        "--json",
        str(out),
        "--junit",
        str(tmp_path / "m.xml"),
    ]
    pyvmm = [sys.executable, "-m", "pyvmm", "matrix", "--host", "local", "--sandbox", "on"]
    done = host.run(*pyvmm, "--modes", "vhost-net", *args, "--", "uname", "-r", timeout=400)
    assert done.status == 0, done
    done = host.run(
        *pyvmm,
        "--modes",
        "vhost-net,vhost-user",
        *args,
        "--resume",
        "--",
        "uname",
        "-r",
        timeout=400,
    )
    assert done.status == 0, done
    assert done.err.count("pyvmm: [") == 1 and "[2/2] default/vhost-user/1/no-mrg-rxbuf" in done.err
    found = json.loads(out.read_text())["cells"]
    assert [c["mode"] for c in found] == ["vhost-net", "vhost-user"]
    for cell in found:
        assert (cell["verdict"], cell["sandbox"]) == ("passed", "on")
        assert "VERSION_1" in cell["negotiated"] and "MRG_RXBUF" not in cell["negotiated"]
        assert cell["to_guest_mbit"] > 0 and cell["from_guest_mbit"] > 0
        assert cell["command"]["stdout"].startswith("6.")
        assert cell["user_exits"] > 0


#: Runs the demo, and looks at its process once the guest has come up, before the tools have run.
DEMO = """
"$@" >"$0/said" 2>&1 &
until grep -q "feature negotiation" "$0/said" || ! kill -0 $!; do sleep 0.2; done
cat /proc/$!/status; wait $!; status=$?; cat "$0/said"; exit $status
"""


def test_demo(host: Host, tmp_path: Path) -> None:
    """Confined, with the tools of the host's side in its card's namespace."""
    pyvmm = [sys.executable, "-m", "pyvmm", "demo", "--host", "local", "--sandbox", "on"]
    done = host.run("sh", "-c", DEMO, str(tmp_path), *pyvmm, timeout=400)
    assert done.status == 0, done
    assert "Seccomp:\t2\n" in done.out and "NoNewPrivs:\t1\n" in done.out, done.out
    assert "          sandbox: on\n" in done.out
    assert done.out.count(", 0% packet loss") == 2, done.out
    assert done.out.count("Mbits/sec") == 4 and "closed: tap, network namespace" in done.out
