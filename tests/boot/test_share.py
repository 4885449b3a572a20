"""Directories of the host in the guest (`--share`): one boot looks at many things, because each
boot takes seconds.

With PYVMM_SHARE=all, as `make soak-share` sets it, the Rust virtiofsd serves the same directories,
and another one has 100,000 files.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from pyvmm.host import virtiofsd
from pyvmm.host.apt import Apt
from pyvmm.host.paths import cache_root
from pyvmm.images import find
from tests.boot.guest import PATIENCE, Run

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.boot.guest import Host

pytestmark = pytest.mark.usefixtures("nothing_left")

ALL = os.environ.get("PYVMM_SHARE") == "all"
SIZE = (1 << 20) + 1
SPARSE = 10 << 30
MANY = 100_000
LONG = 5 * PATIENCE
#: Names with each byte that a name can have, and one of the greatest length.
NAMES = [*(bytes([b]) + b"x" for b in range(1, 256) if b != ord("/")), b"\xff" * 255]
#: The shell that waits ends by itself once virtiofsd has gone. What it prints is what the test
#: looks at.
SCRIPT = r"""
pwd
cat given | sha256sum
cat "$(printf 'odd\n\377\1 *')"
cat leak; cat /cases/leak; ls outside/; cat ../../secret
cp -r names copies
stat -c %s sparse; dd if=sparse bs=1M skip=10239 2>/dev/null | tail -c 4; echo
printf END. | dd of=sparse bs=4 seek=2684354559 conv=notrunc 2>/dev/null
exec 3<changing; ls directory
echo >ask; until test -e changed; do sleep 0.1; done
cat <&3; until grep new changing; do sleep 0.1; done
until test -L directory; do sleep 0.1; done; ls directory/
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
        for p in /proc/[0-9]*; do [ $p/root/. -ef "$0" ] && echo ${p#/proc/}; done; true"""
    return " ".join(host.run("sh", "-c", script, str(directory)).out.split())


def test_files_in_and_out_and_a_virtiofsd_that_dies(host: Host, tmp_path: Path) -> None:
    outside = tmp_path / "secret"
    outside.write_text("hidden words")
    cases, work, here = tmp_path / "cases", tmp_path / "a,b\\c", tmp_path / "a,b\\c" / "here"
    here.mkdir(parents=True)
    cases.mkdir()
    (cases / "case").write_text("case\n")
    data = random.Random(1).randbytes(SIZE)
    (here / "given").write_bytes(data)
    (here / os.fsdecode(b"odd\n\xff\1 *")).write_text("odd name\n")
    for directory in (cases, here):
        (directory / "leak").symlink_to(outside)
    (here / "outside").symlink_to("../..")
    (here / "names").mkdir()
    for name in NAMES:
        (here / "names" / os.fsdecode(name)).touch()
    with (here / "sparse").open("wb") as f:
        f.seek(SPARSE - 4)
        f.write(b"end.")
    (here / "changing").write_text("old\n")
    (here / "directory").mkdir()
    (here / "directory/inside").touch()
    change = """
        cd "$0"; echo new >other; mv other changing
        mv directory gone; ln -s ../.. directory; echo >changed"""
    enter = ["sh", "-c", 'cd "$0" && exec "$@"', str(here)]
    verdict = tmp_path / "verdict"
    args = ["--net", "none", "--share", f"{cases}:/cases", "--share", f"{work}:rw"]
    with Run(host, *args, "--json", str(verdict), "--", "sh", "-c", SCRIPT, wrapper=enter) as run:
        run.wait_for(here / "ask", LONG)
        assert host.run("sh", "-ec", change, str(here)).status == 0
        run.wait_for(here / "ready", LONG)
        assert processes(host, cases)
        host.sh(f"kill -9 {processes(host, work)}")
        assert run.wait(LONG) == 131, run.out + run.err

    lines = run.out.splitlines()
    digest = hashlib.sha256(data).hexdigest()
    assert lines == [
        *(str(here), f"{digest}  -", "odd name"),
        work.name,  # all that the guest's own tree has above the share
        *(str(SPARSE), "end.", "inside", "old", "new", work.name),
        *("case", "4755", "case", "leak"),
    ]
    assert {os.fsencode(path.name) for path in (here / "copies").iterdir()} == set(NAMES)
    with (here / "sparse").open("rb") as f:
        assert f.seek(-4, os.SEEK_END) == SPARSE - 4 and f.read() == b"END."
    assert (here / "sparse").stat().st_blocks * 512 < 1 << 20
    assert (here / "taken").read_bytes() == data
    assert (here / "taken").stat().st_mode & 0o7777 == 0o4755
    assert (here / os.fsdecode(b"made\n\xfe")).read_text() == "x"
    assert sorted(p.name for p in cases.iterdir()) == ["case", "leak"]
    assert (cases / "case").read_text() == "case\n" and not (here / "late").exists()

    assert "hidden words" not in run.out + run.err
    assert "Read-only file system" in run.err and "nput/output error" in run.err
    told = json.loads(verdict.read_text())
    assert told["verdict"] == "share" and told["status"] == 0
    assert f"the share of {work} has broken off: virtiofsd was killed by SIGKILL" in run.err
    devices = run.report["devices"]
    assert [d["kind"] for d in devices] == ["fs", "fs"]
    host.wait_until(lambda: not processes(host, cases), "a virtiofsd is left")


ROOT_SCRIPT = r"""
pwd; id -un; echo $HOME $USER
python3 -c 'import os; print(os.uname().release, os.getgroups())'
cat /etc/shadow >/dev/null && echo read
echo new >/var/tmp/$1 && cat /var/tmp/$1
mount | grep -c "^overlay on / "
test -d /lib/modules/$(uname -r) && echo modules
dd if=/dev/zero of=/var/tmp/full bs=1M 2>&1 | grep -o "No space left on device"
rm /var/tmp/full; echo again >/var/tmp/$1 && cat /var/tmp/$1
cat >&2
exit 7
"""


def test_the_host_s_root_for_one_of_its_users(host: Host, tmp_path: Path) -> None:
    name = tmp_path.name
    command = ["bash", "-c", ROOT_SCRIPT, "script", name]
    args = ["--net", "none", "--root", "/", "--user", "nobody"]
    # A kernel of the user's, with the image's initrd, which has the init that mounts the root.
    args += ["--kernel", find("default").bzimage, "--", *command]
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
        "No space left on device",
        "again",
    ]
    assert "Permission denied" in run.err and "input" in run.err
    assert host.run("test", "-e", f"/var/tmp/{name}").status == 1


# --- what takes longer: make soak-share -----------------------------------------------------------


@pytest.fixture
def rust(host: Host) -> Iterator[str]:
    """The virtiofsd in Rust, at its place in the testbed: the one that is there, or else that of
    Debian 13 with its own libraries.
    """
    if host.run("test", "-e", virtiofsd.RUST).status == 0:
        told = host.run(virtiofsd.RUST, "--version")
        assert told.status == 0, told
        yield told.out + told.err
        return
    root = Path(cache_root()) / "tree" / "virtiofsd"
    if not root.is_dir():
        apt = Apt("trixie")
        names = ["virtiofsd", *(n for n in apt.closure(["virtiofsd"]) if n.startswith("lib"))]
        apt.install(names, root)
    libraries = f"{root}/usr/lib/x86_64-linux-gnu"
    loader = [f"{libraries}/ld-linux-x86-64.so.2", "--library-path", libraries]
    command = shlex.join([*loader, f"{root}{virtiofsd.RUST}"])
    script = f'#!/bin/sh\nexec {command} "$@"\n'
    install = (
        'mkdir -p "$(dirname "$0")" && printf %s "$1" >"$0" && chmod 755 "$0" && "$0" --version'
    )
    told = host.run("sh", "-ec", install, virtiofsd.RUST, script)
    assert told.status == 0, told
    yield told.out + told.err
    host.sh(f"rm {virtiofsd.RUST}")


@pytest.mark.skipif(not ALL, reason="fetches Debian 13's virtiofsd: make soak-share")
def test_the_virtiofsd_in_rust(host: Host, tmp_path: Path, rust: str) -> None:
    assert "virtiofsd" in rust
    test_files_in_and_out_and_a_virtiofsd_that_dies(host, tmp_path)


@pytest.mark.skipif(not ALL, reason="takes minutes: make soak-share")
def test_a_hundred_thousand_files(host: Host) -> None:
    directory = "/dev/shm/pyvmm-many"
    host.sh(f"mkdir {directory}; cd {directory}; seq {MANY} | xargs touch", 600)
    script = "ls -A | wc -l; ls -l | wc -l; rm -r 9*; find . -type f | wc -l"
    try:
        args = ["--net", "none", "--memory", "512M", "--share", f"{directory}:/many:rw"]
        with Run(host, *args, "--", "sh", "-c", f"cd /many; {script}") as run:
            assert run.wait(1800) == 0, run.out + run.err
        gone = sum(str(number)[0] == "9" for number in range(1, MANY + 1))
        assert run.out.split() == [str(MANY), str(MANY + 1), str(MANY - gone)]
        assert host.sh(f"ls -A {directory} | wc -l").strip() == str(MANY - gone)
    finally:
        host.sh(f"rm -r {directory}", 600)


@pytest.mark.skipif(not ALL, reason="takes minutes: make soak-share")
def test_this_checkout_in_a_guest(host: Host) -> None:
    """git and pytest of the host's, on this checkout, in a guest with the host's root."""
    assert not Path.cwd().is_relative_to("/tmp"), "the guest has a /tmp of its own: clone elsewhere"
    git = ["git", "status", "--porcelain"]
    here = host.run(*git)
    assert here.status == 0, here
    python, marks = sys.executable, ["-p", "no:cacheprovider", "-p", "no:xdist"]
    tests = shlex.join([python, "-m", "pytest", "-q", *marks, "tests/unit/test_rates.py"])
    script = f"{shlex.join(git)} && {tests} && echo also written >README.md && {shlex.join(git)}"
    args = ["--net", "none", "--memory", "512M", "--root", "/", "--", "sh", "-c", script]
    with Run(host, *args) as run:
        assert run.wait(LONG) == 0, run.out + run.err
    before, passed, after = run.out.partition("passed")
    assert passed and before.startswith(here.out) and " M README.md" in after, run.out + run.err
    assert host.run(*git).out == here.out, "the guest has written to the host's files"
