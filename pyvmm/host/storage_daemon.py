"""qemu-storage-daemon, which serves a disk image of the host to a guest, as a child process:
started, confined and ended by us.

Theory of operation. The child (``host.child``) is executed in namespaces whose root directory has
little else than the image (``hostnet.isolate.enclose``). So an image whose contents name other
files, which a guest may have written, leads nowhere. The child does not end when its connection
does. It has one end of a pipe, for which it gets SIGTERM once the other end, which only this
process has, is closed: also if this process is killed. On SIGTERM it writes what it has in memory,
and ends.
"""

from __future__ import annotations

import fcntl
import json
import os
import signal
import stat

from pyvmm.errors import DiskError
from pyvmm.host import qcow2
from pyvmm.host.child import ChildConnector
from pyvmm.hostnet import isolate
from pyvmm.vhostuser.wire import readable

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

NAME = "qemu-storage-daemon"
PLACES = (f"/usr/bin/{NAME}", f"/usr/local/bin/{NAME}")
#: What image and overlay are called in the child's root directory.
IMAGE, OVERLAY = "image", "overlay"


def find() -> str:
    """The path of this machine's qemu-storage-daemon. :raises DiskError: there is none."""
    for path in PLACES:
        if os.access(path, os.X_OK):
            return path
    raise DiskError(
        f"a disk can be served only by {NAME}, which is missing",
        "as root: apt-get install --no-install-recommends qemu-system-common",
    )


def nodes(form: str, *, device: bool, writable: bool, snapshot: bool) -> dict[str, Any]:
    """The graph of block nodes, for ``--blockdev``. No node takes the name of a file from the
    image: ``backing`` replaces what the image says.

    :param form: ``raw`` or ``qcow2``. :param device: the image is a block device.
    """
    base: dict[str, Any] = {
        "driver": form,
        "read-only": not writable,
        "discard": "unmap",
        "file": {
            "driver": "host_device" if device else "file",
            "filename": f"/{IMAGE}",
            "read-only": not writable,
            "discard": "unmap",
        },
    }
    if form == "qcow2":
        base["backing"] = None
    else:  # raw alone, unlike qcow2, lets others write to the image, too
        base["file"] = {
            "driver": "blkdebug",
            "unshare-child-perms": ["write", "resize"],
            "read-only": not writable,
            "discard": "unmap",
            "image": base["file"],
        }
    if not snapshot:
        return {"node-name": "disk", **base}
    return {
        "node-name": "disk",
        "driver": "qcow2",
        "cache": {"no-flush": True},
        "discard": "unmap",
        "file": {"driver": "file", "filename": f"/{OVERLAY}", "discard": "unmap"},
        "backing": base,
    }


class DiskConnector(ChildConnector):
    """Starts a qemu-storage-daemon and makes the one connection to it.

    :param image: without symbolic links. :param form: ``raw`` or ``qcow2``.
    :param snapshot: what the guest writes goes to a file that ends with the child.
    :raises DiskError: there is no qemu-storage-daemon, or it cannot be started.
    """

    #: The child may have much to write.
    end_s = 10.0

    def __init__(self, image: str, form: str, *, writable: bool, snapshot: bool) -> None:
        super().__init__(NAME, image, DiskError)
        program = find()
        try:
            facts = Image(image, writable=writable and not snapshot)
        except OSError as e:
            raise DiskError(f"{image} cannot be opened: {e.strerror}") from e
        made: dict[str, tuple[str, bytes]] = {}
        if snapshot:
            size = qcow2.virtual_size(facts.head) if form == "qcow2" else facts.size
            if size > qcow2.SIZE_MAX:
                what, remedy = qcow2.too_large(size)
                raise DiskError(f"{image} {what}", remedy)
            scratch = os.environ.get("TMPDIR", "")
            where = scratch if scratch.startswith("/") else "/var/tmp"
            made[OVERLAY] = where, qcow2.empty(-(-size // 512) * 512)
        graph = nodes(
            form, device=facts.device, writable=writable and not snapshot, snapshot=snapshot
        )
        leash, self._leash = os.pipe2(os.O_CLOEXEC)

        def argv(fd: int) -> list[str]:
            export = {
                "type": "vhost-user-blk",
                "id": "export",
                "node-name": "disk",
                "addr": {"type": "fd", "str": str(fd)},
                "writable": writable,
            }
            return [program, "--blockdev", json.dumps(graph), "--export", json.dumps(export)]

        def confine() -> None:
            files = {IMAGE: (image, writable and not snapshot)}
            fcntl.fcntl(leash, fcntl.F_SETOWN, os.getpid())  # not allowed any more when enclosed
            fcntl.fcntl(leash, fcntl.F_SETSIG, signal.SIGTERM)
            fcntl.fcntl(leash, fcntl.F_SETFL, os.O_ASYNC)
            isolate.enclose(files, made, owned=facts.owner == os.geteuid())
            if readable([leash], 0):
                raise OSError("pyvmm has ended")

        try:
            self.start(argv, confine, {"LC_ALL": "C"}, [leash])
        except BaseException:
            self.hang_up()
            raise
        finally:
            os.close(leash)

    def hang_up(self) -> None:
        """Have the kernel send SIGTERM."""
        leash, self._leash = self._leash, -1
        if leash >= 0:
            os.close(leash)

    def end(self) -> str:
        """As ``ChildConnector.end``, without the options, which its messages quote."""
        how = super().end()
        if "Is another process using the image" in how or how.endswith(" lock"):
            return "another process uses it"
        head, quoted, reason = how.rpartition("}: ")
        return f"{head.partition(': ')[0]}: {reason}" if quoted else how


class Image:
    """What is known of an image before it is served.

    :ivar head: its first bytes. :ivar size: in bytes. :ivar owner: user id.
    :ivar device: whether it is a block device.
    :raises OSError: it may not be opened, or is neither a file nor a block device.
    """

    def __init__(self, path: str, *, writable: bool) -> None:
        flags = os.O_RDWR if writable else os.O_RDONLY
        fd = os.open(path, flags | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            status = os.fstat(fd)
            self.device, self.owner = stat.S_ISBLK(status.st_mode), status.st_uid
            if not self.device and not stat.S_ISREG(status.st_mode):
                raise OSError(0, "it is neither a file nor a block device")
            self.head = os.pread(fd, qcow2.HEAD_SIZE, 0)
            self.size = os.lseek(fd, 0, os.SEEK_END)
        finally:
            os.close(fd)
