"""The doctor's findings and verdict, on machines invented for the tests and on this one."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pyvmm import doctor
from pyvmm.host import bochs
from pyvmm.hostnet import userns
from pyvmm.testbed import assets
from pyvmm.testbed.testbed import Testbed

ROOT = Path(__file__).resolve().parents[2]


class Machine:
    """An invented machine, with all that the doctor looks at."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.kvm = True
        self.allowed = True
        self.modules: tuple[str, ...] = ()
        self.lacks = ""
        exists, access, isdir = os.path.exists, os.access, os.path.isdir
        monkeypatch.setattr(os.path, "exists", lambda p: self.kvm if p == "/dev/kvm" else exists(p))
        monkeypatch.setattr(
            os, "access", lambda p, m: self.allowed if p == "/dev/kvm" else access(p, m)
        )

        def has(path: str) -> bool:
            return (
                path.split("/")[-1] in self.modules
                if path.startswith("/sys/module/kvm")
                else isdir(path)
            )

        monkeypatch.setattr(os.path, "isdir", has)
        monkeypatch.setattr(Testbed, "missing", staticmethod(lambda: self.lacks))


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    return Machine(monkeypatch)


@pytest.mark.parametrize("module", ["kvm_intel", "kvm_amd"])
def test_hardware_kvm_runs_linux(machine: Machine, module: str) -> None:
    machine.modules = ("kvm", module)
    assert doctor.can_run_linux_locally() == (True, "")
    assert doctor.verdict()[0] == 0


def test_unknown_kvm_is_trusted(machine: Machine) -> None:
    assert doctor.can_run_linux_locally() == (True, "")


@pytest.mark.parametrize(
    ("kvm", "allowed", "modules", "words"),
    [
        (False, False, (), "no /dev/kvm"),
        (True, False, ("kvm", "kvm_amd"), "permission"),
        (True, True, ("kvm", "kvm_pvm"), "kvm_pvm"),
    ],
)
def test_without_it_the_testbed_decides(
    machine: Machine, kvm: bool, allowed: bool, modules: tuple[str, ...], words: str
) -> None:
    machine.kvm, machine.allowed, machine.modules = kvm, allowed, modules
    good, why = doctor.can_run_linux_locally()
    assert not good
    assert words in why
    assert doctor.verdict()[0] == 3
    machine.lacks = "virtiofsd is missing"
    status, text = doctor.verdict()
    assert status == 1
    assert "testbed setup" in text


def test_every_lack_has_a_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setattr(assets, "missing", lambda: [("virtiofsd", "install it")])
    findings = doctor.examine()
    assert {f.state for f in findings} <= {"ok", "missing", "note"}
    for f in findings:
        assert f.detail
        assert f.state != "missing" or f.remedy, f.name


def test_both_testbeds_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also if the one with an AMD processor is not set up."""
    monkeypatch.setattr(assets, "missing", lambda: [("virtiofsd", "install it")])
    monkeypatch.setattr(bochs, "find", lambda: bochs.Bochs("/somewhere/3.0"))
    details = [f.detail for f in doctor._testbed()]
    assert details[0] == "virtiofsd is missing"
    assert details[1].startswith("set up with --cpu intel: Bochs 3.0; ")


def test_a_missing_image_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As it is after `pip install`; a system without Debian's packages has its own kernel."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    finding = doctor._image()
    assert (finding.name, finding.state) == ("guest image", "missing")
    assert finding.remedy.endswith("pyvmm image build")
    monkeypatch.setattr(doctor, "which", lambda name, more="": None)
    assert "image build --from-host" in doctor._image().remedy


def test_lacking_extensions_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from pyvmm import kvm

    class Old:
        def __enter__(self) -> Old:
            return self

        def __exit__(self, *args: object) -> None:
            pass

        def fileno(self) -> int:
            return -1

        def extension(self, name: str) -> int:
            return 0 if name in ("KVM_CAP_IRQFD", "KVM_CAP_BINARY_STATS_FD") else 9

    monkeypatch.setattr(kvm, "Kvm", Old)
    monkeypatch.setattr(kvm, "ioctl", lambda fd, name, arg=0: 12)
    text = "\n".join(f"{f.name} {f.state} {f.detail}" for f in doctor._kvm())
    assert "kvm extensions missing lacks KVM_CAP_IRQFD" in text
    assert "kvm extensions note no KVM_CAP_BINARY_STATS_FD" in text


@pytest.mark.parametrize("restricted", [False, True])
def test_forbidden_namespaces_are_told_with_the_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, restricted: bool
) -> None:
    """AppArmor on Ubuntu: a user namespace can be made, but its maps cannot be written."""
    remedies = {False: "kernel.unprivileged_userns_clone=1", True: f"{userns.RESTRICTED}=0"}

    def become_root() -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(userns, "become_root", become_root)
    monkeypatch.setattr(userns, "_filtered", lambda: False)
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    switch = tmp_path / "restricted"
    switch.write_text("1\n" if restricted else "0\n")
    real = open
    monkeypatch.setattr(
        "builtins.open",
        lambda name, *args: real(
            switch if str(name).endswith(userns.RESTRICTED.replace(".", "/")) else name, *args
        ),
    )
    user, net = doctor._namespaces()
    assert (user.state, net.state) == (doctor.NOTE, doctor.MISSING)
    for finding in (user, net):
        assert "Permission denied" in finding.detail
        assert remedies[restricted] in finding.remedy
        assert remedies[not restricted] not in finding.remedy
    assert "tap=NAME" in net.remedy


def run(*argv: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "pyvmm", "doctor", *argv],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
    )


def test_command_on_this_machine() -> None:
    plain, as_json = run(), run("--json")
    assert plain.returncode == as_json.returncode == doctor.verdict()[0]
    assert plain.stderr == as_json.stderr == ""
    report = json.loads(as_json.stdout)
    assert report["where"] == {0: "local", 3: "testbed", 1: None}[plain.returncode]
    assert plain.stdout.endswith(report["verdict"] + "\n")
    assert len(plain.stdout.splitlines()) == len(report["findings"]) + 1


def test_asking_where_to_run_is_light() -> None:
    """Every ``pyvmm run`` asks this, so it must import nothing slow."""
    code = (
        "from pyvmm.doctor import can_run_linux_locally as f; f(); import sys; print(*sys.modules)"
    )
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT
    ).stdout
    assert "pyvmm.doctor" in out
    heavy = {"subprocess", "pathlib", "json", "re", "ctypes", "socket", "pyvmm._ext"}
    before = subprocess.run(
        [sys.executable, "-c", "import sys; print(*sys.modules)"], capture_output=True, text=True
    )
    assert not (set(out.split()) - set(before.stdout.split())) & heavy
