"""Directories of the host in the guest (`--share`): one boot looks at many things, because each
boot takes seconds.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
from typing import TYPE_CHECKING

import pytest

from pyvmm.images import find
from tests.boot.guest import Run

if TYPE_CHECKING:
    from pathlib import Path

    from tests.boot.guest import Host

pytestmark = pytest.mark.usefixtures("nothing_left")

SIZE = (1 << 20) + 1
#: The shell that waits ends by itself once virtiofsd has gone. What it prints is what the test
#: looks at.
SCRIPT = r"""
pwd
cat given | sha256sum
cat "$(printf 'odd\n\377\1 *')"
cat leak; cat /cases/leak
cat given >taken; printf x >"$(printf 'made\n\376')"
echo no >/cases/new; mkdir /again; mount -t virtiofs pyvmm0 /again && echo no >/again/new
mount -o bind /again /cases && echo no >/cases/case; rm /again/case; cat /again/case
chmod 4755 taken; stat -c %a taken; sync
echo >ready
while cat given; do sleep 0.1; done >/dev/null
echo late >late
ls /again
"""


def processes(host: Host, directory: Path) -> str:
    """The ids of the processes that serve a directory, which is their root."""
    script = """
        for p in $(pidof virtiofsd); do [ /proc/$p/root/. -ef "$0" ] && echo $p; done; true"""
    return " ".join(host.run("sh", "-c", script, str(directory)).out.split())


def test_files_in_and_out_and_a_virtiofsd_that_dies(host: Host, tmp_path: Path) -> None:
    outside = tmp_path / "secret"
    outside.write_text("secret")
    cases, work, here = tmp_path / "cases", tmp_path / "a,b\\c", tmp_path / "a,b\\c" / "here"
    here.mkdir(parents=True)
    cases.mkdir()
    (cases / "case").write_text("case\n")
    data = random.Random(1).randbytes(SIZE)
    (here / "given").write_bytes(data)
    (here / os.fsdecode(b"odd\n\xff\1 *")).write_text("odd name\n")
    for directory in (cases, here):
        (directory / "leak").symlink_to(outside)
    enter = ["sh", "-c", 'cd "$0" && exec "$@"', str(here)]
    verdict = tmp_path / "verdict"
    args = ["--net", "none", "--share", f"{cases}:/cases", "--share", f"{work}:rw"]
    with Run(host, *args, "--json", str(verdict), "--", "sh", "-c", SCRIPT, wrapper=enter) as run:
        host.wait_until((here / "ready").exists, lambda: run.out + run.err, 120)
        assert processes(host, cases)
        host.sh(f"kill -9 {processes(host, work)}")
        assert run.wait() == 131, run.out + run.err

    lines = run.out.splitlines()
    digest = hashlib.sha256(data).hexdigest()
    assert lines == [str(here), f"{digest}  -", "odd name", "case", "4755", "case", "leak"]
    assert (here / "taken").read_bytes() == data
    assert (here / "taken").stat().st_mode & 0o7777 == 0o4755
    assert (here / os.fsdecode(b"made\n\xfe")).read_text() == "x"
    assert sorted(p.name for p in cases.iterdir()) == ["case", "leak"]
    assert (cases / "case").read_text() == "case\n" and not (here / "late").exists()

    assert "secret" not in run.out + run.err
    assert "Read-only file system" in run.err and "nput/output error" in run.err
    told = json.loads(verdict.read_text())
    assert told["verdict"] == "share" and told["status"] == 0
    assert f"the share of {work} has broken off: virtiofsd was killed by SIGKILL" in run.err
    devices = run.report["devices"]
    assert [d["kind"] for d in devices] == ["fs", "fs"]
    assert not processes(host, cases)


ROOT_SCRIPT = r"""
pwd; id -un; echo $HOME $USER
python3 -c 'import os; print(os.uname().release, os.getgroups())'
cat /etc/shadow >/dev/null && echo read
echo new >/var/tmp/$1 && cat /var/tmp/$1
mount | grep -c "^overlay on / "
test -d /lib/modules/$(uname -r) && echo modules
cat >&2
exit 7
"""


def test_the_host_s_root_for_one_of_its_users(host: Host, tmp_path: Path) -> None:
    name = tmp_path.name
    command = ["bash", "-c", ROOT_SCRIPT, "script", name]
    args = ["--net", "none", "--root", "/", "--user", "nobody", "--", *command]
    with Run(host, *args, wrapper=["sh", "-c", 'cd /usr/share && exec "$@"', "sh"]) as run:
        run.type("input\n")
        assert run.process.stdin
        run.process.stdin.close()
        assert run.wait() == 7, run.out + run.err
    release = find("default").version
    assert run.out.splitlines() == [
        "/usr/share",
        "nobody",
        "/nonexistent nobody",
        f"{release} [65534]",
        "new",
        "1",
        "modules",
    ]
    assert "Permission denied" in run.err and "input" in run.err
    assert host.run("test", "-e", f"/var/tmp/{name}").status == 1
