"""Disks (`--disk`): one boot looks at many things, because each boot takes seconds."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING

import pytest

from pyvmm.host import qcow2
from pyvmm.images import find
from tests.boot.guest import Run
from tests.unit.test_disk import with_backing

if TYPE_CHECKING:
    from pathlib import Path

    from tests.boot.guest import Host

pytestmark = pytest.mark.usefixtures("nothing_left")

MIB = 1 << 20
SCRIPT = r"""
awk '$4 ~ /^vd/ {print $4, $3}' /proc/partitions
cat /sys/block/vd?/ro
mke2fs /dev/vda >/dev/null && mount /dev/vda /mnt && echo kept >/mnt/file
umount /mnt && echo made
printf thrown >/dev/vdb && sync && head -c 6 /dev/vdb; tail -c 5 /dev/vdb; echo
printf no | dd of=/dev/vdc conv=notrunc; head -c 5 /dev/vdc; echo
echo ready
read_again() { echo 3 >/proc/sys/vm/drop_caches; dd if=/dev/vda of=/dev/null count=1; }
while read_again; do sleep 0.1; done 2>/dev/null
echo gone; head -c 5 /dev/vdc
"""
AS_NOBODY = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "env", "HOME=/tmp"]


def daemons(host: Host) -> dict[str, str]:
    """Process id by image of the daemons that serve one."""
    script = """
        for p in $(pidof qemu-storage-daemon); do
            echo $p $(stat -c %s /proc/$p/root/image); done; true"""
    lines = host.run("sh", "-c", script).out.splitlines()
    return {size: pid for pid, size in (line.split() for line in lines)}


def test_disks_and_a_daemon_that_dies(host: Host, open_path: Path) -> None:
    one, two, three = open_path / "a,b.raw", open_path / "two.qcow2", open_path / "three"
    one.touch()
    one.open("r+b").truncate(8 * MIB)
    base = open_path / "base"
    base.write_bytes(b"based".rjust(16 * MIB, b"\0"))
    above_base = bytearray(qcow2.empty(16 * MIB))
    with_backing(b"base", b"raw")(above_base)
    two.write_bytes(above_base)
    three.write_bytes(b"three".ljust(4 * MIB, b"\0"))
    before = two.read_bytes()
    verdict = open_path / "verdict"
    disks = (
        str(one).replace(",", ",,"),
        f"{two},snapshot=on,backing=on",
        f"{three},format=raw,ro=on",
    )
    args = [word for disk in disks for word in ("--disk", disk)]
    command = ["--json", str(verdict), "--", "sh", "-c", SCRIPT]
    with Run(host, "--net", "none", *args, *command) as run:
        run.expect("^ready$")
        found = daemons(host)
        assert len(found) == 3
        host.sh(f"kill -9 {found[str(8 * MIB)]}")
        assert run.wait() == 133, repr(run)
    lines = run.out.splitlines()
    assert lines[:6] == ["vda 8192", "vdb 16384", "vdc 4096", "0", "0", "1"]
    assert lines[6:] == ["made", "thrownbased", "three", "ready", "gone", "three"]
    assert "not permitted" in run.err or "Read-only" in run.err
    told = json.loads(verdict.read_text())
    assert told["verdict"] == "disk" and told["status"] == 0
    assert f"the disk {one} has broken off: qemu-storage-daemon was killed by SIGKILL" in run.err
    assert [d["kind"] for d in run.report["devices"]] == ["block"] * 3
    assert two.read_bytes() == before and base.read_bytes().endswith(b"\0based")
    assert three.read_bytes()[:5] == b"three"
    assert not daemons(host)

    # What the guest has written is there in the next run, of an ordinary user.
    host.sh("chmod 666 /dev/kvm")
    one.chmod(0o666)
    image = find("default")  # in the home directory of another user
    boot = [open_path / "kernel", open_path / "initrd"]
    for source, path in zip((image.bzimage, image.initrd), boot, strict=True):
        shutil.copyfile(source, path)
        path.chmod(0o644)
    script = "mount /dev/vda /mnt && cat /mnt/file && echo more >>/mnt/file"
    args = ["--kernel", str(boot[0]), "--initrd", str(boot[1]), "--net", "none"]
    args += ["--disk", disks[0], "--", "sh", "-c", script]
    with Run(host, *args, wrapper=AS_NOBODY, report=False) as run:
        assert run.wait() == 0, repr(run)
    assert run.out == "kept\n"
    assert not daemons(host)
