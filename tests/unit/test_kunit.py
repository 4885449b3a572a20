"""The drop-in for kunit.py (docs/kunit.md): it is loaded and called as kunit.py does."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import pytest

EXAMPLE = Path(__file__).parents[2] / "docs" / "examples" / "kunit"
PROGRAM = EXAMPLE / "qemu-system-pyvmm"


class QemuArchParams(NamedTuple):
    """As tools/testing/kunit/qemu_config.py has it."""

    linux_arch: str
    kconfig: str
    qemu_arch: str
    kernel_path: str
    kernel_command_line: str
    extra_qemu_params: list[str]
    serial: str = "stdio"


@pytest.fixture
def config(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The drop-in, loaded by the name that kunit.py gives it, whatever its place."""
    theirs = ModuleType("qemu_config")
    theirs.QemuArchParams = QemuArchParams  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "qemu_config", theirs)
    monkeypatch.setenv("PATH", os.environ["PATH"])
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    spec = importlib.util.spec_from_file_location(".qemu_configs/pyvmm.py", EXAMPLE / "pyvmm.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.QEMU_ARCH


def called(config: Any, tmp_path: Path, *more: str) -> list[str]:
    """What pyvmm is called with if kunit.py calls QEMU with ``more`` beside its own options."""
    pyvmm = tmp_path / "pyvmm"
    pyvmm.write_text("#!/bin/sh\nprintf '%s\\n' \"$@\"\n")
    pyvmm.chmod(0o755)
    words = [
        f"qemu-system-{config.qemu_arch}",
        *("-nodefaults", "-m", "1024", "-kernel", f".kunit/{config.kernel_path}"),
        *("-append", f"kunit.filter_glob=list* {config.kernel_command_line}", "-no-reboot"),
        *("-nographic", "-accel", "kvm", "-accel", "hvf", "-accel", "tcg"),
        *("-serial", config.serial, *config.extra_qemu_params, *more),
    ]
    env = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run(
        words, env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
    )
    assert not done.stderr and done.returncode == 0, done
    return done.stdout.splitlines()


OWN = [
    *("run", "--net", "none", "--memory", "1024M"),
    *("--kernel", ".kunit/arch/x86/boot/bzImage"),
]
LINE = "--append=kunit.filter_glob=list* console=ttyS0 kunit_shutdown=poweroff"


def test_what_kunit_calls(config: Any, tmp_path: Path) -> None:
    # ACPI's tables, by which the kernel powers off, need PCI.
    for name in ("SERIAL_8250_CONSOLE", "ACPI", "PCI"):
        assert f"CONFIG_{name}=y" in config.kconfig.splitlines()
    assert called(config, tmp_path) == [*OWN, LINE]
    more = called(config, tmp_path, "-smp", "2", "--hang-timeout=20", "-m", "2G")
    assert more == [*OWN, "--cpus", "2", "--hang-timeout=20", "--memory", "2G", LINE]


def test_old_kernels_power_off_as_well(config: Any, tmp_path: Path) -> None:
    """Their kunit.py appends a word of its own, and the kernel takes the last."""
    old = config._replace(kernel_command_line=f"{config.kernel_command_line} kunit_shutdown=reboot")
    assert called(old, tmp_path)[-1].endswith(" kunit_shutdown=reboot kunit_shutdown=poweroff")


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["-cpu", "max"], "-cpu: not known here; give options of pyvmm run as --OPTION=VALUE"),
        (["-m"], "-m without a value"),
        (["-serial", "file:x"], "use -serial stdio"),
        (["-m", "64"], "cannot run pyvmm: No such file or directory; put"),
    ],
)
def test_what_is_refused(words: list[str], problem: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, PROGRAM, *words],
        env={"PATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2 and problem in done.stderr and done.stderr.count("\n") == 1
