"""What a start costs: the modules that a bare guest needs, and no others."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from pyvmm.errors import ShareError
from pyvmm.host import virtiofsd
from tools import boot_trace

ROOT = Path(__file__).resolve().parents[2]
#: Each module takes about 0.2 ms natively, and twenty times as long in the testbed: to be loaded,
#: and to be freed again. Whoever adds one says by this list that a bare guest cannot do without it.
MODULES = """
    assembly boot boot.acpi boot.aml boot.elf boot.image boot.mptable boot.params bus cli cli.run
    cli.support cli.support.hostchoice cli.support.lastwords cli.support.options cli.support.outputs
    cli.support.plain cli.support.settings cli.support.signals cli.support.swallowed
    cli.support.terminal control control.registry devices devices.console devices.guest_port
    devices.hotplug devices.legacy devices.rtc errors exits exits.accounts exits.snapshot fd helper
    host host.limits host.paths hostnet hostnet.rights hostnet.sockets kvm kvm.ahead kvm.cpuid
    kvm.stats kvm.vcpu kvm.vm machine macs memory outcome panics pci plugs programs sandbox spec
    spec.acpi spec.linux_boot spec.pci spec.platform threads vcpus _ext
"""
#: Of the standard library, these take longest, and others that they need.
SLOW = {"argparse", "array", "dataclasses", "enum", "gettext", "importlib", "inspect"}
SLOW |= {"json", "pathlib", "re", "selectors", "signal", "socket", "subprocess", "tempfile"}
SLOW |= {"typing", "warnings", "weakref"}
#: The script `pyvmm`: ``python -m`` would load modules of its own.
COMMAND = "from pyvmm.cli import main; main()"


def test_a_bare_guest_loads_what_it_needs(guest: Callable[[str], str]) -> None:
    argv = [sys.executable, "-X", "importtime", "-c", COMMAND]
    argv += ["run", "--host", "local", "--net", "none", "--memory", "16M"]
    argv += ["--kernel", guest("hello"), "--append", "status=7"]
    done = subprocess.run(argv, cwd=ROOT, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    assert done.returncode == 7 and "hello, stdout" in done.stdout, done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("import time:")]
    modules = {line.rpartition("|")[2].strip() for line in lines}
    ours = {module for module in modules if module.startswith("pyvmm.")}
    assert ours <= {f"pyvmm.{module}" for module in MODULES.split()}
    # What Python itself loads at its start, such as a hook of the distribution's, is not ours.
    bare = subprocess.run(
        [sys.executable, "-X", "importtime", "-c", "pass"], capture_output=True, text=True
    )
    assert not {module for module in modules & SLOW if f" {module}\n" not in bare.stderr}


def test_the_boot_trace_leaves_no_time_out(guest: Callable[[str], str], tmp_path: Path) -> None:
    """The stages of tools/boot_trace.py add up to the whole, from exec to exit, and each hook has
    found its function.
    """
    file = tmp_path / "boot.json"
    argv = [sys.executable, str(ROOT / "tools/boot_trace.py"), "--repeat", "1", "--json", str(file)]
    argv += ["--", "--net", "none", "--memory", "16M", "--kernel", guest("hello")]
    done = subprocess.run(argv, cwd=ROOT, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    assert not done.returncode, done.stderr
    (boot,) = json.loads(file.read_text())["boots"]
    whole = boot.pop("all")
    for part in (0, 1):
        assert abs(sum(times[part] for times in boot.values()) - whole[part]) < 0.01, boot
    for stage in boot_trace.STAGES:
        assert boot[stage][0] > 0, stage
    assert "\nall " in done.stdout


def test_a_root_loads_nothing_slow_beside(guest: Callable[[str], str]) -> None:
    """The back-end of a root, a share or a disk is started without these modules, too."""
    if os.geteuid():
        pytest.skip("needs root, or user namespaces")
    try:
        virtiofsd.find()
    except ShareError as e:
        pytest.skip(str(e))
    argv = [sys.executable, "-X", "importtime", "-m", "pyvmm", "run", "--host", "local"]
    argv += ["--net", "none", "--memory", "32M", "--kernel", guest("hello"), "--root", "/"]
    done = subprocess.run(argv, cwd=ROOT, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    assert "hello, stdout" in done.stdout, done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("import time:")]
    modules = {line.rpartition("|")[2].strip() for line in lines}
    assert "pyvmm.host.virtiofsd" in modules
    slow = {"selectors", "shutil", "socket", "subprocess", "tempfile"}
    bare = subprocess.run(
        [sys.executable, "-X", "importtime", "-c", "pass"], capture_output=True, text=True
    )
    assert not {module for module in modules & slow if f" {module}\n" not in bare.stderr}
