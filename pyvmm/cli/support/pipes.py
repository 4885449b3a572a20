"""Kernels and initrds that come through a pipe, such as ``--kernel <(zcat kernel.gz)``.

A pipe can be read once, but a kernel is read several times: to see whether it is Linux, to load it,
and again after each reboot. So what comes through the pipe is kept.
"""

from __future__ import annotations

import os
import stat

from pyvmm.errors import ImageError
from pyvmm.fd import Closing, Fd

#: The most bytes that are kept.
MOST = 4 << 30
CHUNK = 1 << 20


class Kept(Closing):
    """What came through pipes."""

    def __init__(self) -> None:
        self._kept: dict[str, Fd] = {}
        self._files: list[str] = []

    def keep(self, path: str | None, what: str) -> str | None:
        """Read a pipe to its end, which waits for its writer. Returns the path to use instead, in
        this process; ``path`` itself if it is no pipe.

        :param what: ``kernel`` or ``initrd``, for messages.
        :raises ImageError: the pipe cannot be read, or does not end.
        """
        if path is None or not stat.S_ISFIFO(os.stat(path).st_mode):  # noqa: PTH116
            return path
        kept = self._kept[path] = Fd(os.memfd_create(f"pyvmm-{what}", os.MFD_CLOEXEC))
        try:
            with Fd(os.open(path, os.O_RDONLY | os.O_CLOEXEC)) as pipe:
                size = 0
                while data := os.read(pipe.fileno(), CHUNK):
                    size += len(data)
                    if size > MOST:
                        raise ImageError(
                            f"{what} {path!r} is a pipe with more than {MOST >> 30} GiB",
                            "write it to a file first",
                        )
                    while data:
                        data = data[os.write(kept.fileno(), data) :]
                if not size:
                    raise ImageError(
                        f"{what} {path!r} is a pipe through which nothing came",
                        "see whether the command at its other end works",
                    )
        except OSError as e:
            raise ImageError(
                f"{what} {path!r} cannot be read: {e.strerror}", "write it to a file first"
            ) from e
        return f"/proc/self/fd/{kept.fileno()}"

    def for_others(self, words: list[str]) -> None:
        """Replace the pipes in the words of a command by files, which another process can read
        until ``close``.
        """
        import tempfile

        options = words[: words.index("--")] if "--" in words else words
        for path, kept in self._kept.items():
            fd, name = tempfile.mkstemp(prefix="pyvmm-")
            self._files.append(name)
            with Fd(fd) as file:
                at, size = 0, os.fstat(kept.fileno()).st_size
                while at < size:
                    at += os.sendfile(file.fileno(), kept.fileno(), at, size - at)
            for i, word in enumerate(options):
                option, equals, value = word.rpartition("=")
                if value == path:
                    words[i] = f"{option}{equals}{name}"

    def filenos(self) -> list[int]:
        """The descriptors of what came, which stay ours."""
        return [kept.fileno() for kept in self._kept.values()]

    def close(self) -> None:
        """Release everything. A second call does nothing."""
        while self._files:
            os.unlink(self._files.pop())  # noqa: PTH108
        while self._kept:
            self._kept.popitem()[1].close()
