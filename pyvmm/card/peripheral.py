"""A device of the machine that is no network card, and whose virtqueues another process serves."""

from __future__ import annotations

from contextlib import ExitStack

from pyvmm.card.card import Card
from pyvmm.card.thread import CardThread
from pyvmm.datapath.vhost_user_any import VhostUserAny
from pyvmm.errors import VhostUserError
from pyvmm.virtio.generic import GenericDevice
from pyvmm.virtio.pci.transport import VirtioPci

TYPE_CHECKING = False
if TYPE_CHECKING:
    import threading
    from collections.abc import Callable
    from typing import Any

    from pyvmm.bus import Bus
    from pyvmm.devopt import Device
    from pyvmm.errors import PyvmmError
    from pyvmm.kvm.vm import Vm
    from pyvmm.memory import GuestMemory


class Peripheral(Card):
    """The device on the bus; see ``Card``.

    :param options: as the user described it. :param path: its back-end, owned by ``device``.
    :param lost: called, in the card's thread, once a vital device does not work any more; told why.
    """

    device: GenericDevice

    def __init__(
        self,
        index: int,
        options: Device,
        device: GenericDevice,
        path: VhostUserAny,
        transport: VirtioPci,
        thread: CardThread,
        lock: threading.RLock,
        lost: Callable[[str], object],
    ) -> None:
        super().__init__(index, device, transport, thread, lock)
        self.options, self._path, self._lost = options, path, lost
        self._substitute = options.substitute()
        #: Why the device does not work any more; None if it does.
        self.broken: PyvmmError | None = None
        if self._substitute is not None:
            path.gone = self._gone
            if not path.connected:  # it went before somebody listened
                self._gone()

    def _gone(self) -> None:
        """The back-end has gone, and there will be no other."""
        self.device.post("end of the back-end", self._give_up)

    def _give_up(self) -> None:
        """The job: answer the guest in the place of the back-end."""
        assert self._substitute is not None
        if self._over or self.broken is not None:
            return
        self.broken = self.options.lament(self._path.problems)
        self.device.replace(self._substitute)
        if self.options.vital:
            self._lost(str(self.broken))

    def cut(self) -> None:
        """As ``Card.cut``, also of a back-end that is not in force any more."""
        self._path.cut()
        super().cut()

    def close(self) -> None:
        """As ``Card.close``; releases a data path that is not in force, too."""
        super().close()
        self._path.close()
        if self._substitute is not None:
            self._substitute.close()

    @property
    def kind(self) -> str:
        """``rng``, ``fs`` or the like; a number if the kind has no name here."""
        return self.options.kind.name

    @property
    def notify(self) -> str:
        """How kicks come: ``ioeventfd`` or ``exit``."""
        return self.options.notify

    @property
    def interrupt(self) -> str:
        """How interrupts are raised."""
        return "irqfd"

    @property
    def worker(self) -> str:
        """As of a network card: no vCPU's thread does the back-end's work."""
        return "thread"

    @property
    def connected(self) -> bool:
        """Whether there is a back-end now."""
        return self._path.connected

    def by_mode(self) -> dict[str, object]:
        """Its only data path, for the trace."""
        return {self.device.datapath.name: None}

    def counters(self) -> dict[str, int]:
        """Connections, losses and their cost. Any thread."""
        return self._path.counters()

    def report(self) -> dict[str, object]:
        """The device's part of the report, for JSON (docs/report.md)."""
        from pyvmm.virtio.features import names

        device = self.device
        return {
            "name": self.name,
            "kind": self.kind,
            "id": device.device_id,
            "notify": self.notify,
            "queues": len(device.queues),
            "config": device.config_space().hex(),
            "offered": names(device.offered(), net=False),
            "negotiated": names(device.negotiated, net=False),
            "resets": device.resets,
            "refused_writes": device.refused,
            "driver_mistakes": list(device.mistakes),
            "kvm_refusals": self.transport.errors,
            "faults": list(device.faults),
            "faults_total": device.faults_total,
            "tracebacks": list(device.tracebacks),
            "counters": self.counters(),
            "vhost_user": self._path.report(),
        }


def make(
    index: int,
    name: str,
    options: Device,
    vm: Vm,
    bus: Bus,
    memory: GuestMemory,
    lock: threading.RLock,
    *,
    recorder: Any,
    emit: Callable[..., None],
    lost: Callable[[str], object],
) -> tuple[Peripheral, ExitStack]:
    """Connect to the back-end of a device, and make the device, which is not plugged in yet.

    :param index: its place on the bus. :param options: as the user describes it.
    :param recorder: a ``kvm.recorder.Scope``, or None.
    :param emit: sends an event to the machine's observers; see ``Machine.emit``.
    :param lost: see ``Peripheral``.
    :returns: with the device, the stack that releases it.
    :raises PyvmmError: there is no back-end, or it does not fit; nothing is left behind.
    """
    kind = options.kind

    def faulty(problem: str) -> None:
        emit("X_PYVMM_DEVICE_FAULT", name=name, problem=problem)

    with ExitStack() as undo:
        path = VhostUserAny(
            options.connector(),
            queues=options.queues,
            config_size=options.config_size,
            own_config=options.own_config(),
            timeout=options.timeout,
            recorder=recorder,
        )
        undo.callback(path.close)
        try:
            path.connect()
        except VhostUserError as e:
            raise options.failure(e) from e
        thread = CardThread(name)
        undo.callback(thread.end)
        device = GenericDevice(
            name,
            kind.id,
            memory,
            [options.queue_size] * options.queues,
            path,
            features=path.features(),
            config=path.config,
            fields=kind.fields,
            write_config=path.write_config if path.config_writable else None,
            problem=faulty,
            jobs=thread,
            lock=lock,
        )
        undo.callback(device.close)
        device.recorder = recorder
        transport = VirtioPci(vm, bus, device, kind.class_code, notify=options.notify)
        undo.callback(transport.close)
        path.watch(device.set_config)
        card = Peripheral(index, options, device, path, transport, thread, lock, lost)
        undo.pop_all()
    release = ExitStack()
    for close in (transport.close, card.close):
        release.callback(close)
    return card, release
