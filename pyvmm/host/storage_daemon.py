"""qemu-storage-daemon, which serves a disk image of the host to a guest, as a child process:
started, confined and ended by us.

Theory of operation. The child (``host.child``) is executed in namespaces whose root directory has
little else than the image (``hostnet.isolate.enclose``), and, if the user says so, the files of its
backing chain, which ``layers`` finds before. So an image whose contents name other files, which a
guest may have written, leads nowhere. In a jail, which has none of these files, they come as a
mount that root has made outside (``look_as``). The child does not end when its connection
does. It has one end of a pipe, for which it gets SIGTERM once the other end, which only this
process has, is closed: also if this process is killed. On SIGTERM it writes what it has in memory,
and ends.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
from stat import S_ISBLK, S_ISDIR, S_ISREG

from pyvmm import helper
from pyvmm.errors import DiskError
from pyvmm.host import qcow2
from pyvmm.host.child import ChildConnector
from pyvmm.hostnet import isolate
from pyvmm.hostnet.userns import acting_as
from pyvmm.programs import install
from pyvmm.vhostuser.wire import readable

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Any

    from pyvmm.devopt import User

NAME = "qemu-storage-daemon"
PLACES = (f"/usr/bin/{NAME}", f"/usr/local/bin/{NAME}")
#: By the release of Debian: the package that has the program. Both releases have both packages.
PACKAGES = {13: "qemu-utils", 12: "qemu-system-common"}
#: What image and overlay are called in the child's root directory. A backing file has the image's
#: name with its number in the chain.
IMAGE, OVERLAY = "image", "overlay"
#: The most files of a chain: each costs a descriptor, and time for each look.
LAYERS_MAX = 100
#: Processes and threads: one per request under way up to 64, the main thread, that of RCU.
TASKS = 64 + 2
#: Bytes that a daemon takes for itself and its threads; and for the tables of each qcow2 image, of
#: which it keeps 32 MiB, and 4 clusters of at most 2 MiB (docs/qcow2-cache.txt of QEMU).
MEMORY, MEMORY_PER_QCOW2 = 16 << 20, (32 + 4 * 2) << 20


def find() -> str:
    """The path of this machine's qemu-storage-daemon. :raises DiskError: there is none."""
    for path in PLACES:
        if os.access(path, os.X_OK):
            return path
    raise DiskError(
        f"a disk can be served only by {NAME}, which is missing",
        f"{install(PACKAGES[13])}, or {PACKAGES[12]} on Debian 12",
    )


def place(number: int) -> str:
    """What the image ``number`` of a chain is called in the child's root directory."""
    return f"{IMAGE}{number or ''}"


def _node(
    form: str, name: str, *, device: bool, writable: bool, backing: str | None
) -> dict[str, Any]:
    """The node of one image; its backing file is the node ``backing``, whatever the image says. (A
    description in the place of a node's name would be merged with what the image says, unless it
    has the key file.filename: bdrv_open_backing_file() of QEMU.)
    """
    node: dict[str, Any] = {
        "driver": form,
        "read-only": not writable,
        "discard": "unmap",
        "file": {
            "driver": "host_device" if device else "file",
            "filename": f"/{name}",
            "read-only": not writable,
            "discard": "unmap",
        },
    }
    if form == "qcow2":
        node["backing"] = backing
    else:  # raw alone, unlike qcow2, lets others write to the image, too
        node["file"] = {
            "driver": "blkdebug",
            "unshare-child-perms": ["write", "resize"],
            "read-only": not writable,
            "discard": "unmap",
            "image": node["file"],
        }
    return node


def nodes(
    form: str, *, device: bool, writable: bool, snapshot: bool, below: Sequence[str] = ()
) -> list[dict[str, Any]]:
    """The block nodes, in the order of ``--blockdev``; the last one is the disk. No node takes the
    name of a file from an image.

    :param form: ``raw`` or ``qcow2``. :param device: the image is a block device.
    :param below: the formats of its backing file, of that one's backing file, and so on.
    """
    made: list[dict[str, Any]] = []
    backing: str | None = None
    for number, one in reversed(list(enumerate(below, start=1))):
        node = _node(one, place(number), device=False, writable=False, backing=backing)
        backing = place(number)
        made.append({"node-name": backing, **node})
    top = _node(form, place(0), device=device, writable=writable, backing=backing)
    if snapshot:
        top = {
            "driver": "qcow2",
            "cache": {"no-flush": True},
            "discard": "unmap",
            "file": {"driver": "file", "filename": f"/{OVERLAY}", "discard": "unmap"},
            "backing": top,
        }
    return [*made, {"node-name": "disk", **top}]


def memory(chain: Sequence[Layer], *, snapshot: bool) -> int:
    """About how many bytes a daemon takes, besides the guest's memory and what it reads from files.
    With compressed clusters, there are more.

    :param chain: the images. :param snapshot: there is an overlay, too.
    """
    count = sum(layer.form == "qcow2" for layer in chain) + snapshot
    return MEMORY + MEMORY_PER_QCOW2 * count


def look_as(
    user: User, path: str, look: Callable[[int], list[Layer]], take: bool | None = None
) -> tuple[list[Layer], int]:
    """The images of a disk, as another user may open them; and, for a daemon of that user, which
    has no such files, a mount that has them, for ``isolate.enclose``. A child does all this: to
    become another user, even for a while, would leave this process less protected than it was, and
    what is taken is what was looked at, by descriptors.

    :param path: of the disk's own image, without symbolic links.
    :param look: calls ``layers`` with this descriptor as ``at``; with the user's rights.
    :param take: make the mount; whether it has an overlay. None: do not.
    :returns: the images, without path and facts; the mount, owned by the caller, or -1.
    :raises OSError: the image has been replaced; or as ``isolate.collect``.
    :raises DiskError: the disk is too large for a snapshot, or there is no place for one; or from
        ``look``.
    """

    def inside() -> tuple[list[str], list[int]]:
        if take is not None:
            isolate.own_mounts()
        at = isolate.open_found(path)
        with acting_as(user):
            chain = look(at)
        words = [word for one in chain for word in (one.form, "device" if one.device else "")]
        return words, [] if take is None else [_collect(chain, user, snapshot=take)]

    words, fds = helper.in_child(inside, "the child that looks at a disk")
    found = [
        Layer("", form, None, device=bool(device))
        for form, device in zip(words[::2], words[1::2], strict=True)
    ]
    return found, fds[0] if fds else -1


def _collect(chain: Sequence[Layer], user: User, *, snapshot: bool) -> int:
    made = _made(chain) if snapshot else {}
    for where, _ in made.values():
        if not os.path.isdir(where):
            raise DiskError(
                f"{chain[0].path}: no directory {where} for a snapshot", "set TMPDIR to another one"
            )
    files = {}
    for number, layer in enumerate(chain):
        assert layer.image is not None
        files[place(number)] = layer.image.place, layer.image.writable
    devices = [place(number) for number, layer in enumerate(chain) if layer.device]
    return isolate.collect(files, made, owner=user, devices=devices)


def _files(chain: Sequence[Layer], *, writable: bool) -> dict[str, tuple[str, bool]]:
    """What the child's root directory has of the host, for ``isolate.enclose``."""
    return {place(n): (layer.path, writable and not n) for n, layer in enumerate(chain)}


def _made(chain: Sequence[Layer]) -> dict[str, tuple[str, bytes]]:
    """What the guest writes to with ``snapshot=on``, for ``isolate.enclose``.

    :raises DiskError: the disk is too large.
    """
    top, facts = chain[0], chain[0].image
    assert facts is not None
    size = qcow2.virtual_size(facts.head) if top.form == "qcow2" else facts.size
    if size > qcow2.SIZE_MAX:
        what, remedy = qcow2.too_large(size)
        raise DiskError(f"{top.path} {what}", remedy)
    scratch = os.environ.get("TMPDIR", "")
    where = scratch if scratch.startswith("/") else "/var/tmp"
    return {OVERLAY: (where, qcow2.empty(-(-size // 512) * 512))}


class DiskConnector(ChildConnector):
    """Starts a qemu-storage-daemon and makes the one connection to it.

    :param path: of the disk's image, for messages.
    :param chain: the disk's image, its backing file, and so on.
    :param snapshot: what the guest writes goes to a file that ends with the child.
    :param collected: their mount, lent, if this process has no such files (``look_as``); else -1.
    :raises DiskError: there is no qemu-storage-daemon, or it cannot be started.
    """

    #: The child may have much to write.
    end_s = 10.0

    def __init__(
        self,
        path: str,
        chain: Sequence[Layer],
        *,
        writable: bool,
        snapshot: bool,
        collected: int = -1,
    ) -> None:
        super().__init__(NAME, path, DiskError)
        program = find()
        may = writable and not snapshot
        files = _files(chain, writable=may)
        made: dict[str, tuple[str, bytes]] = {}
        if snapshot:
            made = _made(chain) if collected < 0 else {OVERLAY: ("", b"")}
        graph = nodes(
            chain[0].form,
            device=chain[0].device,
            writable=may,
            snapshot=snapshot,
            below=[layer.form for layer in chain[1:]],
        )
        user = os.geteuid()
        owned = user != 0 or all(one.image is not None and one.image.owner == user for one in chain)
        leash, self._leash = os.pipe2(os.O_CLOEXEC)

        def argv(fd: int) -> list[str]:
            export = {
                "type": "vhost-user-blk",
                "id": "export",
                "node-name": "disk",
                "addr": {"type": "fd", "str": str(fd)},
                "writable": writable,
            }
            blocks = [word for node in graph for word in ("--blockdev", json.dumps(node))]
            return [program, *blocks, "--export", json.dumps(export)]

        def confine() -> None:
            fcntl.fcntl(leash, fcntl.F_SETOWN, os.getpid())  # not allowed any more when enclosed
            fcntl.fcntl(leash, fcntl.F_SETSIG, signal.SIGTERM)
            fcntl.fcntl(leash, fcntl.F_SETFL, os.O_ASYNC)
            isolate.enclose(files, made, owned=owned, collected=collected)
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

    :param device: a block device is opened, too; else it has neither head nor size.
    :param at: a descriptor with O_PATH of the image, which need not be found by its path then.
    :param keep: leave such a descriptor open: ``place``, which nobody closes.
    :ivar head: its first bytes. :ivar size: in bytes. :ivar owner: user id.
    :ivar device: whether it is a block device. :ivar identity: device and inode of the file.
    :raises OSError: it may not be opened, or is neither a file nor a block device.
    """

    def __init__(
        self, path: str, *, writable: bool, device: bool = True, at: int = -1, keep: bool = False
    ) -> None:
        # Opening a device may have an effect: a watchdog starts. So its kind is looked at before,
        # and what is opened then is what was looked at.
        self.writable = writable
        self.place = place = at if at >= 0 else os.open(path, os.O_PATH | os.O_CLOEXEC)
        try:
            status = os.fstat(place)
            self.device, self.owner = S_ISBLK(status.st_mode), status.st_uid
            self.identity = identity(status)
            if writable and S_ISDIR(status.st_mode):
                raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
            if not self.device and not S_ISREG(status.st_mode):
                raise OSError(0, "it is neither a file nor a block device")
            self.head, self.size = b"", 0
            if self.device and not device:
                return
            flags = os.O_RDWR if writable else os.O_RDONLY
            fd = os.open(f"/proc/self/fd/{place}", flags | os.O_NONBLOCK | os.O_CLOEXEC)
        finally:
            if at < 0 and not keep:
                os.close(place)
        try:
            self.head = os.pread(fd, qcow2.HEAD_READ, 0)
            self.size = os.lseek(fd, 0, os.SEEK_END)
        finally:
            os.close(fd)


def identity(status: os.stat_result) -> tuple[int, int]:
    """Of a file, whatever it is called."""
    return status.st_dev, status.st_ino


class Layer:
    """An image of a chain.

    :ivar path: without symbolic links. :ivar form: ``raw`` or ``qcow2``. :ivar image: what is known
        of it. Path and facts are empty if a child has looked (``look_as``).
    :ivar device: whether it is a block device.
    """

    __slots__ = ("device", "form", "image", "path")

    def __init__(self, path: str, form: str, image: Image | None, *, device: bool) -> None:
        self.path, self.form, self.image, self.device = path, form, image, device


def layers(
    path: str,
    form: str,
    *,
    writable: bool,
    backing: bool,
    called: str = "",
    at: int = -1,
    whom: str = "",
) -> list[Layer]:
    """The images that a disk consists of: its own, and with ``backing`` its backing file, the
    backing file of that one, and so on.

    :param path, form: of the disk's own image, the path without symbolic links.
    :param called: what messages call it.
    :param at: see ``Image``; those of the backing files stay open, too.
    :param whom: who opens the images, for messages, if this process acts as another user.
    :raises OSError: it cannot be opened.
    :raises DiskError: an image may not be a part of a disk, or cannot be opened.
    """
    image = Image(path, writable=writable, at=at)
    chain, found = [Layer(path, form, image, device=image.device)], [image]
    called = called or path
    while chain[-1].form == "qcow2":
        what, remedy = qcow2.problem(image.head, backing=backing)
        if what:
            raise DiskError(f"{called} {what}", remedy)
        if not backing:
            break
        try:
            name, form = qcow2.backing_file(image.head)
        except ValueError:
            raise DiskError(
                f"{called} names a backing file in a place where no name can be", "make it anew"
            ) from None
        if not name:
            break
        what = f"{called} has the backing file {_shown(os.fsdecode(name))}"
        path, image = _next(path, name, form, what, keep=at >= 0, whom=whom)
        if any(other.identity == image.identity for other in found):
            raise DiskError(f"{what}, which is above it in the chain", "make the chain anew")
        if len(chain) >= LAYERS_MAX:
            raise DiskError(
                f"{what}, and a chain has at most {LAYERS_MAX} images",
                "shorten it: qemu-img rebase",
            )
        chain.append(Layer(path, form, image, device=False))
        found.append(image)
        called = f"the backing file {_shown(path)}"
    return chain


def _shown(name: str) -> str:
    """A name of somebody else's choice, on one line."""
    return repr(name)


def _next(
    above: str, name: bytes, form: str, what: str, *, keep: bool, whom: str
) -> tuple[str, Image]:
    """The path and the facts of the image that another one names.

    :param above: the path of that one. :param name, form: are of somebody else's choice.
    :param what: the two for messages. :param keep, whom: as for ``Image`` and ``layers``.
    """
    # QEMU takes a word with a colon before the first slash for a protocol (path_has_protocol).
    if b"\0" in name or b":" in name.partition(b"/")[0]:
        raise DiskError(f"{what}, which is no path", "only files of the host are taken")
    if form not in ("raw", "qcow2"):
        raise DiskError(
            f"{what}, whose format it {f'calls {form!r}' if form else 'does not say'}",
            "say raw or qcow2: qemu-img rebase -u -F FORMAT -b FILE IMAGE",
        )
    path = os.path.join(os.path.dirname(above), os.fsdecode(name))
    try:
        path = os.path.realpath(path)
        image = Image(path, writable=False, device=False, keep=keep)
    except OSError as e:
        way = " by chmod, with the directories above" if whom else ""
        problem = f"{what}: {_shown(path)}: {e.strerror}{whom}"
        raise DiskError(problem, f"put it there, or allow it{way}") from e
    if image.device:
        raise DiskError(f"{what}, which is a device", "only files are taken")
    return path, image
