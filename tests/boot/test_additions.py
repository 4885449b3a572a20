"""What `--add` and `--modules` bring into a guest, and a command's standard input: one boot checks
many things, because each boot takes seconds.
"""

from __future__ import annotations

import hashlib
import lzma
import os
import random
import subprocess
from pathlib import Path

import pytest

from pyvmm.host.paths import cache_root
from pyvmm.images import find
from tests.boot.guest import PATIENCE, PYVMM, Host, Run

pytestmark = pytest.mark.usefixtures("nothing_left")

FILES = 1000
PROGRAM = """
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
int main(int argc, char **argv) { printf("%g\\n", pow(2, atoi(argv[1]))); return argc; }
"""
#: Prints one line per thing that a test looks at.
SCRIPT = r"""
needs-libm 10
echo $?
find many -type f | wc -l
cat many/*/* | sha256sum
stat -c '%a %h' many/tool "many/$(printf '\377\1 *')" many/private many/empty
readlink many/link
cat notes.txt sub/second
cat /etc/hostname
modprobe dummy && ls -d /sys/module/dummy /sys/module/virtio_net
pwd
"""


def test_files_programs_and_modules_arrive(host: Host, tmp_path: Path) -> None:
    many = tmp_path / "many"
    whole = hashlib.sha256()
    for i in range(FILES):
        file = many / f"{i // 100:02}" / f"{i:05}"
        file.parent.mkdir(parents=True, exist_ok=True)
        data = random.Random(i).randbytes(i % 300)
        file.write_bytes(data)
        whole.update(data)
    (many / "empty").mkdir()
    (many / "private").mkdir(0o700)
    odd = os.fsdecode(b"\xff\x01 *")
    (many / odd).write_bytes(b"odd")
    os.link(many / odd, many / "tool")
    (many / "tool").chmod(0o4711)
    (many / "link").symlink_to("/elsewhere")
    program = tmp_path / "needs-libm"
    subprocess.run(
        ["gcc", "-x", "c", "-", "-o", str(program), "-fno-builtin", "-lm"],
        input=PROGRAM.encode(),
        check=True,
    )
    notes = tmp_path / "notes.txt"
    notes.write_text("one\n")
    release = find("default").version
    module = next(Path(cache_root(), "testbed/kernel", release).rglob("dummy.ko"))
    tree = tmp_path / f"installed/lib/modules/{release}/kernel"
    tree.mkdir(parents=True)
    (tree / "dummy.ko.xz").write_bytes(lzma.compress(module.read_bytes()))
    # A second archive of the user's goes behind the image's, as the kernel takes it.
    second = subprocess.run(
        ["cpio", "--quiet", "-o", "-H", "newc"],
        input=b"root/sub\nroot/sub/second\n",
        stdout=subprocess.PIPE,
        cwd=prepared(tmp_path / "second"),
        check=True,
    ).stdout
    (tmp_path / "second.cpio").write_bytes(second[:-256])  # no multiple of 512
    with Run(
        host,
        *("--net", "none", "--memory", "256M"),
        *("--initrd", "default", "--initrd", str(tmp_path / "second.cpio")),
        *("--add", str(program), "--add", str(many), "--add", str(notes)),
        *("--add", f"{notes}:/etc/hostname", "--modules", str(tmp_path / "installed")),
        *("--", "sh", "-c", SCRIPT),
    ) as run:
        assert run.wait() == 0, repr(run)
        assert run.out.splitlines() == [
            "1024", "2", str(FILES + 2), f"{whole.hexdigest()}  -",
            "4711 2", "4711 2", "700 2", "755 2",
            "/elsewhere", "one", "second", "one",
            "/sys/module/dummy", "/sys/module/virtio_net", "/root",
        ]  # fmt: skip
        assert run.err == ""


def prepared(top: Path) -> Path:
    (top / "root/sub").mkdir(parents=True)
    (top / "root/sub/second").write_text("second\n")
    return top


def test_a_command_reads_standard_input(host: Host) -> None:
    """Every byte arrives, and the end; the command reads no further than it wants; and while there
    is nothing to read, its output goes on.
    """
    data = random.Random(1).randbytes(1_000_000)
    script = "head -c 5 | od -An -c; echo ready; sha256sum; echo no input left; cat"
    argv = [*PYVMM, "run", "--host", "local", "--net", "none", "--", "sh", "-c", script]
    with subprocess.Popen(
        [*PYVMM, "testbed", "-q", "--name", host.testbed.name, "--", *argv],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as run:
        assert run.stdin is not None and run.stdout is not None
        run.stdin.write(b"\x10\x04\x00\xff\n")
        run.stdin.flush()
        assert run.stdout.readline().split() == [b"020", b"004", b"\\0", b"377", b"\\n"]
        assert run.stdout.readline() == b"ready\n"
        run.stdin.write(data)
        run.stdin.close()
        assert run.stdout.readline().split()[0].decode() == hashlib.sha256(data).hexdigest()
        assert run.stdout.read() == b"no input left\n"
        assert run.wait(PATIENCE) == 0


def test_what_does_not_fit_is_told_before_the_boot(host: Host, tmp_path: Path) -> None:
    """Linux would boot, and leave out what does not fit."""
    large = tmp_path / "large"
    large.write_bytes(bytes(60 << 20))
    with Run(
        host, "--net", "none", "--memory", "128M", "--add", str(large), "--", "true", report=False
    ) as run:
        assert run.wait() == 105
        assert "Linux needs" in run.err and "give it --memory" in run.err
