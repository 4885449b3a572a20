"""The command blocks of the pages are run as they are written, in a shell on a terminal, in an
empty directory beside the checkout's. A block that cannot be run is in ``REASONS``.

``tests/unit/test_pages.py`` looks at the options, files and names of all blocks.
"""

from __future__ import annotations

import os
import pty
import re
import select
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from pyvmm.images import find
from tests.boot.guest import PATIENCE, Host

ROOT = Path(__file__).resolve().parents[2]
PAGES = ["README.md", "CONTRIBUTING.md", "guest/README.md"]
PAGES += sorted(str(p.relative_to(ROOT)) for p in (ROOT / "docs").glob("*.md"))
PAGES += sorted(str(p.relative_to(ROOT)) for p in (ROOT / "docs/tutorials").glob("*.md"))

#: (page, beginning of the block's first command) -> why the block is not run.
REASONS = {
    ("README.md", "make demo"): "takes minutes, and `make check` is what runs this test",
    ("README.md", "make setup image"): "installs packages, which needs root and a network",
    ("README.md", "pytest --pyvmm-host auto"): "the same as in docs/pytest.md, see test_plugin",
    ("CONTRIBUTING.md", "tools/setup.sh"): "installs packages, which needs root and a network",
    ("docs/add.md", "make modules_install"): "needs the source of a kernel, see test_additions",
    ("docs/add.md", "tar c tests"): "needs tests of the reader's, see test_additions",
    ("docs/bounds.md", "make soak-bounds"): "takes minutes",
    ("docs/capture.md", "pyvmm run --detach"): "opens a window, see tests/boot/test_capture.py",
    ("docs/capture.md", "pyvmm backend"): "needs two other programs, see test_vhost_user",
    ("docs/compare.md", "pyvmm compare"): "takes minutes per command, see test_compare",
    ("docs/explain.md", "pyvmm run --net MODE"): "MODE is a placeholder",
    ("docs/flows.md", "pyvmm run --net MODE"): "MODE is a placeholder",
    ("docs/fuzzing.md", "make fuzz"): "takes ten minutes, and installs clang",
    ("docs/fuzzing.md", ".venv/bin/python"): "needs a finding",
    ("docs/images.md", "pyvmm image build"): "downloads a kernel",
    ("docs/images.md", "I=~/.cache"): "a console of QEMU, see tests/unit/test_images.py",
    ("docs/ladder.md", "pyvmm compare"): "takes minutes per command, see test_ladder",
    ("docs/ladder.md", "pyvmm testbed up"): "climbs for eleven minutes, in a testbed of its own",
    ("docs/ladder.md", "sudo tools/measure-here.sh"): "measures a real machine, as root",
    ("docs/matrix.md", "pyvmm image build"): "downloads a kernel, and boots eight guests",
    ("docs/devices.md", "qemu-storage-daemon"): "runs in the testbed only, see test_vu_any",
    ("docs/disk.md", "pyvmm run --disk base"): "needs the reader's images, see test_disk",
    ("docs/disk.md", "qemu-img create"): "needs the reader's images, see test_disk",
    ("docs/kselftest.md", "pyvmm run --kernel"): "needs the source of a kernel",
    ("docs/kselftest.md", "pyvmm run --root"): "needs the source of a kernel",
    ("docs/kselftest.md", "export PATH"): "needs the source of a kernel, see test_kselftest",
    ("docs/kselftest.md", "export PYVMM_CONFIG"): "needs the source of a kernel",
    ("docs/kselftest.md", "pyvmm image build"): "downloads a kernel",
    ("docs/kunit.md", "export PATH"): "compiles a kernel, see tests/unit/test_kunit.py",
    ("docs/kunit.md", "./tools/testing"): "compiles a kernel, see tests/unit/test_kunit.py",
    ("docs/root.md", "debootstrap"): "fetches a Debian, see tests/boot/test_tree.py",
    ("docs/root.md", "pyvmm run --kernel"): "needs the source of a kernel",
    ("docs/share.md", "pyvmm run --share ~/cases"): "needs the reader's files, see test_share",
    ("docs/device-stats.md", "pyvmm run --image 6.12"): "needs another image, see test_net",
    ("docs/features.md", "pyvmm image build"): "boots fourteen guests, on Linux 6.12",
    ("docs/matrix.md", "pyvmm matrix ["): "is a synopsis",
    ("docs/performance.md", "make bench"): "takes half an hour",
    ("docs/performance.md", "make bench-native"): "takes minutes, and two CPUs to itself",
    ("docs/performance.md", "ping="): "boots an Intel testbed besides, see tests/intel",
    ("docs/performance.md", "valgrind"): "needs valgrind, which the set-up does not install",
    ("docs/pytest.md", "pytest -v"): "needs an image of another kernel, see test_plugin",
    ("docs/pytest.md", "cd docs/examples"): "needs a kernel of the reader's, see test_ci",
    ("docs/report.md", "pyvmm run --report"): "needs jq, which the set-up does not install",
    ("docs/run.md", "pyvmm run --net vhost-net,bridge"): "needs a bridge with a DHCP server",
    ("docs/run.md", "pyvmm run --net vhost-net,macvtap"): "needs a network with a DHCP server",
    ("docs/run.md", "pyvmm run"): "is typed at a console, see test_console",
    ("docs/test-kernels.md", "pyvmm test --config"): "needs a checkout of kvm-unit-tests",
    ("docs/testbed.md", "pyvmm testbed setup --cpu intel"): "boots an Intel testbed besides",
    ("docs/testbed.md", "mkdir out"): "needs an Intel testbed, see tests/intel",
    ("docs/testbed.md", "pyvmm testbed --host ssh"): "needs a machine named box",
    ("docs/testbed.md", "pyvmm testbed up"): "would stop the testbed of this session",
    ("docs/vhost-user.md", "DIR=$(mktemp -d)"): "needs a KVM here that runs Linux",
    ("docs/vhost-vdpa.md", "pyvmm"): "needs a testbed with Linux 6.12, see test_vdpa",
    ("docs/vhost-vdpa.md", "modprobe"): "needs Linux 6.12, see test_vdpa",
    ("docs/vhost-user.md", "pyvmm backend --socket $DIR/a"): "is an outline, of two hosts",
    ("docs/vhost-user.md", "sleep 600 |"): "needs DPDK, see test_dpdk",
    ("docs/vhost-user.md", "dpdk-testpmd"): "needs DPDK, see test_dpdk",
    ("docs/jail.md", "sudo pyvmm"): "needs a bridge and a kernel of somebody's",
    ("docs/jail.md", "sudo systemd-run"): "needs systemd and a kernel of somebody's",
    ("docs/jail.md", "truncate"): "needs an image of somebody's, see tests/boot/test_jail.py",
    ("docs/watch.md", "ssh -t -L"): "needs a machine named server",
}
VM0 = (
    "pyvmm run --detach=vm0.log --name vm0 --net emulated,switchable=vhost-net+vhost-user"
    " -- ping -i 0.2 192.168.100.1"
)
#: What an earlier block, or the text, has done before this one.
BEFORE = {
    ("docs/exec.md", "pyvmm exec --net"): "pyvmm run --detach --name vm0 -- sleep 3600",
    ("docs/control.md", "pyvmm rings"): VM0,
    ("docs/packed-rings.md", "pyvmm rings"): VM0.replace(
        "switchable=vhost-net+vhost-user", "with=packed"
    ),
    ("docs/top.md", "pyvmm top"): VM0,
    ("docs/fault-injection.md", "pyvmm fault vm0 tx"): f"{VM0}; pyvmm exec vm0 -- true",
    ("docs/fault-injection.md", "pyvmm fault vm0 config"): f"{VM0}; pyvmm exec vm0 -- true",
    ("docs/switch.md", "pyvmm switch --json"): VM0,
    ("docs/lessons.md", "pyvmm exec vm0 -- ping"): (
        "pyvmm run --detach=vm0.log --name vm0 -- sleep 600"
    ),
    ("docs/lessons.md", "pyvmm watch --text"): f"{VM0}; pyvmm exec vm0 -- true",
    ("docs/lessons.md", "pyvmm stop"): f"{VM0}; pyvmm exec vm0 -- true",
    ("docs/lessons.md", "pyvmm switch vm0 emulated"): (
        f"{VM0}; pyvmm exec vm0 -- true; pyvmm switch vm0 vhost-net"
    ),
    ("docs/lessons.md", "tshark"): (
        "pyvmm run --pcap lesson6.pcapng -- sh -c 'nc -w 2 192.168.100.1 80 </dev/null; true'"
    ),
    ("docs/vhost-user.md", "pyvmm backend --quiet"): "DIR=$(mktemp -d)",
    ("docs/vhost-user.md", "pyvmm vhost-user check"): (
        "DIR=$(mktemp -d); pyvmm backend --quiet --loopback --socket $DIR/s & sleep 2"
    ),
    ("docs/tutorials/learn-virtio.md", "pyvmm stop"): f"{VM0}; pyvmm exec vm0 -- true",
    ("docs/tutorials/learn-virtio.md", "pyvmm switch"): f"{VM0}; pyvmm exec vm0 -- true",
    ("docs/tutorials/write-a-back-end.md", "pyvmm vhost-user probe"): (
        "DIR=$(mktemp -d); python3 mirror.py $DIR/s & sleep 2"
    ),
    ("docs/trace.md", "grep"): (
        "pyvmm run --trace trace.json --net emulated -- ping -c 3 192.168.100.1"
    ),
}
#: Programs whose status is not that of a success, although the page does not print it.
STATUS = {
    "pyvmm doctor": {0, 3},
    # A budget that holds or not, by the machine; the page shows it broken.
    "pyvmm testbed -- sh -c 'iperf3 -s -1 -D": {0, 117},
    # Whose driver makes mistakes; the page shows them.
    "pyvmm run --kernel guest/build/pcinet.elf --append steps=bare": {1},
    # Whose driver has no receive buffer left, and waits for ever.
    "pyvmm run --kernel guest/build/pcinet-bug.elf": {124},
}


class Block(NamedTuple):
    page: str
    line: int
    #: (command, the lines that the page shows as its output)
    steps: list[tuple[str, list[str]]]

    @property
    def key(self) -> tuple[str, str]:
        return self.page, self.steps[0][0]


def in_table(block: Block, table: dict[tuple[str, str], str]) -> str | None:
    """The entry for a block."""
    page, command = block.key
    found = [start for where, start in table if where == page and command.startswith(start)]
    # "pyvmm run" alone stands for exactly this command.
    found = [s for s in found if s != "pyvmm run" or command == s]
    return table[page, max(found, key=len)] if found else None


def blocks() -> Iterator[Block]:
    for page in PAGES:
        text = (ROOT / page).read_text()
        for match in re.finditer(r"(?ms)^ *```(sh|console)\n(.*?)^ *```", text):
            steps: list[tuple[str, list[str]]] = []
            for line in match[2].splitlines():
                starts = line.startswith("$ ") if match[1] == "console" else True
                open_quote = bool(steps) and steps[-1][0].count("'") % 2 == 1
                if steps and not steps[-1][1] and (steps[-1][0].endswith("\\") or open_quote):
                    steps[-1] = (f"{steps[-1][0]}\n{line}", [])
                elif starts:
                    steps.append((line.removeprefix("$ ").partition("  #")[0].rstrip(), []))
                else:
                    steps[-1][1].append(line)
            yield Block(page, text[: match.start()].count("\n") + 1, steps)


#: Commands in the table of docs/virtme-ng.md that are not run, and why.
VNG_REASONS = {
    "pyvmm run BZ --modules . --root / -- true": "needs a kernel's build tree",
    "pyvmm run --root /": "is typed at a console",
}
BZ = "--kernel arch/x86/boot/bzImage"


def vng_rows() -> list[str]:
    """The commands in the second column of the table of options of docs/virtme-ng.md."""
    text = (ROOT / "docs/virtme-ng.md").read_text()
    text = text.partition("\n## Options\n")[2].partition("\n## ")[0]
    return re.findall(r"(?m)^\|[^|]*\| `([^`|]+)` \|", text)


BLOCKS = list(blocks())
RUN = [block for block in BLOCKS if in_table(block, REASONS) is None]


class Shell:
    """An interactive bash on a terminal of its own, so that job control is what a user has."""

    def __init__(self, directory: Path, env: dict[str, str]) -> None:
        self.master, slave = pty.openpty()
        self.process = subprocess.Popen(
            ["setsid", "--ctty", "bash", "--norc", "--noediting", "-i"],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            cwd=directory,
            env={**env, "PS1": "", "PS2": "", "TERM": "dumb"},
        )
        os.close(slave)
        self.text = ""
        self.do("stty -echo")

    def do(self, command: str) -> tuple[int, str]:
        """Run a command; its status and its output."""
        start = len(self.text)
        # In one piece, because a command that reads the terminal would take what comes later.
        os.write(self.master, f'{{ {command}\n}}; echo "@@$?"@@\n'.encode())
        until = time.monotonic() + PATIENCE
        while not (found := re.search(r"@@(\d+)@@", self.text[start:])):
            left = until - time.monotonic()
            assert left > 0 and select.select([self.master], [], [], left)[0], (
                f"{command!r} does not end: {self.text[start:]}"
            )
            self.text += os.read(self.master, 65536).decode(errors="replace").replace("\r", "")
        return int(found[1]), self.text[start : start + found.start()]

    def close(self) -> None:
        try:
            self.do("kill $(jobs -p) 2>/dev/null; wait")
        finally:
            self.process.kill()
            self.process.wait()
            os.close(self.master)


@pytest.fixture(scope="module")
def directory(host: Host, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the pages say that the reader has: the checkout's files, a program, a kernel."""
    place = tmp_path_factory.mktemp("reader")
    for name in ("guest", "docs", "tools"):
        (place / name).symlink_to(ROOT / name)
    (place / ".venv").symlink_to(sys.prefix)
    (place / "mytest.c").write_text(
        '#include <stdio.h>\nint main(void) { puts("hello from my program"); return 0; }\n'
    )
    subprocess.run(["gcc", "-static", "-o", place / "mytest", place / "mytest.c"], check=True)
    (place / "arch/x86/boot").mkdir(parents=True)
    shutil.copy(find("default").bzimage, place / "arch/x86/boot/bzImage")
    home = place / "home" / ".cache"
    home.mkdir(parents=True)
    (home / "pyvmm").symlink_to(Path(find("default").directory).parents[2])
    return place


@pytest.fixture
def shell(host: Host, directory: Path) -> Iterator[Shell]:
    # The reader's machines are others than those that run here, but the testbed is this one.
    with tempfile.TemporaryDirectory(prefix="reader-") as runtime:
        (Path(runtime) / "pyvmm").mkdir(0o700)
        (Path(runtime) / "pyvmm" / Path(host.testbed.dir).name).symlink_to(host.testbed.dir)
        yield from shell_in(host, directory, runtime)


def shell_in(host: Host, directory: Path, runtime: str) -> Iterator[Shell]:
    env = {**os.environ, "PYVMM_TESTBED": host.testbed.name, "HOME": str(directory / "home")}
    env["XDG_RUNTIME_DIR"] = runtime
    env.pop("PYVMM_CONFIG", None)  # a page shows the reader's own
    env["PATH"] = f"{Path(sys.executable).parent}:{env['PATH']}"
    shell = Shell(directory, env)
    try:
        yield shell
        shell.do("pyvmm quit --host testbed vm0 2>/dev/null")
        left = shell.do("pyvmm ps --host local")[1]
        assert len(left.strip().splitlines()) <= 1, f"the block has left a machine: {left}"
    finally:
        shell.close()


def test_tables_have_no_dead_entries() -> None:
    for table in (REASONS, BEFORE):
        for page, start in table:
            assert any(b.page == page and b.key[1].startswith(start) for b in BLOCKS), (page, start)
    assert len(RUN) > 30


@pytest.mark.parametrize("command", [row for row in vng_rows() if row not in VNG_REASONS])
def test_an_equivalent_of_vng_runs(shell: Shell, command: str) -> None:
    status, text = shell.do(command.replace(" BZ ", f" {BZ} "))
    assert status == 0, f"{command}: {text}"


def test_the_table_of_vng_is_read() -> None:
    rows = vng_rows()
    assert len(rows) > 20 and set(VNG_REASONS) <= set(rows)


@pytest.mark.parametrize("block", RUN, ids=lambda b: f"{b.page}:{b.line}")
def test_a_block_runs_as_it_is_written(shell: Shell, block: Block) -> None:
    before = in_table(block, BEFORE)
    if before is not None:
        status, text = shell.do(before)
        assert status == 0, text
    for command, shown in block.steps:
        status, text = shell.do(command)
        assert "Traceback" not in text, text
        assert "Stopped" not in text, "a job in the background was stopped by the terminal"
        if command.endswith("; echo $?"):
            assert text.split()[-1:] == shown[-1].split(), f"{command}: {text}"
        allowed = next((s for c, s in STATUS.items() if command.startswith(c)), {0})
        assert status in allowed, f"{command}: {status}: {text}"
