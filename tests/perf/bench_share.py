"""A shared directory of pyvmm's beside QEMU's vhost-user-fs on the same virtiofsd, and the boot
with the host's root beside the plain one. `make bench ARGS=--share` runs it where KVM is.

Every round runs every contestant once, in turn, with the same kernel, init, script and directory,
which lies in memory. The script's marks on the console are timed here, because a guest's clock is
nobody's reference. Figures are seconds: medians with (lowest..highest) of the rounds; only ratios
mean anything on an emulated processor.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import re
import select
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pyvmm.assembly import Description, extra_archive
from pyvmm.host import peers, virtiofsd
from pyvmm.images import find
from pyvmm.shareopt import Share
from tests.perf.bench import STAGE, show, stage_files

SHARED, SOCKET = STAGE / "shared", STAGE / "fs.sock"
LIMIT = 3600.0  # seconds
#: Entries of each virtqueue: what pyvmm gives the device.
QUEUE_SIZE = 256
MARK = re.compile(rb"@@ (.+?) @@")
#: The name of each step is the mark before it. What the guest has read or written is dropped from
#: its page cache in between.
SCRIPT = """
cd /share; mark() {{ sync; echo 3 >/proc/sys/vm/drop_caches; echo "@@ $1 @@"; }}
mark "write {megabytes} MB"; dd if=/dev/zero of=big bs=1M count={megabytes} conv=fsync 2>/dev/null
mark "read {megabytes} MB"; dd if=big of=/dev/null bs=1M 2>/dev/null
mkdir d; mark "make {files} files"
i=0; while [ $i -lt {files} ]; do echo $i >d/$i; i=$((i+1)); done
mark "list them"; ls -l d >/dev/null
mark "read them"; cat d/* >/dev/null
mark "remove them"; rm -r d
mark end
"""


def timed(argv: list[str]) -> dict[str, float]:
    """Run a guest to its end; the seconds of each step of the script.

    :raises RuntimeError: the script has not come to its end.
    """
    child = subprocess.Popen(
        argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    assert child.stdout
    marks: list[tuple[str, float]] = []
    text = b""
    fd, until = child.stdout.fileno(), time.monotonic() + LIMIT
    try:
        while select.select([fd], [], [], max(0, until - time.monotonic()))[0]:
            piece = os.read(fd, 4096)
            if not piece:
                break
            now, text = time.monotonic(), text + piece
            while (match := MARK.search(text)) is not None:
                marks.append((match[1].decode(), now))
                text = text[match.end() :]
            if marks and marks[-1][0] == "end":
                break
    finally:
        child.terminate()
        child.wait()
        child.stdout.close()
    if not marks or marks[-1][0] != "end":
        raise RuntimeError(f"the script broke off: {text[-400:].decode(errors='replace')}")
    return {name: later - when for (name, when), (_, later) in itertools.pairwise(marks)}


@contextmanager
def served() -> Iterator[None]:
    """The virtiofsd for QEMU, started as pyvmm starts its own."""
    SOCKET.unlink(missing_ok=True)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(str(SOCKET))
        listener.listen(1)
        argv = virtiofsd.command(
            virtiofsd.find(), listener.fileno(), str(SHARED), writable=True, root=True
        )
        child = subprocess.Popen(argv, pass_fds=[listener.fileno()])
    try:
        yield
    finally:
        child.terminate()
        child.wait()


def contestants(args: argparse.Namespace) -> dict[str, list[str]]:
    """The command of each: pyvmm, and QEMU if there is one."""
    kernel, initrd, mine, qemu = stage_files(find("default"))
    SHARED.mkdir()
    script = SCRIPT.format(megabytes=args.megabytes, files=args.files)
    command = ["sh", "-c", script]
    cpus, memory = "1", f"{args.memory}M"
    share = ["--share", f"{SHARED}:/share:rw", "--append", "quiet pyvmm.port=0", "-v"]
    out = {
        "pyvmm": [
            *(*mine, "run", "--host", "local", "--net", "none", "--kernel", kernel),
            *("--initrd", initrd, "--memory", memory, *share, "--", *command),
        ]
    }
    if not qemu:
        return out
    # The guest of QEMU gets the same list of shares behind its initrd, so that init does the same.
    want = Description(
        kernel, initrd=initrd, command=command, shares=[Share(SHARED, "/share", writable=True)]
    )
    archive, _ = extra_archive(want)
    assert archive is not None and want.raw_command is not None
    archive.file("/etc/pyvmm.cmd", want.raw_command)
    both = STAGE / "initrd.share"
    both.write_bytes(Path(initrd).read_bytes() + archive.pack())
    out["qemu"] = [
        *peers.qemu_guest(
            qemu,
            kernel=kernel,
            initrd=str(both),
            cmdline="console=ttyS0 panic=-1 quiet pyvmm.port=0",
            cpus=int(cpus),
            memory=memory,
        ),
        *("-M", "q35,memory-backend=ram", "-chardev", f"socket,id=c,path={SOCKET}"),
        *("-device", f"vhost-user-fs-pci,chardev=c,tag=pyvmm0,queue-size={QUEUE_SIZE}"),
    ]
    return out


def boots(mine: list[str]) -> dict[str, list[str]]:
    """A boot with the image's root, and one with the host's."""
    run = [*mine, "run", "--host", "local", "--net", "none"]
    return {"plain": [*run, "--", "uname", "-r"], "--root /": [*run, "--root", "/", "--", "uname"]}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--share", action="store_true", help="this benchmark")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--megabytes", type=int, default=1024)
    parser.add_argument("--files", type=int, default=10_000)
    parser.add_argument("--memory", type=int, default=512, help="of the guest, in MB")
    parser.add_argument("--no-boots", dest="boots", action="store_false", help="only the share")
    parser.add_argument("--json", metavar="FILE")
    args = parser.parse_args()
    results: dict[str, list[dict[str, float]]] = {}

    def note(name: str, figures: dict[str, float]) -> None:
        results.setdefault(name, []).append(figures)
        told = ", ".join(f"{step} {value:.2f} s" for step, value in figures.items())
        print(f"{name}: {told}", file=sys.stderr, flush=True)

    try:
        runners = contestants(args)
        mine = runners["pyvmm"][: runners["pyvmm"].index("run")]
        for _ in range(args.rounds):
            for name, argv in runners.items():
                if name == "qemu":
                    with served():
                        note(name, timed(argv))
                else:
                    note(name, timed(argv))
                for path in SHARED.iterdir():
                    path.unlink()
            for name, argv in boots(mine).items() if args.boots else ():
                began = time.monotonic()
                subprocess.run(argv, check=True, stdin=subprocess.DEVNULL, capture_output=True)
                note(name, {"run": time.monotonic() - began})
    finally:
        shutil.rmtree(STAGE, ignore_errors=True)
    report: list[dict[str, Any]] = [
        {name: rows for name, rows in results.items() if name in ("pyvmm", "qemu")},
        {name: rows for name, rows in results.items() if name not in ("pyvmm", "qemu")},
    ]
    for part in filter(None, report):
        show(part)
    if args.json:
        Path(args.json).write_text(json.dumps({"argv": runners, "rounds": results}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
