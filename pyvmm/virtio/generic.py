"""A virtio device of any kind, about which this process knows nothing but its number: another
process serves its virtqueues and has its configuration.
"""

from __future__ import annotations

from pyvmm.errors import PyvmmError
from pyvmm.spec.virtio import (
    VIRTIO_CONFIG_S_DRIVER,
    VIRTIO_F_NOTIFICATION_DATA,
    VIRTIO_F_RING_RESET,
    VIRTIO_F_VERSION_1,
)
from pyvmm.virtio.served import ServedDevice

TYPE_CHECKING = False
if TYPE_CHECKING:
    import threading
    from collections.abc import Callable, Mapping

    from pyvmm.datapath.base import RingServer
    from pyvmm.memory import GuestMemory
    from pyvmm.virtio.device import Jobs

#: Features that need nothing of the back-end. A kick's value may be anything: the address says
#: which virtqueue it is.
OWN = 1 << VIRTIO_F_VERSION_1 | 1 << VIRTIO_F_RING_RESET | 1 << VIRTIO_F_NOTIFICATION_DATA


class GenericDevice(ServedDevice):
    """A device of the kind ``device_id``.

    :param path: serves the virtqueues; owned from here on. :param features: that it honours.
    :param config: the device-specific configuration.
    :param fields: of the configuration, by offset, for the ledger.
    :param write_config: called in a job with an offset and bytes that the driver has written to the
        configuration; None if the driver may write nothing.
    :param problem: called with each problem that only a reset cures; any thread, must not wait.
    """

    def __init__(
        self,
        name: str,
        device_id: int,
        memory: GuestMemory,
        queue_sizes: list[int],
        path: RingServer,
        *,
        features: int,
        config: bytes,
        fields: Mapping[int, str],
        write_config: Callable[[int, bytes], None] | None = None,
        problem: Callable[[str], None] = lambda problem: None,
        jobs: Jobs | None = None,
        lock: threading.RLock | None = None,
    ) -> None:
        super().__init__(name, memory, queue_sizes, path, jobs=jobs, lock=lock)
        self.device_id = device_id
        self.config_names = dict(fields)
        self._features = features | OWN
        self._config = config
        self._write_config = write_config
        self._problem = problem
        #: Bytes that the driver has written and the back-end has not got yet, by offset; under the
        #: I/O lock. One job takes however many there are.
        self._written: dict[int, int] = {}

    def offered(self) -> int:
        """What the first back-end offered, and the device's own."""
        return self._features

    def problem_found(self, problem: str) -> None:
        """Pass it on."""
        self._problem(problem)

    def config_space(self) -> bytes:
        """As the back-end has last told it, with what the driver has written since."""
        return self._config

    def set_config(self, config: bytes) -> None:
        """The back-end has this configuration, of the same length. Any thread."""
        if config != self._config:
            self._config = config
            self.config_changed()

    def config_written(self, offset: int, data: bytes) -> bool:
        """The driver writes to the configuration; whether it may."""
        end = offset + len(data)
        if self._write_config is None or end > len(self._config):
            return False
        if not self.status & VIRTIO_CONFIG_S_DRIVER or self.stopping:
            return False
        self._config = self._config[:offset] + data + self._config[end:]
        waiting = bool(self._written)
        self._written.update(enumerate(data, offset))
        if not waiting:
            self.post("configuration", self._pass_on)
        return True

    def _pass_on(self) -> None:
        """The job: give the back-end what the driver has written."""
        assert self._write_config is not None
        with self._lock:
            written, self._written = self._written, {}
        for offset, data in _runs(written):
            try:
                self._write_config(offset, data)
            except PyvmmError as e:  # a refusal, or the back-end is gone: the driver goes on
                self.mistake(f"driver wrote {data.hex()} to the configuration at {offset:#x}: {e}")


def _runs(written: dict[int, int]) -> list[tuple[int, bytes]]:
    """Bytes by offset -> runs of neighbours, lowest first."""
    runs: list[tuple[int, bytearray]] = []
    for at in sorted(written):
        if runs and at == runs[-1][0] + len(runs[-1][1]):
            runs[-1][1].append(written[at])
        else:
            runs.append((at, bytearray([written[at]])))
    return [(at, bytes(data)) for at, data in runs]
