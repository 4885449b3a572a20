"""Namespaces of the calling thread, in children."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.strangers import BECOME, need_readable_checkout

ROOT = Path(__file__).resolve().parents[2]


def child(code: str, *prefix: str) -> str:
    done = subprocess.run(
        [*prefix, sys.executable, "-B", "-c", f"from pyvmm.hostnet.userns import *\n{code}"],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    return done.stdout + done.stderr


def test_an_ordinary_user_becomes_root_inside() -> None:
    need_readable_checkout()
    prefix = BECOME if os.geteuid() == 0 else []
    out = child("become_root(); print(os.getuid(), open('/proc/self/uid_map').read())", *prefix)
    if "PermissionError" in out:
        pytest.skip(f"not allowed here: {out.splitlines()[-1]}")
    assert out.split() == ["0", "0", str(65534 if prefix else os.geteuid()), "1"]


def test_what_the_kernel_refuses_is_named() -> None:
    out = child(
        "import threading; e = threading.Event(); t = threading.Thread(target=e.wait); t.start()\n"
        "try: unshare(lib.CLONE_NEWUSER)\nexcept OSError as x: print(x.errno, x.strerror)\ne.set()"
    )
    assert out == "22 unshare: Invalid argument\n"
