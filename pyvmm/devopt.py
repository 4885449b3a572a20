"""How users describe a device that is no network card: ``--device vhost-user,key=value...``, in
Python ``pyvmm.Device("vhost-user", id="rng", socket="/run/rng.sock")``.
"""

from __future__ import annotations

import os

from pyvmm.errors import UsageError, VhostUserError, did_you_mean
from pyvmm.fd import Fd
from pyvmm.netopt import UID_MAX, number
from pyvmm.spec import virtio, virtio_config
from pyvmm.spec.vhost_user import VHOST_USER_MAX_CONFIG_SIZE

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from pyvmm.datapath.base import RingServer
    from pyvmm.errors import PyvmmError
    from pyvmm.host.child import ChildConnector
    from pyvmm.vhostuser.connect import Connector

if TYPE_CHECKING:
    #: User id and group id.
    User = tuple[int, int]

#: As many virtqueues as a device may have.
MAX_QUEUES = 64
QUEUE_SIZE_MAX = 1024
#: The highest id that a modern device's PCI id can tell (0x1040 + id).
ID_MAX = 0xFFFF - 0x1040


class Kind:
    """A kind of virtio device.

    :ivar id: its number (virtio 1.2, 5). :ivar queues: how many virtqueues it has, unless the user
        says otherwise. :ivar config_size: bytes of its configuration.
    :ivar fields: of the configuration, by offset. :ivar class_code: of PCI.
    """

    __slots__ = ("class_code", "config_size", "fields", "id", "name", "queues")

    def __init__(
        self,
        name: str,
        number: int,
        queues: int,
        config_size: int,
        fields: Mapping[int, str],
        class_code: int,
    ) -> None:
        self.name, self.id, self.queues, self.config_size = name, number, queues, config_size
        self.fields, self.class_code = fields, class_code


#: PCI class "does not fit in any defined class".
OTHERS = 0xFF0000
KINDS = {
    kind.name: kind
    for kind in (
        Kind(
            "block",
            virtio.VIRTIO_ID_BLOCK,
            1,
            virtio_config.BLOCK_SIZE,
            virtio_config.BLOCK,
            0x010000,
        ),
        Kind(
            "console",
            virtio.VIRTIO_ID_CONSOLE,
            2,
            virtio_config.CONSOLE_SIZE,
            virtio_config.CONSOLE,
            0x078000,
        ),
        Kind("rng", virtio.VIRTIO_ID_RNG, 1, 0, {}, OTHERS),
        Kind(
            "scsi", virtio.VIRTIO_ID_SCSI, 3, virtio_config.SCSI_SIZE, virtio_config.SCSI, 0x010000
        ),
        Kind(
            "vsock",
            virtio.VIRTIO_ID_VSOCK,
            3,
            virtio_config.VSOCK_SIZE,
            virtio_config.VSOCK,
            0x078000,
        ),
        Kind(
            "sound",
            virtio.VIRTIO_ID_SOUND,
            4,
            virtio_config.SOUND_SIZE,
            virtio_config.SOUND,
            0x040100,
        ),
        Kind("fs", virtio.VIRTIO_ID_FS, 2, virtio_config.FS_SIZE, virtio_config.FS, 0x018000),
        Kind("scmi", virtio.VIRTIO_ID_SCMI, 2, 0, {}, OTHERS),
        Kind("i2c", virtio.VIRTIO_ID_I2C_ADAPTER, 1, 0, {}, OTHERS),
        Kind("gpio", virtio.VIRTIO_ID_GPIO, 2, virtio_config.GPIO_SIZE, virtio_config.GPIO, OTHERS),
    )
}
KEYS = (
    "id",
    "socket",
    "queues",
    "queue-size",
    "config-size",
    "tag",
    "notify",
    "server",
    "peer",
)


class Device:
    """A device whose virtqueues a vhost-user back-end serves, as the user describes it.

    :param mode: ``vhost-user``.
    :param id: the kind of device: a name of ``KINDS``, or the number of the specification.
    :param socket: where the back-end listens.
    :param queues: virtqueues in all. By default what the kind has.
    :param queue_size: entries per virtqueue, a power of two up to 1024.
    :param config_size: bytes of the configuration that the back-end has, up to 256. By default what
        the kind has.
    :param tag: of a file system, by which the guest mounts it, up to 36 bytes. Without it, the
        back-end must have one.
    :param notify: ``ioeventfd``, or ``exit``: each kick is an exit of the vCPU.
    :param server: ``on`` if the back-end connects and pyvmm listens, else ``off``.
    :param peer: user id of the back-end; without it, root's or pyvmm's own.
    :raises UsageError: a value is not allowed, or two do not go together.
    """

    #: Seconds for a whole conversation with the back-end, such as a start or a stop.
    timeout = 5.0
    #: Processes and threads at most: ours that speak for it, and its back-end if we start that.
    tasks = 16
    #: Bytes that its back-end takes of its own, if we start that and it takes many.
    memory = 0
    #: Whether the guest can neither go on nor end in order without the device.
    vital = False

    def __init__(
        self,
        mode: str = "vhost-user",
        *,
        id: str | int,
        socket: str,
        queues: int | str | None = None,
        queue_size: int | str = 256,
        config_size: int | str | None = None,
        tag: str | None = None,
        notify: str = "ioeventfd",
        server: str = "off",
        peer: int | str | None = None,
    ) -> None:
        if mode != "vhost-user":
            raise UsageError(f"--device {mode}", "the only kind of device is vhost-user")
        if notify not in ("ioeventfd", "exit"):
            raise UsageError(f"--device: notify={notify}", "use notify=ioeventfd or notify=exit")
        if server not in ("on", "off"):
            raise UsageError(f"--device: server={server}", "use server=on or server=off")
        if not socket:
            raise UsageError("--device: socket=", "name the socket of the back-end")
        self.kind = _kind(id)
        if tag is not None and self.kind.id != virtio.VIRTIO_ID_FS:
            raise UsageError(f"--device: tag={tag} for id={id}", "only a file system (fs) has one")
        if tag is not None and not 0 < len(tag.encode()) <= virtio_config.FS_TAG_SIZE:
            raise UsageError(f"--device: tag={tag}", "use 1 to 36 bytes")
        self.socket, self.server, self.tag, self.notify = socket, server == "on", tag, notify
        self.queues = (
            number("queues", queues, 1, MAX_QUEUES, option="--device")
            if queues is not None
            else self.kind.queues
        )
        if self.kind.id == virtio.VIRTIO_ID_FS and self.queues < 2:
            raise UsageError(
                f"--device: queues={queues} for id=fs",
                "use 2 or more: the first is for urgent ones",
            )
        if not self.queues:
            raise UsageError(f"--device: id={id} without queues=", "say how many virtqueues it has")
        self.queue_size = number("queue-size", queue_size, 2, QUEUE_SIZE_MAX, option="--device")
        if self.queue_size & (self.queue_size - 1):
            raise UsageError(f"--device: queue-size={queue_size}", "use a power of two")
        most = VHOST_USER_MAX_CONFIG_SIZE
        self.config_size = (
            number("config-size", config_size, 0, most, option="--device")
            if config_size is not None
            else self.kind.config_size
        )
        self.peer = (
            number("peer", peer, 0, UID_MAX, option="--device") if peer is not None else None
        )

    @classmethod
    def parse(cls, text: str) -> Device:
        """Parse ``vhost-user,key=value...`` as on the command line."""
        mode, _, rest = text.partition(",")
        given: dict[str, str] = {}
        for item in filter(None, rest.split(",")):
            key, equals, value = item.partition("=")
            if key not in KEYS or not equals:
                raise UsageError(
                    f"--device {mode}: unknown key {key!r}",
                    f"{did_you_mean(key, KEYS)}keys: {', '.join(KEYS)}",
                )
            name = key.replace("-", "_")
            if name in given:
                raise UsageError(f"--device {mode}: {key} is given twice", "give it once")
            given[name] = value
        for key in ("id", "socket"):
            if key not in given:
                raise UsageError(
                    f"--device {text!r} without {key}=",
                    "for example: --device vhost-user,id=rng,socket=/run/rng.sock",
                )
        return cls(mode, **given)

    def connector(self) -> Connector:
        """Makes connections to the back-end; the caller owns it.

        :raises VhostUserError: the socket cannot be had.
        """
        from pyvmm.vhostuser.connect import Connector, ListeningConnector

        kind = ListeningConnector if self.server else Connector
        return kind(self.socket, self.peer)

    def begin(self) -> None:
        """Called before the machine is made: start what takes long until ``connector`` needs it."""

    def abandon(self) -> None:
        """Called in the end: release what was begun, and not taken by ``connector``."""

    def detach(self, user: User) -> list[int]:
        """Called before ``begin`` if another process will begin, which has none of the host's files
        (docs/jail.md): open what the back-end serves. Returns descriptors that the process needs;
        the device owns them until ``attached``.

        :param user: the other process's.
        :raises OSError: the kernel or a sandbox does not allow this, or a file has been replaced.
        :raises PyvmmError: the user may not have it.
        """
        return []

    def needs(self) -> list[str]:
        """The files that the other process needs besides, to read."""
        return []

    def attached(self) -> None:
        """Close the descriptors of ``detach``, if there are any."""

    def substitute(self) -> RingServer | None:
        """What serves the virtqueues once the back-end has gone, if none can take its place; owned
        by the caller. None: wait for the next back-end.
        """
        return None

    def failure(self, error: VhostUserError) -> PyvmmError:
        """What to raise if the first conversation with the back-end fails."""
        return error

    def lament(self, problems: Sequence[str]) -> PyvmmError:
        """Says why the back-end has gone for good. :param problems: of its connections."""
        return VhostUserError(f"{self.socket}: {problems[-1] if problems else 'gone'}")

    def own_config(self) -> bytes | None:
        """The device's configuration, if it is not the back-end's."""
        if self.tag is None:
            return None
        tag = self.tag.encode().ljust(virtio_config.FS_TAG_SIZE, b"\0")
        return tag + (self.queues - 1).to_bytes(4, "little")


class StartedDevice(Device):
    """A device whose back-end we start ourselves."""

    #: Seconds: on a busy host it takes long to start, and a disk that has much to write is not
    #: silent.
    timeout = 30.0
    _begun: ChildConnector | None = None
    _connector: ChildConnector | None = None
    #: What the back-end serves; None if the back-end finds that by paths.
    _mount: Fd | None = None

    def start_backend(self) -> ChildConnector:
        """Start the back-end; the caller owns what is returned.

        :raises PyvmmError: there is none, or it cannot be started.
        """
        raise NotImplementedError

    def open_mount(self, user: User) -> int:
        """Open what the back-end serves, as a mount (``isolate.detach``); the caller owns the
        descriptor. For the parameter and the errors see ``detach``.
        """
        raise NotImplementedError

    def detach(self, user: User) -> list[int]:
        """Open what the back-end serves."""
        self.attached()
        self._mount = Fd(self.open_mount(user))
        return [self.mount]

    @property
    def mount(self) -> int:
        """The descriptor of ``detach``; -1 if there is none."""
        return -1 if self._mount is None else self._mount.fileno()

    def attached(self) -> None:
        """Close the descriptor of ``detach``."""
        mount, self._mount = self._mount, None
        if mount is not None:
            mount.close()

    def begin(self) -> None:
        """Start the back-end, which gets ready while the caller does other things."""
        self.abandon()
        try:
            self._begun = self.start_backend()
        finally:
            self.attached()

    def connector(self) -> Connector:
        """Connects once to the back-end: that of ``begin``, or another one, which it starts."""
        self._connector, self._begun = self._begun or self.start_backend(), None
        return self._connector

    def abandon(self) -> None:
        """End the back-end of ``begin``."""
        begun, self._begun = self._begun, None
        if begun is not None:
            begun.close()


def real_path(name: str, jailed: User | None) -> str:
    """The path of a file or directory that a back-end serves, without symbolic links.

    :param jailed: the user of the jail for which root opens it; None: there is no jail.
    :raises UsageError: in a jail, a link on the way is not root's alone (``links.walk``).
    :raises OSError: there is no such place.
    """
    if jailed is None:
        return os.path.realpath(name)
    from pyvmm.hostnet.links import follow

    return follow(name)


def _kind(text: str | int) -> Kind:
    """The kind of device of a name or number. :raises UsageError: there is none."""
    names = ", ".join(f"{kind.name}={kind.id}" for kind in KINDS.values())
    if isinstance(text, str) and text in KINDS:
        return KINDS[text]
    if str(text).isascii() and str(text).isdecimal():
        found = number("id", text, 1, ID_MAX, option="--device")
        if found == virtio.VIRTIO_ID_NET:
            raise UsageError(f"--device: id={text}", "a network card is --net vhost-user,socket=")
        known = next((kind for kind in KINDS.values() if kind.id == found), None)
        return known or Kind(str(found), found, 0, 0, {}, OTHERS)
    if text == "net":
        raise UsageError("--device: id=net", "a network card is --net vhost-user,socket=")
    raise UsageError(
        f"--device: id={text}",
        f"{did_you_mean(str(text), KINDS)}a number of the specification, or {names}",
    )
