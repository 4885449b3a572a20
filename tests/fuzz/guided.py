"""Runs a Python target: under atheris, guided by coverage, or once for each file that is named.

``python -m tests.fuzz.guided TARGET [libFuzzer's arguments]``; ``--once FILE...`` needs no atheris.
"""

from __future__ import annotations

import faulthandler
import importlib
import os
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

from tests.fuzz.registry import BY_NAME, TARGETS, Python

if TYPE_CHECKING:
    from collections.abc import Callable

#: Descriptors and threads are counted after so many inputs, and may not have become more.
COUNT_EVERY = 500
SLACK = 3
#: Seconds of one input after which it is told where its threads are. The fuzzer ends it later.
SLOW_S = 15


class Watch:
    """Looks after each input whether a thread of ours has met an exception, and after some of them
    whether descriptors or threads are left over.
    """

    def __init__(self, one: Callable[[bytes], None]) -> None:
        self.one = one
        self._hooked: list[threading.ExceptHookArgs] = []
        self._runs = 0
        self._before: tuple[int, int] | None = None
        self._begun = 0.0
        threading.excepthook = self._hooked.append
        threading.Thread(target=self._look, daemon=True).start()

    def _look(self) -> None:
        """Tell of an input that takes too long."""
        told = 0.0
        while True:
            time.sleep(1)
            begun = self._begun
            if begun not in (0.0, told) and time.monotonic() - begun > SLOW_S:
                told = begun
                faulthandler.dump_traceback()

    def __call__(self, data: bytes) -> None:
        self._begun = time.monotonic()
        self.one(data)
        self._begun = 0.0
        if self._hooked:
            told = self._hooked.pop(0)
            # What a test's command is made to raise is told by the same way.
            if not (told.exc_type is ZeroDivisionError and str(told.exc_value) == "oh"):
                raise AssertionError("a thread met an exception") from told.exc_value
        self._runs += 1
        if self._runs % COUNT_EVERY == 0:
            self._count()

    def _count(self) -> None:
        now = len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task"))  # noqa: PTH208
        if self._before is None:
            self._before = now
        for what, before, after in zip(("descriptors", "threads"), self._before, now, strict=True):
            assert after <= before + SLACK, f"{after} {what}, {before} before"


def make(name: str) -> Watch:
    """The target of this name."""
    how = TARGETS[BY_NAME[name]]
    assert isinstance(how, Python)
    module = importlib.import_module(f"tests.fuzz.targets.{how.module}")
    return Watch(module.make(how.argument))


def main() -> None:
    name, *argv = sys.argv[1:]
    if argv[:1] == ["--once"]:
        run = make(name)
        for path in argv[1:]:
            run(Path(path).read_bytes())
        os._exit(0)  # the threads of targets serve for as long as there is a process
    import atheris

    with atheris.instrument_imports(include=["pyvmm"]):
        run = make(name)
    atheris.Setup([os.environ.get("PYVMM_FUZZ_SELF", name), *argv], run)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
