"""What C has been given back to is not used any more: a late kick, a late word to a pipe.

Another thread may have read the pointer when the owner closes the object. The owner waits until
that thread is out of the C function.
"""

from __future__ import annotations

import ast
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pyvmm._ext import lib
from pyvmm.bus import Bus
from pyvmm.devices import console
from pyvmm.devices.console import Stream
from pyvmm.kvm import vcpu as vcpus
from pyvmm.kvm.vcpu import Vcpu

PATIENCE = 30.0
PYVMM = Path(__file__).resolve().parents[2] / "pyvmm"


class Lib:
    """The C functions. One of them, ``slow``, waits until the test lets it go on."""

    def __init__(self, slow: str, free: str) -> None:
        self._slow, self._free = slow, free
        self.inside, self.go_on, self.freed = (threading.Event() for _ in range(3))

    def __getattr__(self, name: str) -> Any:
        function: Callable[..., Any] = getattr(lib, name)
        if name == self._slow:

            def wait(*args: Any) -> Any:
                self.inside.set()
                assert self.go_on.wait(PATIENCE)
                assert not self.freed.is_set()
                return function(*args)

            return wait
        if name == self._free:

            def free(*args: Any) -> Any:
                self.freed.set()
                return function(*args)

            return free
        return function


class BareVcpu(Vcpu):
    """A vCPU without KVM; ``kick`` and ``close`` are the real ones."""

    def __init__(self, bus: Bus) -> None:
        self.c = lib.pv_vcpu_new(-1, 4096, bus.c)

    def _close_fds(self) -> None:
        pass


def check(fake: Lib, use: Callable[[], object], close: Callable[[], object]) -> None:
    """``use`` is inside C when ``close`` comes."""
    user = threading.Thread(target=use)
    user.start()
    assert fake.inside.wait(PATIENCE)
    closer = threading.Thread(target=close)
    closer.start()
    assert not fake.freed.wait(0.2), "freed under the other thread"
    fake.go_on.set()
    for thread in (user, closer):
        thread.join(PATIENCE)
        assert not thread.is_alive()
    assert fake.freed.is_set()
    use()  # too late: nothing happens
    close()


def test_kick(monkeypatch: pytest.MonkeyPatch) -> None:
    bus = Bus()
    fake = Lib("pv_vcpu_kick", "pv_vcpu_free")
    monkeypatch.setattr(vcpus, "lib", fake)
    vcpu = BareVcpu(bus)
    check(fake, vcpu.kick, vcpu.close)
    bus.close()


@pytest.mark.parametrize(
    ("function", "use"),
    [
        ("pv_pipe_hurry", Stream.release),
        ("pv_pipe_dropped", lambda stream: stream.dropped),
        ("pv_pipe_close", Stream.finish),
    ],
)
def test_stream(
    monkeypatch: pytest.MonkeyPatch, function: str, use: Callable[[Stream], object]
) -> None:
    fake = Lib(function, "pv_pipe_free")
    monkeypatch.setattr(console, "lib", fake)
    stream = Stream("s")
    stream.start()
    check(fake, lambda: use(stream), stream.close)


def test_a_pointer_that_may_be_gone_is_looked_at_under_a_lock() -> None:
    """Wherever a method asks whether a C object is still there before it uses the object, it holds
    the lock of whoever frees the object; but for ``close`` and what is made in one thread.
    """
    wrong = []
    for path in sorted(PYVMM.rglob("*.py")):
        tree = ast.parse(path.read_text())
        guarded = {
            id(node)
            for block in ast.walk(tree)
            if isinstance(block, ast.With)
            for node in ast.walk(block)
        }
        for function in ast.walk(tree):
            if not isinstance(function, ast.FunctionDef):
                continue
            if function.name in ("close", "__init__"):
                continue
            for node in ast.walk(function):
                if (
                    isinstance(node, ast.Compare)
                    and ast.unparse(node).endswith("ffi.NULL")
                    and ast.unparse(node.left).startswith("self.")
                    and id(node) not in guarded
                ):
                    wrong.append(f"{path}:{node.lineno}: {ast.unparse(node)}")
    assert not wrong
