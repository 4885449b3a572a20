"""What the linters, the type checker and the C compiler say; ``make lint`` runs this alone."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent
C_FLAGS = [
    "-std=gnu11",
    "-D_GNU_SOURCE",
    "-O2",
    "-Wall",
    "-Wextra",
    "-Wshadow",
    "-Wvla",
    "-Wconversion",
    "-Werror",
    "-Icext",
]
SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]
C_FILES = sorted(
    str(p.relative_to(ROOT))
    for d in ("cext", "pyvmm")
    for p in (ROOT / d).rglob("*.c")
    if p.name != "_ext.c"
)
FORMATTED = sorted(
    str(p.relative_to(ROOT))
    for d in ("cext", "guest", "pyvmm", "tests")
    for p in (ROOT / d).rglob("*.[ch]")
    if p.name != "_ext.c"
)


def clean(*argv: str | Path, **env: str) -> None:
    """Fail with the tool's own words unless it is content."""
    done = subprocess.run(argv, cwd=ROOT, env={**os.environ, **env}, capture_output=True, text=True)
    if done.returncode:
        pytest.fail(f"{Path(argv[0]).name}:\n{done.stdout}{done.stderr}", pytrace=False)


def test_ruff() -> None:
    clean(BIN / "ruff", "check", "--quiet", ".")


def test_ruff_format() -> None:
    clean(BIN / "ruff", "format", "--check", "--quiet", ".")


def test_mypy() -> None:
    clean(BIN / "mypy")


def test_clang_format() -> None:
    clean(BIN / "clang-format", "--dry-run", "-Werror", *FORMATTED)


@pytest.mark.parametrize("path", C_FILES)
@pytest.mark.parametrize("flags", [[], SANITIZE], ids=["warnings", "sanitized"])
def test_c(path: str, flags: list[str]) -> None:
    clean("gcc", *C_FLAGS, *flags, "-c", "-o", os.devnull, path)


def test_c_functions_are_described_where_they_are_defined() -> None:
    """Kernel-doc in the .c file for each function that a header of cext declares."""
    missing, count = [], 0
    for header in sorted((ROOT / "cext").glob("*.h")):
        names = re.findall(r"^[a-z][\w ]*[ *](pv_\w+)\([^{;]*\);", header.read_text(), re.M)
        text = header.with_suffix(".c").read_text() if names else ""
        missing += [name for name in names if f"/**\n * {name}() - " not in text]
        count += len(names)
    assert count > 60 and missing == []


def test_shell_scripts_parse() -> None:
    for script in ("tools/setup.sh", "tools/lock.sh", "tools/measure-here.sh", ".ci/run"):
        clean("sh", "-n", script)


def test_shared_eventfds_block_nobody() -> None:
    """A peer can make the eventfds of queues full and blocking. Only cext/event.c and EventFd.nudge
    cope. Those that are written in another way are nobody's but ours.
    """
    own = {
        "cext/relay.c": ["eventfd_write(stop_fd, 1)"],
        "cext/event.c": ["writev(fd, &v, 1)"],  # pv_event_signal(), see below; pv_event_add()
        "cext/net_worker.c": ["writev(w->cfg.fd, iov, segments)"],  # the tap, as below
        "cext/slirp.c": ["writev(s->tap, iov, 2)"],
        "cext/inflight.c": ["writev()"],  # a comment
        "cext/confine.c": [
            "write(STDERR_FILENO, line, n)",
            "write(process.event, &one, sizeof(one)",
        ],
    }
    found = {
        path: re.findall(r"\b(?:eventfd_)?writev?\([^)]*\)", (ROOT / path).read_text())
        for path in C_FILES
        if path.startswith("cext/")
    }
    assert {path: calls for path, calls in found.items() if calls} == own
    told = {
        match
        for path in C_FILES
        if path.startswith("cext/")
        for match in re.findall(r"\tpv_event_signal\(([^)]*)\)", (ROOT / path).read_text())
    }
    assert told == {
        *("w->wake_fd", "w->cfg.event_fd", "w->answer_fd"),
        "c->wake_fd",  # of a capture's reader
        "end->far_bell",  # between our own workers
        "fd",  # pv_event_add()
    }
    signalled = {
        match
        for path in (ROOT / "pyvmm").rglob("*.py")
        for match in re.findall(r"([\w.\[\]]+)\.signal\(\)", path.read_text())
    }
    assert signalled == {"self._stop", "self._quit", "self._wake", "self._end", "self._relinked"}
    raw = {
        path.relative_to(ROOT / "pyvmm").as_posix()
        for path in (ROOT / "pyvmm").rglob("*.py")
        if "eventfd_write" in path.read_text() or "eventfd_read" in path.read_text()
    }
    assert raw == {"fd.py", "cli/support/terminal.py"}


def test_ioctls_are_made_again() -> None:
    """A signal, or a busy host, interrupts KVM's and vhost's ioctls: only ``pv_ioctl`` copes."""
    raw = {
        path: re.findall(
            r"(?<!pv_)\bioctl\([^)]*\)", re.sub(r"/\*.*?\*/", "", text, flags=re.DOTALL)
        )
        for path in C_FILES
        if path.startswith("cext/")
        for text in [(ROOT / path).read_text()]
    }
    assert {path: calls for path, calls in raw.items() if calls} == {
        "cext/ioctl.c": ["ioctl(fd, request, arg)"] * 2,
        "cext/vcpu.c": ["ioctl(v->fd, KVM_RUN, 0)"],  # whose interruption is the point
    }


def test_what_is_called_a_number_is_one() -> None:
    """``str.isdigit`` takes characters such as a small two above the line, which ``int`` refuses:
    ``isdecimal`` does not. ``bytes`` have only ``isdigit``, which takes ASCII.
    """
    paths = [path for top in ("pyvmm", "tools") for path in (ROOT / top).rglob("*.py")]
    found = {p.relative_to(ROOT).as_posix() for p in paths if ".isdigit()" in p.read_text()}
    assert found == {"pyvmm/testbed/protocol.py"}
