"""``pyvmm run --detach``: the same command again, in the background, until its machine runs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from pyvmm.cli.support.options import DETACHED, RUNNING
from pyvmm.errors import UsageError
from pyvmm.host.paths import cache_root
from pyvmm.programs import module

TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse

POLL_SECONDS = 0.05


def detach(args: argparse.Namespace) -> int:
    """Start the machine in a session of its own, without a terminal, and return once it runs.

    :returns: 0, or the exit status of a machine that could not be made.
    :raises UsageError: the machine has no name, or the file for its output cannot be opened.
    """
    if args.name is None:
        raise UsageError(
            "--detach without --name: nobody could find the machine again", "add --name vm0"
        )
    from pyvmm.control.registry import check_name

    check_name(args.name)
    path = args.detach
    if not path:
        directory = Path(cache_root(), "logs")
        directory.mkdir(0o700, parents=True, exist_ok=True)
        path = str(directory / f"{args.name}.log")
    try:
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND | os.O_CLOEXEC
        # At the end: a machine of that name that is just ending may still write to the file.
        log = os.fdopen(os.open(path, flags, 0o666), "wb")
    except OSError as e:
        raise UsageError(f"--detach {path}: {e.strerror}", "name a file of yours") from e
    with log:
        child = subprocess.Popen(
            module("pyvmm", *args.argv),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env={**os.environ, DETACHED: "1"},
            start_new_session=True,
            close_fds=False,  # the kernel may be a pipe of the shell's, `<(...)`
        )
        try:
            status = _await(child, path)
        except BaseException:
            child.terminate()
            raise
    if status is None:
        print(
            f"pyvmm: {args.name} runs in the background; its output goes to {path}; "
            f"pyvmm quit {args.name} ends it",
            file=sys.stderr,
        )
        child.returncode = 0  # it is left alone: the interpreter must not complain at its end
    return status or 0


def _await(child: subprocess.Popen[bytes], path: str) -> int | None:
    """Wait until the machine runs, and show what pyvmm says until then.

    :returns: None if the machine runs, else the exit status.
    """
    said = b""
    with open(path, "rb") as log:
        while True:
            try:
                status: int | None = child.wait(POLL_SECONDS)
            except subprocess.TimeoutExpired:
                status = None
            said += log.read()
            *lines, said = said.split(b"\n")
            for line in lines:
                text = line.decode(errors="replace")
                if text.startswith(RUNNING):
                    return None
                print(text, file=sys.stderr, flush=True)
            if status is not None:
                return status
