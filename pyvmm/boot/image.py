"""One kernel or initrd file. It is opened once and read by position; every error names the file."""

from __future__ import annotations

import os
import stat

from pyvmm import helper
from pyvmm.errors import ImageError
from pyvmm.fd import Closing

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pyvmm.memory import GuestMemory

HINTS = {
    "kernel": "give --kernel a bzImage, an x86-64 ELF or a multiboot kernel,"
    " or leave it out for the built image",
    "initrd": "give --initrd a cpio archive, or leave it out",
}


class ImageFile(Closing):
    """An open regular file. The object owns the descriptor; as a context manager it closes it.

    :param what: ``kernel`` or ``initrd``, for messages.
    :ivar size: the file's length in bytes, at least 1.
    :raises ImageError: the file is missing, unreadable, empty or not a regular file.
    """

    __slots__ = ("fd", "path", "size", "what")

    def __init__(self, path: str, what: str) -> None:
        self.path, self.what = path, what
        self.fd = -1
        try:
            fd = helper.open_to_read(path)
        except (OSError, ValueError) as e:
            cause = (e.strerror or str(e)) if isinstance(e, OSError) else str(e)
            raise self.bad(f"cannot be opened: {cause}") from e
        try:
            status = os.fstat(fd)
            if not stat.S_ISREG(status.st_mode):
                is_dir = stat.S_ISDIR(status.st_mode)
                if stat.S_ISFIFO(status.st_mode):
                    raise self.bad(
                        "is a pipe, not a regular file", "write it to a file, or use `pyvmm run`"
                    )
                raise self.bad("is a directory" if is_dir else "is not a regular file")
            if not status.st_size:
                raise self.bad("is empty")
        except BaseException:
            os.close(fd)
            raise
        self.fd, self.size = fd, status.st_size

    def bad(self, cause: str, hint: str = "") -> ImageError:
        """Make the error to raise.

        :param cause: follows the file's name in the message, so it begins with a verb.
        :param hint: the remedy; by default it says which files can be used.
        """
        return ImageError(f"{self.what} {self.path!r} {cause}", hint or HINTS[self.what])

    def read(self, offset: int, length: int, field: str) -> bytes:
        """Read exactly ``length`` bytes at ``offset``.

        :param field: names these bytes in the error.
        :raises ImageError: the file ends earlier or cannot be read.
        """
        if offset + length > self.size:
            raise self.truncated(field, offset + length)
        try:
            data = os.pread(self.fd, length, offset)
        except OSError as e:
            raise self.bad(f"cannot be read: {e.strerror}", "check the disk it is on") from e
        if len(data) != length:
            raise self.truncated(field, offset + length)
        return data

    def load(self, memory: GuestMemory, gpa: int, offset: int, length: int, field: str) -> None:
        """Read [offset, offset + length) of the file straight into guest memory at ``gpa``.

        :param field: names these bytes in the error.
        :raises ImageError: the file ends earlier or cannot be read.
        """
        try:
            done = memory.read_file(gpa, self.fd, offset, length)
        except OSError as e:
            raise self.bad(f"cannot be read: {e.strerror}", "check the disk it is on") from e
        if done != length:
            raise self.truncated(field, offset + length)

    def truncated(self, field: str, end: int) -> ImageError:
        """Make the error for a file that ends inside ``field``, which reaches to byte ``end``."""
        return self.bad(
            f"is truncated: {field} ends at byte {end:#x}, but the file at {self.size:#x}",
            "copy or build it again",
        )

    def close(self) -> None:
        """Release the descriptor; a second call does nothing."""
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)
