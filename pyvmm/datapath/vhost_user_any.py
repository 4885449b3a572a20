"""The virtqueues and the configuration of a device that a vhost-user back-end serves, whatever kind
of device it is.
"""

from __future__ import annotations

import threading

from pyvmm.datapath.base import HandOverTimes
from pyvmm.errors import VhostUserError
from pyvmm.spec import virtio
from pyvmm.spec.vhost_user import (
    VHOST_USER_PROTOCOL_F_CONFIG,
    VHOST_USER_PROTOCOL_F_INFLIGHT_SHMFD,
    VHOST_USER_PROTOCOL_F_RESET_DEVICE,
    VHOST_USER_PROTOCOL_F_STATUS,
)
from pyvmm.vhostuser.device import VhostUserDevice
from pyvmm.vhostuser.session import PROTOCOL_FEATURES, Refused

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from pyvmm.errors import PyvmmError
    from pyvmm.vhostuser.connect import Connector
    from pyvmm.vhostuser.session import Session

#: Features of the transport (virtio 1.2, 6) that need nothing but the back-end's consent.
TRANSPORT = (
    virtio.VIRTIO_RING_F_INDIRECT_DESC,
    virtio.VIRTIO_RING_F_EVENT_IDX,
    virtio.VIRTIO_F_VERSION_1,
    virtio.VIRTIO_F_RING_PACKED,
    virtio.VIRTIO_F_IN_ORDER,
)
#: The features of a kind of device have bits 0 to 23, and 50 and up (2.2).
DEVICE_BITS = (1 << 24) - 1 | ((1 << 64) - 1) >> 50 << 50
DATA_MASK = DEVICE_BITS | sum(1 << bit for bit in TRANSPORT)
#: The device's own resets are not the back-end's: virtqueues are stopped for a pause, too, and what
#: a back-end holds for the guest, such as open files, is to outlast the pause.
PROTOCOL_MASK = PROTOCOL_FEATURES & ~(
    1 << VHOST_USER_PROTOCOL_F_RESET_DEVICE | 1 << VHOST_USER_PROTOCOL_F_STATUS
)


class VhostUserAny(VhostUserDevice):
    """Implements ``RingServer`` (datapath.base). ``connect`` comes before everything else.

    :param connector: makes connections to the back-end; owned from here on.
    :param queues: virtqueues that the back-end must serve.
    :param config_size: bytes of the configuration, at most VHOST_USER_MAX_CONFIG_SIZE.
    :param own_config: the configuration, if it is not the back-end's.
    :param recorder: a ``kvm.recorder.Scope`` for every message, or None.
    :ivar gone: called when the back-end has gone; any thread, must not wait.
    :ivar config: as the back-end has last told it.
    """

    name = "vhost-user"
    times: HandOverTimes
    data_features = DATA_MASK

    def __init__(
        self,
        connector: Connector,
        *,
        queues: int,
        config_size: int = 0,
        own_config: bytes | None = None,
        timeout: float = 5.0,
        recorder: Any = None,
    ) -> None:
        self._queues = queues
        self._asks = own_config is None and config_size > 0
        self.protocol_features = PROTOCOL_MASK
        if self._asks:
            self.protocol_features |= 1 << VHOST_USER_PROTOCOL_F_CONFIG
        self.config = own_config if own_config is not None else bytes(config_size)
        self.gone: Callable[[], None] = lambda: None
        self._changed: Callable[[bytes], None] | None = None
        self._telling = threading.Lock()  # held while ``config`` changes and is told
        super().__init__(connector, queues, HandOverTimes(), timeout=timeout, recorder=recorder)

    def watch(self, changed: Callable[[bytes], None]) -> None:
        """Tell ``changed`` of each other configuration from now on, and at once if there has been
        one since ``connect``. Any thread calls it, which must not wait.
        """
        with self._telling:
            self._changed = changed
            changed(self.config)

    @property
    def config_writable(self) -> bool:
        """Whether there is a back-end to which a driver's writes to the configuration can go."""
        return self._asks

    # --- VhostUserDevice --------------------------------------------------------------------------

    def negotiate(self, s: Session) -> None:
        """Also read the configuration, which may be another one after a reconnection."""
        super().negotiate(s)
        if self._asks:
            with s.conversation(self.timeout):
                self.reconfigured(s)

    def check_offer(self, s: Session) -> None:
        """:raises VhostUserError: the back-end has too few virtqueues, or no configuration."""
        where = f"the back-end at {s.name}"
        if s.queue_num is not None and s.queue_num < self._queues:
            raise VhostUserError(
                f"{where} has {s.queue_num} virtqueues, not {self._queues}", "use fewer queues="
            )
        if self._asks and not s.has(VHOST_USER_PROTOCOL_F_CONFIG):
            raise VhostUserError(
                f"{where} has no configuration (protocol feature CONFIG)",
                "use a back-end that has; a file system may have tag= instead",
            )

    def reconfigured(self, s: Session) -> None:
        """Read the configuration, and tell if it is another one."""
        try:
            config = s.get_config(len(self.config))
        except Refused as e:
            raise VhostUserError(e.cause, "give its size: config-size=") from e
        with self._telling:
            if config != self.config:
                self.config = config
                if self._changed is not None:
                    self._changed(config)

    def went(self, reason: PyvmmError) -> None:
        """Pass it on."""
        self.gone()

    # --- RingServer -------------------------------------------------------------------------------

    def features(self) -> int:
        """The features that the back-end honours. A packed virtqueue whose back-end keeps no notes
        could not be given to the next back-end.
        """
        features = super().features()
        s = self._watcher.session
        if s is None or not s.has(VHOST_USER_PROTOCOL_F_INFLIGHT_SHMFD):
            features &= ~(1 << virtio.VIRTIO_F_RING_PACKED)
        return features

    def stop(self, *, finish: bool = False, patience: float | None = None) -> list[int]:
        """Take the rings back. A back-end that does not give them is cut off; then the used indices
        are the positions.
        """
        return super().stop(patience=patience)

    def write_config(self, offset: int, data: bytes) -> None:
        """The driver has written to the configuration.

        :raises Refused: the back-end does not take it. :raises PyvmmError: the session is lost.
        """
        self.converse(lambda s: s.set_config(offset, data))
