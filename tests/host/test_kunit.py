"""The kernel's own kunit.py calls pyvmm in QEMU's place and reads the results (docs/kunit.md).

It comes from the source tree of a kernel that PYVMM_KERNEL_TREE names
(`make check-kunit TREE=DIR`). The kernel that it boots is the guest `talk`, which says what a
kernel with KUnit tests says.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable

TREE = os.environ.get("PYVMM_KERNEL_TREE", "")
pytestmark = pytest.mark.skipif(not TREE, reason="needs a kernel's source: make check-kunit")

ROOT = Path(__file__).parents[2]
SECONDS = 600
SAYS = """\
KTAP version 1
1..2
    # Subtest: alpha
    1..2
    ok 1 - one
    ok 2 - two
ok 1 - alpha
    # Subtest: beta
    1..1
    not ok 1 - three
not ok 2 - beta
"""


def test_kunit_boots_by_pyvmm(guest: Callable[[str], str], tmp_path: Path) -> None:
    build, says, log = tmp_path / "build", tmp_path / "says", tmp_path / "log"
    kernel = build / "arch/x86/boot/bzImage"
    kernel.parent.mkdir(parents=True)
    shutil.copy(guest("talk"), kernel)
    says.write_text(SAYS)
    env = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1", "PYTHONPATH": str(ROOT)}
    env["PATH"] = f"{Path(sys.executable).parent}:{env['PATH']}"
    options = [
        f"--build_dir={build}",
        f"--qemu_config={ROOT}/docs/examples/kunit/pyvmm.py",
        f"--qemu_args=-initrd {says} --host=local --log={log}",
    ]
    run = subprocess.run(
        [sys.executable, "tools/testing/kunit/kunit.py", "exec", *options],
        cwd=TREE,
        env=env,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    told = run.stdout + run.stderr
    assert "qemu-system-pyvmm -nodefaults" in told, told
    assert "[PASSED] one" in told and "[FAILED] three" in told, told
    assert "passed: 2, failed: 1" in told and run.returncode != 0, told
    assert "ok 2 - two" in log.read_text(), "the option for pyvmm has not arrived"
