"""Namespaces of the calling thread, in children."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from pyvmm.hostnet import ALLOW_USER_NAMESPACES, userns
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


@pytest.mark.parametrize(
    ("settings", "filtered", "words"),
    [
        ({userns.RESTRICTED: "1"}, True, f"sysctl {userns.RESTRICTED}=0"),
        ({userns.RESTRICTED: "0", userns.LIMIT: "0"}, True, f"sysctl {userns.LIMIT}=10000"),
        ({userns.SWITCHED_OFF: "0"}, False, f"sysctl {userns.SWITCHED_OFF}=1"),
        ({userns.LIMIT: "9"}, True, "--security-opt seccomp=unconfined"),
        ({}, False, ALLOW_USER_NAMESPACES),
    ],
)
def test_the_remedy_is_that_of_what_forbids(
    monkeypatch: pytest.MonkeyPatch, settings: dict[str, str], filtered: bool, words: str
) -> None:
    monkeypatch.setattr(userns, "_setting", lambda name: settings.get(name, ""))
    monkeypatch.setattr(userns, "_filtered", lambda: filtered)
    assert words in userns.remedy()
