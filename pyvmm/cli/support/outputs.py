"""The files to which a command writes its results.

They are opened before the work begins, so that a bad path does not cost a whole run. Each result is
written completely. If that fails, because the disk is full or the reader has gone, the user gets a
message and the exit status is not 0. A file that was made and stayed empty is removed.
"""

from __future__ import annotations

import os
import stat
import sys

from pyvmm.errors import HostError, UsageError
from pyvmm.fd import Closing

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

STDOUT = "-"


class Output:
    """One file for results, or standard output. Owns its descriptor.

    :param option: the option that asks for the file, for messages.
    :param path: of the file; ``-`` is standard output.
    :param keep: an older file keeps its content until ``replace``, instead of losing it now.
    :param private: only this user may read it, and no other user's file is taken.
    :ivar problem: why something could not be written; empty if everything was written.
    :ivar cut: why the file has been written, but lacks something; empty if it is whole.
    :ivar regular: it is a regular file.
    :raises UsageError: the file cannot be opened.
    """

    def __init__(
        self, option: str, path: str, *, keep: bool = False, private: bool = False
    ) -> None:
        self.option, self.path = option, path
        self.problem = self.cut = ""
        self._made = False
        try:
            if path == STDOUT:
                self._fd = os.dup(1)
                self.regular = False  # what else is in that file is not ours, so it is not removed
            else:
                if private:
                    from pyvmm.capture.files import open_private

                    self._fd, self._made = open_private(path, keep=keep)
                else:
                    self._fd = self._open(0 if keep else os.O_TRUNC)
                self.regular = stat.S_ISREG(os.fstat(self._fd).st_mode)
            if self._made:
                from pyvmm import helper

                helper.permit("remove", path)  # see ``close``
        except (OSError, ValueError) as e:
            reason = e.strerror if isinstance(e, OSError) else str(e)
            raise UsageError(f"{option} {path}: {reason}", "name a file that can be written") from e

    def _open(self, more: int) -> int:
        flags = os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC
        try:
            fd = os.open(self.path, flags | os.O_EXCL, 0o644)
        except FileExistsError:
            return os.open(self.path, flags | more, 0o644)
        self._made = True
        return fd

    def leave_file(self) -> None:
        """Have ``close`` remove no file: the process from which this one was forked does so."""
        self._made = False

    def fileno(self) -> int:
        """The descriptor; it stays the output's."""
        return self._fd

    def write(self, data: bytes) -> None:
        """Append ``data``, all of it.

        :raises OSError: the disk is full, or the reader has gone; ``problem`` has the reason, too.
        """
        try:
            if self.path == STDOUT:
                sys.stdout.flush()  # what was printed before comes first
            view = memoryview(data)
            while view:
                view = view[os.write(self._fd, view) :]
        except OSError as e:
            self.problem = e.strerror or str(e)
            raise

    def duplicate(self) -> int:
        """The file, for somebody else to write: a descriptor of the caller's.

        :raises OSError: this process has no free descriptor.
        """
        return os.dup(self._fd)

    def replace(self, data: bytes) -> None:
        """Write ``data`` as the file's whole content; a pipe or a terminal gets it as well.

        :raises OSError: as in ``write``.
        """
        if self.regular:
            os.ftruncate(self._fd, 0)
            os.lseek(self._fd, 0, os.SEEK_SET)
        self.write(data)

    def close(self) -> None:
        """Release the file; remove it if it is new and nothing was written. A second call does
        nothing.
        """
        if self._fd < 0:
            return
        fd, self._fd = self._fd, -1
        try:
            mine = os.fstat(fd)
            if self._made and not mine.st_size:
                from pyvmm.hostnet import sockets

                sockets.remove(self.path, (mine.st_dev, mine.st_ino))
        except OSError:
            pass  # somebody else has removed it
        try:
            os.close(fd)
        except OSError as e:  # a network file system reports errors only now
            self.problem = self.problem or e.strerror or str(e)


class Outputs(Closing):
    """The outputs of one command, by option; a context manager.

    :param wanted: option -> path; None if the user does not ask for this output.
    :param keep: as in ``Output``. :param private: the options whose files are private.
    :raises UsageError: an output cannot be opened; the others have been closed.
    """

    def __init__(
        self, wanted: Mapping[str, str | None], *, keep: bool = False, private: Collection[str] = ()
    ) -> None:
        self._all: dict[str, Output] = {}
        self._told = False
        try:
            for option, path in wanted.items():
                if path is not None:
                    self._all[option] = Output(option, path, keep=keep, private=option in private)
        except BaseException:
            self.close()
            raise

    def __contains__(self, option: str) -> bool:
        return option in self._all

    def __getitem__(self, option: str) -> Output:
        return self._all[option]

    def filenos(self) -> list[int]:
        """The descriptors of all outputs, which stay theirs."""
        return [output.fileno() for output in self._all.values()]

    def leave_files(self) -> None:
        """Have ``close`` remove no files: the process from which this one was forked does so."""
        for output in self._all.values():
            output.leave_file()

    def write(self, option: str, text: str) -> None:
        """Make ``text`` the content of an output, if the user asks for it. A failure is reported by
        ``close``, so that the other outputs are written nevertheless.
        """
        try:
            self._all[option].replace(text.encode(errors="replace"))
        except OSError:
            pass  # ``problem`` has the reason

    def status(self, status: int) -> int:
        """Close; returns the command's exit status, which is not 0 if a result is lost.

        :param status: the exit status if nothing is lost.
        """
        self.close()
        lost = any(output.problem or output.cut for output in self._all.values())
        return HostError.exit_code if lost and not status else status

    def close(self) -> None:
        """Close all outputs, and report what is lost. A second call does nothing."""
        for output in self._all.values():
            output.close()
        if not self._told:
            self._told = True
            for output in self._all.values():
                if output.problem:
                    lost = f"{output.option} {output.path} is lost: {output.problem}"
                    print(f"pyvmm: {lost}", file=sys.stderr)
                elif output.cut:
                    cut = f"{output.option} {output.path} is not whole: {output.cut}"
                    print(f"pyvmm: {cut}", file=sys.stderr)
