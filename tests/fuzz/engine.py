"""Builds and runs targets, and reads what libFuzzer says of them."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import zipfile
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.fuzz.registry import CEXT, HERE, ROOT, TARGETS, C, Python

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from tests.fuzz.registry import Target

WORK = ROOT / "build/fuzz"
CORPUS = HERE / "corpus"
FOUND = WORK / "found"
FLAGS = (
    *("-std=gnu11", "-D_GNU_SOURCE", "-O1", "-g", "-Wall", "-Wextra", "-Wshadow", "-Wvla"),
    *("-Wconversion", "-Werror", "-fno-omit-frame-pointer", "-fno-sanitize-recover=all"),
    *(f"-I{HERE}", f"-I{CEXT}", "-pthread"),
)
#: Bytes of memory, and seconds of one input, that are a finding.
MEMORY_MIB, SLOW_S = 2048, 30
#: Seconds that a target may take beside its time: to start, and to try the inputs that it has.
GRACE_S = 120
LINE = re.compile(rb"#(\d+)\t?\s.*cov: (\d+)")
DONE = re.compile(rb"stat::number_of_executed_units: (\d+)")
LIVES = re.compile(rb": (\d+) (?:lives|exits)")
#: What of a log is kept in the report, in bytes.
TAIL = 6000


class Missing(Exception):
    """Something that fuzzing needs is not there; the text says what to do."""


class Outcome:
    """What a target has done. :ivar edges: None if the program does not count them.
    :ivar finding: the file of the input, or of the log, of what was found; empty if nothing was.
    """

    def __init__(self, target: Target) -> None:
        self.target = target
        self.seconds = 0.0
        self.executions = 0
        self.edges: int | None = None
        self.inputs = 0
        self.finding = ""
        self.log = ""

    def row(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "target": self.target.name,
            "about": self.target.about,
            "seconds": round(self.seconds, 1),
            "executions": self.executions,
            "edges": self.edges,
            "inputs": self.inputs,
            "finding": self.finding,
        }


def clang() -> str:
    """:raises Missing: there is no clang with libFuzzer."""
    found = shutil.which("clang")
    if found is None:
        raise Missing("fuzzing C needs clang: apt-get install clang, or make setup SETUP=--fuzz")
    return found


def check_atheris() -> None:
    """:raises Missing: there is no atheris."""
    from importlib.util import find_spec

    if find_spec("atheris") is None:
        raise Missing(
            "fuzzing Python needs atheris: .venv/bin/pip install atheris, "
            "or make setup SETUP=--fuzz"
        )


def build(target: Target) -> Path:
    """Build a C target where that is not done yet; returns the program.

    :raises Missing: there is no clang. :raises subprocess.CalledProcessError: it does not compile.
    """
    how = TARGETS[target]
    assert isinstance(how, C)
    WORK.mkdir(parents=True, exist_ok=True)
    program = WORK / target.name
    inputs = [*HERE.glob("*.[ch]"), *CEXT.glob("*.[ch]")]
    if program.exists() and all(f.stat().st_mtime < program.stat().st_mtime for f in inputs):
        return program
    sanitizers = f"fuzzer,{how.sanitizers}" if how.guided else how.sanitizers
    sources = [HERE / how.source, *(HERE / name for name in how.helpers)]
    sources += [CEXT / f"{name}.c" for name in how.others]
    argv = [clang(), *FLAGS, *how.flags, f"-fsanitize={sanitizers}", "-o", str(program)]
    subprocess.run([*argv, *map(str, sources)], check=True)
    return program


def unpack(target: Target) -> Path:
    """The directory of the target's inputs: the repository's, and what earlier runs have found."""
    directory = WORK / "corpus" / target.name
    directory.mkdir(parents=True, exist_ok=True)
    packed = CORPUS / f"{target.name}.zip"
    if packed.exists():
        with zipfile.ZipFile(packed) as archive:
            for name in archive.namelist():
                file = directory / Path(name).name
                if not file.exists():
                    file.write_bytes(archive.read(name))
    return directory


def wrapper(target: Target) -> Path:
    """The program of a Python target. libFuzzer starts it again by its name when it merges."""
    WORK.mkdir(parents=True, exist_ok=True)
    program = WORK / target.name
    words = [sys.executable, "-P", "-m", "tests.fuzz.guided", target.name]
    line = f'PYVMM_FUZZ_SELF="$0" exec {shlex.join(words)} "$@"'
    program.write_text(f"#!/bin/sh\n{line}\n")
    program.chmod(0o755)
    return program


def command(target: Target) -> list[str]:
    """How the target is run; libFuzzer's arguments follow."""
    how = TARGETS[target]
    if isinstance(how, Python):
        return [str(wrapper(target))]
    program = [str(build(target))]
    # The runtimes of ThreadSanitizer refuse more random address bits than 28 (vm.mmap_rnd_bits).
    if how.sanitizers == "thread":
        program = ["setarch", "-R", *program]
    return program


@contextmanager
def environment() -> Iterator[dict[str, str]]:
    """Of a target. Whatever it leaves in its temporary directory is removed."""
    with tempfile.TemporaryDirectory(prefix="pyvmm-fuzz-", ignore_cleanup_errors=True) as directory:
        yield _environment(directory)


def _environment(directory: str) -> dict[str, str]:
    return {
        **os.environ,
        "TMPDIR": directory,
        "PYTHONPATH": str(ROOT),
        "PYTHONDONTWRITEBYTECODE": "1",
        "ASAN_OPTIONS": "detect_stack_use_after_return=0",
        "TSAN_OPTIONS": "halt_on_error=1",
    }


def guided(target: Target) -> bool:
    """Whether libFuzzer drives the target."""
    how = TARGETS[target]
    return isinstance(how, Python) or how.guided


def run(target: Target, seconds: int, seed: int, progress: Callable[[Outcome], None]) -> Outcome:
    """Run a target for so long, or until it finds something.

    :param progress: called with each new figure.
    """
    with environment() as env:
        return _run(target, seconds, seed, progress, env)


def _run(
    target: Target,
    seconds: int,
    seed: int,
    progress: Callable[[Outcome], None],
    env: dict[str, str],
) -> Outcome:
    outcome = Outcome(target)
    argv = command(target)
    if guided(target):
        FOUND.mkdir(parents=True, exist_ok=True)
        corpus = unpack(target)
        argv += [
            f"-max_total_time={seconds}",
            f"-seed={seed}",
            f"-max_len={target.longest}",
            f"-rss_limit_mb={MEMORY_MIB}",
            f"-timeout={SLOW_S}",
            "-print_final_stats=1",
            "-reload=0",
            f"-artifact_prefix={FOUND}/{target.name}-",
            str(corpus),
        ]
    else:
        argv += [str(seconds)]
    begun = time.monotonic()
    before = set(FOUND.glob(f"{target.name}-*")) if FOUND.exists() else set()
    process = subprocess.Popen(
        argv, cwd=WORK, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    stop = threading.Timer(seconds + GRACE_S, process.kill)
    stop.start()
    log = bytearray()
    assert process.stdout is not None
    for line in process.stdout:
        if (found := LINE.match(line)) is not None:
            outcome.executions, outcome.edges = int(found[1]), int(found[2])
            outcome.seconds = time.monotonic() - begun
            progress(outcome)
        elif (found := DONE.search(line) or LIVES.search(line)) is not None:
            outcome.executions = int(found[1])
        else:
            log += line
            del log[:-TAIL]
    status = process.wait()
    stop.cancel()
    outcome.seconds = time.monotonic() - begun
    outcome.log = log.decode(errors="replace")
    if guided(target):
        outcome.inputs = len(list(corpus.iterdir()))
    if status:
        new = sorted(set(FOUND.glob(f"{target.name}-*")) - before) if FOUND.exists() else []
        if not new:
            FOUND.mkdir(parents=True, exist_ok=True)
            new = [FOUND / f"{target.name}-log.txt"]
        if not guided(target) or new[0].name.endswith("-log.txt"):
            new[0].write_text(outcome.log)
        outcome.finding = str(new[0])
    return outcome


def again(file: Path) -> int:
    """Run one input again; returns the exit status of its target."""
    names = sorted((t.name for t in TARGETS if file.name.startswith(f"{t.name}-")), key=len)
    if not names:
        raise Missing(f"{file}: no target's name is before the first part of its name")
    target = next(t for t in TARGETS if t.name == names[-1])
    argv = command(target)
    if isinstance(TARGETS[target], Python):
        argv.append("--once")
    with environment() as env:
        return subprocess.run([*argv, str(file.resolve())], env=env).returncode


def keep(target: Target, most: int) -> int:
    """Put the inputs that reach most into the repository, in an archive of at most ``most`` bytes;
    returns how many there are.
    """
    merged = WORK / "merged" / target.name
    shutil.rmtree(merged, ignore_errors=True)
    merged.mkdir(parents=True)
    argv = [*command(target), "-merge=1", f"-max_len={target.longest}", str(merged)]
    argv.append(str(unpack(target)))
    quiet = subprocess.DEVNULL
    with environment() as env:
        subprocess.run(argv, env=env, check=True, stdout=quiet, stderr=quiet)
    CORPUS.mkdir(exist_ok=True)
    packed = CORPUS / f"{target.name}.zip"
    files = sorted(merged.iterdir(), key=lambda f: (f.stat().st_size, f.name))
    while True:
        _pack(packed, files)
        if packed.stat().st_size <= most:
            return len(files)
        files = files[: len(files) * 7 // 8]  # the longest ones go


def _pack(packed: Path, files: Sequence[Path]) -> None:
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
        for number, file in enumerate(files):
            # Nothing in it but the bytes: the same inputs are the same archive.
            entry = zipfile.ZipInfo(f"{number:03}")
            archive.writestr(entry, file.read_bytes(), zipfile.ZIP_DEFLATED)
