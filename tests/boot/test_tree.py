"""A tree that boots as on a machine (`--root TREE --init systemd`): one boot looks at many things.

With PYVMM_SHARE=all, as `make soak-share` sets it, a whole Debian boots, too.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from pyvmm.host.paths import cache_root
from pyvmm.testbed.assets import busybox
from tests.boot.guest import PATIENCE, PYVMM, Run
from tests.boot.test_share import processes
from tests.tree import fetch

if TYPE_CHECKING:
    from pyvmm.testbed.testbed import Result
    from tests.boot.guest import Host

pytestmark = pytest.mark.usefixtures("nothing_left")

ALL = os.environ.get("PYVMM_SHARE") == "all"
#: A Linux that boots systemd under emulation, on a busy machine.
BOOT_S = 10 * PATIENCE
SCRIPT = r"""
systemctl is-system-running --wait
cat /proc/1/comm
pwd; id -u; cat
systemctl show --property=ActiveState,SubState "$1"
systemctl list-units --failed --plain --no-legend
systemctl is-enabled serial-getty@ttyS0.service
systemctl cat no-such.service
echo begun >/out/begun
until test -e /out/go; do sleep 0.2; done
cat /out/go
exit 3
"""


def boot(host: Host, tree: Path, out: Path, unit: str, *more: str) -> Run:
    """Boots a tree, and a command in another session meanwhile; the ended run."""
    args = ["--net", "none", "--memory", "512M", "--root", str(tree), "--init", "systemd", "-v"]
    args += ["--share", f"{out}:/out:rw", "--name", "tree0", *more]
    with Run(host, *args, "--", "sh", "-c", SCRIPT, "script", unit) as run:
        run.type("input\n")
        assert run.process.stdin
        run.process.stdin.close()
        run.wait_for(out / "begun", BOOT_S)
        told = host.run(
            *(*PYVMM, "exec", "--host", "local", "tree0", "--"),
            *("sh", "-c", "cat /proc/self/cgroup >/out/go.new; exit 4"),
        )
        assert told.status == 4, told
        host.sh(f"mv {out}/go.new {out}/go")  # now: the machine ends soon
        run.wait(BOOT_S)
        return run


def test_systemd_runs_the_command_as_a_unit(host: Host, tmp_path: Path) -> None:
    run = boot(host, fetch(), tmp_path, "mine.service")
    assert run.status == 3, run.out + run.err
    assert run.out.splitlines() == [
        "running",
        "systemd",
        "/root",
        "0",
        "input",
        "ActiveState=active",
        "SubState=exited",
        "masked-runtime",
        "0::/system.slice/pyvmm-command.service",
    ]
    assert "No files found for no-such.service" in run.err
    # The console, where systemd says what it does.
    assert "Command of pyvmm run" in run.err and "Stopped target" in run.err
    assert (tmp_path / "stopped").read_text() == "stopped\n", "systemd has not stopped the services"
    phases = run.report["phases_s"]
    assert phases["shares"] < phases["command"] < phases["command_end"] < phases["poweroff"]


@pytest.mark.skipif(not ALL, reason="takes minutes: make soak-share")
def test_a_whole_debian(host: Host, tmp_path: Path) -> None:
    """As debootstrap makes it, with all of systemd's own services, and D-Bus."""
    tree = Path(cache_root()) / "tree" / "bookworm"
    if not tree.is_dir():
        assert shutil.which("debootstrap") and not os.geteuid(), "as root: tools/setup.sh --trees"
        fresh = tree.with_name(f"bookworm.{os.getpid()}")
        options = ["--variant=minbase", "--include=systemd,dbus"]
        try:
            subprocess.run(
                ["debootstrap", *options, "bookworm", fresh], check=True, stdout=subprocess.DEVNULL
            )
            try:
                fresh.rename(tree)
            except OSError:  # another process was faster
                assert tree.is_dir()
        finally:
            shutil.rmtree(fresh, ignore_errors=True)
    run = boot(host, tree, tmp_path, "dbus.socket")
    assert run.status == 3, run.out + run.err
    assert run.out.splitlines()[:5] == ["running", "systemd", "/root", "0", "input"], run.out
    assert "ActiveState=active" in run.out


def test_a_command_beside_another_init(host: Host, tmp_path: Path) -> None:
    """It has the same environment as elsewhere. The death of the tree's virtiofsd ends the run."""
    for name in ("dev", "proc", "sys", "run", "sbin", "bin", "var", "var/tmp", "usr", "usr/lib"):
        (tmp_path / name).mkdir()
    for name, target in (("tmp", "/var/tmp"), ("lib", "/usr/lib")):  # in the tree, wherever it is
        (tmp_path / name).symlink_to(target)
    shutil.copy(busybox(), tmp_path / "bin/busybox")
    for name in ("sh", "sleep", "env"):
        (tmp_path / "bin" / name).symlink_to("busybox")
    (tmp_path / "sbin/init").write_text("#!/bin/sh\nexec sleep 100000\n")
    (tmp_path / "sbin/init").chmod(0o755)
    args = ["--net", "none", "--root", str(tmp_path), "--init", "/sbin/init", "--name", "tree1"]
    told: list[Result] = []
    with Run(host, *args) as run:

        def answered() -> bool:
            look = ["sh", "-c", "env; /bin/busybox grep -E ' /(var/tmp|usr/lib/.*)' /proc/mounts"]
            told.append(host.run(*PYVMM, "exec", "--host", "local", "tree1", "--", *look))
            return told[-1].status == 0 or run.status is not None

        host.wait_until(answered, lambda: f"{told[-1]!r}\n{run!r}", PATIENCE)
        assert told[-1].status == 0, f"{told[-1]!r}\n{run!r}"
        host.sh(f"kill -9 {processes(host, tmp_path)}")
        assert run.wait() == 131, repr(run)
    assert f"the share of {tmp_path} has broken off: virtiofsd was killed by SIGKILL" in run.err
    assert run.report["outcome"]["kind"] == "share"
    lines = told[-1].out.splitlines()
    variables = dict(line.split("=", 1) for line in lines if line[:1].isupper())
    places = [line.split()[1] for line in lines if line[0].islower()]
    assert "/var/tmp" in places and any(p.startswith("/usr/lib/modules/") for p in places), lines
    assert variables["PATH"] == "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
    assert (variables["HOME"], variables["USER"]) == ("/root", "root")
    assert variables["LC_CTYPE"] == "C.UTF-8" and "LANG" not in variables


def test_an_init_that_cannot_be_run(host: Host, tmp_path: Path) -> None:
    """The guest finds out: the program is there, but it is for nobody's kernel."""
    for name in ("dev", "proc", "sys", "tmp", "run", "sbin"):
        (tmp_path / name).mkdir()
    (tmp_path / "sbin/init").write_text("no program\n")
    (tmp_path / "sbin/init").chmod(0o755)
    args = ["--net", "none", "--root", str(tmp_path), "--init", "/sbin/init", "--qmp", "none", "-v"]
    with Run(host, *args) as run:
        assert run.wait() == 126, run.out + run.err
    assert "pyvmm-init: cannot run '/sbin/init': Exec format error" in run.out
