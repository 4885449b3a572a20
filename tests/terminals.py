"""Commands of pyvmm on a terminal of a chosen kind and width."""

from __future__ import annotations

import os
import pty
import signal
import subprocess
import sys
import termios
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
UNSET = ("COLUMNS", "NO_COLOR", "FORCE_COLOR")


def on_a_terminal(*argv: str, columns: int = 80, until: str = "", **env: str) -> str:
    """What ``pyvmm ARGV`` prints there, up to its end.

    :param until: it goes on without end: interrupt it once it has printed this.
    :param env: variables, beside those of this process without ``UNSET``.
    """
    outer, inner = pty.openpty()
    termios.tcsetwinsize(inner, (24, columns))
    own = {k: v for k, v in os.environ.items() if k not in UNSET}
    process = subprocess.Popen(
        [sys.executable, "-m", "pyvmm", *argv],
        cwd=ROOT,
        env={**own, "TERM": "xterm", **env},
        stdin=subprocess.DEVNULL,
        stdout=inner,
        stderr=subprocess.STDOUT,
    )
    os.close(inner)
    said = b""
    try:
        while data := os.read(outer, 65536):
            said += data
            if until and until.encode() in said:
                process.send_signal(signal.SIGINT)
                until = ""
    except OSError:
        pass  # the other end has been closed
    finally:
        os.close(outer)
        process.wait()
    return said.decode().replace("\r\n", "\n")
