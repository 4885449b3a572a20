"""The results of a matrix as a JSON file that is complete at any time, so that a sweep can go on
after a break.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

from pyvmm import __version__
from pyvmm.errors import HostError, ImageError, UsageError
from pyvmm.fd import Closing
from pyvmm.testing.vm import resolve

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from typing import Any

    from pyvmm.matrix.run import Cell, Settings

SCHEMA = "pyvmm-matrix/1"


class Store(Closing):
    """Results by the name of their cell, in a file that is replaced after each cell. A context
    manager.

    :param path: of the file; None to keep nothing.
    :param resume: keep the results in the file whose key is still the same.
    :raises UsageError: the file cannot be written, or is not a file of results.
    """

    def __init__(
        self, path: str | None, cells: Sequence[Cell], settings: Settings, *, resume: bool
    ) -> None:
        self._path = path
        self._keys = {cell.name: key(cell, settings) for cell in cells}
        self._old: dict[str, dict[str, Any]] = {}
        self._done: dict[str, dict[str, Any]] = {}
        if path is None:
            return
        if resume and Path(path).exists():
            self._old = load(path)
        self._part = Path(f"{path}.part")
        try:
            self._part.touch()
        except OSError as e:
            raise UsageError(
                f"--json {path}: {e.strerror}", "name a file that can be written"
            ) from e

    def begin(self) -> None:
        """Replace the file: from now on it has the results of this sweep, and the older ones that
        are kept.

        :raises HostError: the file cannot be written any more.
        """
        self._write()

    def find(self, cell: Cell) -> dict[str, Any] | None:
        """The result of an earlier sweep, if its key is the same and the host was not to blame."""
        old = self._old.get(cell.name)
        good = (
            old is not None
            and old.get("key") == self._keys[cell.name]
            and old.get("verdict") != "host-problem"
        )
        return old if good else None

    def add(self, cell: Cell, result: dict[str, Any]) -> None:
        """Add a result to the file.

        :raises HostError: the file cannot be written any more.
        """
        self._done[cell.name] = {"name": cell.name, "key": self._keys[cell.name], **result}
        self._write()

    def _write(self) -> None:
        """Write the file. Old results stay until this sweep has come to their cells. A reader finds
        a complete file at any time.
        """
        if self._path is None:
            return
        try:
            self._part.write_text(self.text())
            self._part.rename(self._path)
        except OSError as e:
            raise HostError(
                f"--json {self._path}: {e.strerror}", "make room, then go on with --resume"
            ) from e

    def text(self) -> str:
        """The content of the file so far, also if there is none."""
        return document({**self._old, **self._done}.values())

    def close(self) -> None:
        """Remove the temporary file."""
        if self._path is not None:
            self._part.unlink(missing_ok=True)


def document(cells: Iterable[dict[str, Any]]) -> str:
    """A file of results."""
    data = {"schema": SCHEMA, "pyvmm": __version__, "cells": list(cells)}
    return json.dumps(data, indent=2) + "\n"


def load(path: str) -> dict[str, dict[str, Any]]:
    """The results in a file, by name.

    :raises UsageError: the file cannot be read, or is not a file of results.
    """
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
        if data.get("schema") != SCHEMA:
            raise ValueError(f"its schema is not {SCHEMA}")
        return {str(cell["name"]): cell for cell in data["cells"]}
    except OSError as e:
        raise UsageError(f"{path}: {e.strerror}", "name a file that `--json` has written") from e
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise UsageError(
            f"{path} has no results of a sweep: {e}", "name a file that `--json` has written"
        ) from e


def key(cell: Cell, settings: Settings) -> str:
    """A hash of everything on which a result depends beyond the name of its cell: the options, and
    the kernel's present file.
    """
    try:
        files = [path for path in resolve(cell.kernel)[:2] if path]
    except ImageError:
        files = [cell.kernel]
    parts = settings.key()
    for path in files:
        try:
            status = os.stat(path)  # noqa: PTH116
            parts.append((os.path.realpath(path), status.st_size, status.st_mtime_ns))
        except OSError:
            parts.append(path)
    return repr(parts)
