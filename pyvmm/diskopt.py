"""How users describe a disk: ``--disk FILE[,key=value...]``, in Python
``pyvmm.Disk("image.qcow2", snapshot=True)``.
"""

from __future__ import annotations

import errno
import os

from pyvmm.devopt import StartedDevice, real_path
from pyvmm.errors import DiskError, UsageError, did_you_mean
from pyvmm.vhostuser.wire import Closed

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from pyvmm.datapath.base import RingServer
    from pyvmm.devopt import User
    from pyvmm.errors import PyvmmError, VhostUserError
    from pyvmm.host.storage_daemon import DiskConnector, Layer

FORMATS = ("qcow2", "raw")
KEYS = ("format", "ro", "snapshot", "backing", "notify")


class Disk(StartedDevice):
    """A disk image of the host, served by a qemu-storage-daemon that pyvmm starts, confines and
    ends.

    :param file: an image, or a block device. :param format: ``raw`` or ``qcow2``; without it, the
        name must end in .raw or .qcow2. The contents never decide, because a guest may have written
        them.
    :param readonly: the guest may only read. :param snapshot: what the guest writes is thrown away
        at the end.
    :param backing: the image may name a backing file, that one another, and so on; the guest can
        read all of them. They are looked for in the directory of the image that names them.
    :param notify: ``ioeventfd``, or ``exit``: each kick is an exit of the vCPU.
    :param jailed: the user of the jail for which root opens the image (docs/jail.md): that user
        looks at it.
    :ivar file: its path without symbolic links. :ivar directory: where it is.
    :raises UsageError: a value is not allowed, or two do not go together.
    :raises DiskError: there is no such image, or it is not one that can be served.
    """

    def __init__(
        self,
        file: str | os.PathLike[str],
        *,
        format: str | None = None,
        readonly: bool = False,
        snapshot: bool = False,
        backing: bool = False,
        notify: str = "ioeventfd",
        jailed: User | None = None,
    ) -> None:
        given = os.fspath(file)
        if not given or "\0" in given:
            raise UsageError(f"--disk {given!r}", "write FILE[,key=value...]")
        if format is None:
            format = next((name for name in FORMATS if given.endswith(f".{name}")), None)
            if format is None:
                raise UsageError(
                    f"--disk {given}: its name does not say what it is",
                    "add format=raw or format=qcow2 (the contents may be a guest's)",
                )
        if format not in FORMATS:
            raise UsageError(f"--disk {given}: format={format}", "use format=raw or format=qcow2")
        if readonly and snapshot:
            raise UsageError(
                f"--disk {given}: ro=on and snapshot=on", "leave one of them out: ro is enough"
            )
        if backing and format != "qcow2":
            raise UsageError(
                f"--disk {given}: backing=on and format={format}",
                "only qcow2 has backing files: leave it out",
            )
        if notify not in ("ioeventfd", "exit"):
            raise UsageError(
                f"--disk {given}: notify={notify}", "use notify=ioeventfd or notify=exit"
            )
        from pyvmm.host import storage_daemon

        self.format, self.writable, self.snapshot = format, not readonly, snapshot
        self.backing = backing
        called = f"--disk {given}"
        try:
            self.file = real_path(given, jailed)
        except OSError as e:
            raise DiskError(f"{called}: {e.strerror or e}", "name an image") from e
        self.directory = self.file.rpartition("/")[0] or "/"
        # What is found when the daemon starts counts. This look is for whoever waits for an answer:
        # before a machine is made, or a testbed starts.
        if jailed is None:
            chain = self._look(called)
        else:
            chain, _ = self._look_as(jailed, called)
        self.memory = storage_daemon.memory(chain, snapshot=snapshot)
        self.tasks = StartedDevice.tasks + storage_daemon.TASKS
        super().__init__(id="block", socket=self.file, notify=notify)

    def _look(self, called: str, at: int = -1, user: User | None = None) -> list[Layer]:
        """The images that the disk consists of.

        :param called: what messages call its own one. :param at: see ``storage_daemon.Image``.
        :param user: who this process is meanwhile, for messages.
        :raises DiskError: the image cannot be opened, or names other files.
        """
        from pyvmm.host.storage_daemon import layers

        writes = self.writable and not self.snapshot
        whom, way = ("", "chmod")
        if user is not None:
            whom, way = f" for user {user[0]}", f"chown {user[0]} or chmod"
        try:
            return layers(
                self.file,
                self.format,
                writable=writes,
                backing=self.backing,
                called=called,
                at=at,
                whom=whom,
            )
        except OSError as e:
            denied = e.errno == errno.EACCES
            remedy = f"allow it by {way}" if denied else "name an image"
            if writes and self._is_readable(at):
                remedy += ", or add ro=on or snapshot=on"
            raise DiskError(f"{called}: {e.strerror}{whom}", remedy) from e

    def _is_readable(self, at: int) -> bool:
        from pyvmm.host.storage_daemon import Image

        try:
            Image(self.file, writable=False, at=at)
        except OSError:
            return False
        return True

    def _look_as(
        self, user: User, called: str, *, take: bool | None = None
    ) -> tuple[list[Layer], int]:
        """As ``_look``, with the rights of another user. For the parameter and what is returned see
        ``storage_daemon.look_as``.
        """
        from pyvmm.host.storage_daemon import look_as

        return look_as(user, self.file, lambda at: self._look(called, at, user), take)

    @classmethod
    def parse(cls, text: str, jailed: User | None = None) -> Disk:
        """Parse ``FILE[,key=value...]`` as on the command line. In FILE, a comma is written
        twice.

        :param jailed: as for ``Disk``.
        """
        if "\0" in text:
            raise UsageError(f"--disk {text!r}", "write FILE[,key=value...]")
        file, *rest = text.replace(",,", "\0").split(",")
        given: dict[str, str] = {}
        for item in filter(None, rest):
            key, equals, value = item.partition("=")
            if key not in KEYS or not equals:
                raise UsageError(
                    f"--disk: unknown key {key!r}",
                    f"{did_you_mean(key, KEYS)}keys: {', '.join(KEYS)}; "
                    "a comma in a file's name is written twice",
                )
            if key in given:
                raise UsageError(f"--disk: {key} is given twice", "give it once")
            if key in ("ro", "snapshot", "backing") and value not in ("on", "off"):
                raise UsageError(f"--disk: {key}={value}", f"use {key}=on or {key}=off")
            given[key] = value
        return cls(
            file.replace("\0", ","),
            format=given.get("format"),
            readonly=given.get("ro") == "on",
            snapshot=given.get("snapshot") == "on",
            backing=given.get("backing") == "on",
            notify=given.get("notify", "ioeventfd"),
            jailed=jailed,
        )

    def start_backend(self) -> DiskConnector:
        """Start qemu-storage-daemon.

        :raises DiskError: there is no qemu-storage-daemon, or it cannot be started.
        """
        from pyvmm.host.storage_daemon import DiskConnector

        return DiskConnector(
            self.file,
            self._look(self.file) if self.mount < 0 else self._collected,
            writable=self.writable,
            snapshot=self.snapshot,
            collected=self.mount,
        )

    def open_mount(self, user: User) -> int:
        """Open the images, as the user may, and make what ``snapshot`` needs."""
        called = f"--disk {self.file}"
        self._collected, mount = self._look_as(user, called, take=self.snapshot)
        return mount

    def substitute(self) -> RingServer:
        """Answers the guest once qemu-storage-daemon has gone."""
        from pyvmm.virtio.dead_disk import DeadDisk

        return DeadDisk()

    def failure(self, error: VhostUserError) -> PyvmmError:
        """Says how qemu-storage-daemon has ended."""
        assert self._connector is not None
        how = self._connector.end() if isinstance(error, Closed) else error.cause
        return DiskError(
            f"{self.file} cannot be a disk: {how}", "stop what uses it, or name another image"
        )

    def lament(self, problems: Sequence[str]) -> PyvmmError:
        """Says how qemu-storage-daemon has ended."""
        assert self._connector is not None
        how = self._connector.end() or (problems[-1] if problems else "it has gone")
        return DiskError(
            f"the disk {self.file} has broken off: {how}; every access of the guest has failed"
            " with EIO since"
        )
