"""Cards come and go: at the machine's start and end, and while the guest runs.

Theory of operation. A card is made in the thread of whoever wants it, which may wait for a
back-end; ``cut`` ends such a wait. Then the card gets its slot, under the I/O lock. To remove a
card, the guest is asked to let go of it. A thread waits for that, so that it does not matter
whether the client that wanted the removal still waits. When the guest ejects the card, its vCPU
only takes the function off the bus, which ends all accesses; the thread does what may wait for
another process: it stops the data path and gives back what the card held.
"""

from __future__ import annotations

import threading
from _collections_abc import Sequence  # as `collections.abc` has it, which is one file more
from contextlib import ExitStack

from pyvmm.errors import HostError, PyvmmError, UsageError
from pyvmm.pci import PciFunction
from pyvmm.spec.platform import MAX_CARDS
from pyvmm.threads import Thread, report_bug

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import Any, TypeVar

    from pyvmm.card.card import Card
    from pyvmm.card.nic import Nic
    from pyvmm.card.peripheral import Peripheral
    from pyvmm.card.uplink import Uplink
    from pyvmm.devices.hotplug import PciHotplug
    from pyvmm.devopt import Device
    from pyvmm.macs import MacAddresses
    from pyvmm.netopt import Net
    from pyvmm.pci import PciBus

    T = TypeVar("T", bound=Card)
    #: Makes a card of this number, this description and this MAC address, which is not plugged in;
    #: closing the stack releases the card.
    Maker = Callable[[int, Net, bytes], tuple[Nic, ExitStack]]
    #: Makes a device of this place on the bus, this number and this description, likewise.
    DeviceMaker = Callable[[int, int, Device], tuple[Peripheral, ExitStack]]


class Cards(Sequence["T"]):
    """The cards in the order of their numbers. Any thread may look while a card comes or goes: an
    iteration goes over the cards that were there when it began.
    """

    def __init__(self) -> None:
        self._now: tuple[T, ...] = ()

    def add(self, card: T) -> None:
        """A card has come. The caller holds the I/O lock."""
        self._now = tuple(sorted((*self._now, card), key=lambda n: n.index))

    def remove(self, card: T) -> None:
        """A card has gone. The caller holds the I/O lock."""
        self._now = tuple(n for n in self._now if n is not card)

    def __iter__(self) -> Iterator[T]:
        return iter(self._now)

    def __len__(self) -> int:
        return len(self._now)

    def __getitem__(self, at: Any) -> Any:
        return self._now[at]


class Removal:
    """A card that is to go. :ivar done: set when the card has gone and given everything back, or
    when the machine ends before. :ivar error: what went wrong meanwhile.
    """

    def __init__(self, nic: Nic) -> None:
        self.nic = nic
        self.error: PyvmmError | None = None
        self.done = threading.Event()
        self.gone = False
        self._cancelled = False
        self._let_go = threading.Event()

    def let_go(self, *, cancelled: bool = False) -> None:
        """The card is off the bus; or ``cancelled``, nobody waits for that any more."""
        self._cancelled = self._cancelled or cancelled
        self._let_go.set()

    def wait(self) -> bool:
        """Wait for ``let_go``; whether the card is off the bus."""
        self._let_go.wait()
        return not self._cancelled


class Plugs:
    """Owns the cards of a machine.

    :param lock: the machine's I/O lock. :param make: makes a card. :param macs: chooses addresses.
    :param removed: is told, with the lock held, of a card that is about to leave ``nets``.
    :param emit: sends an event to the machine's observers; see ``Machine.emit``.
    :ivar nets: the network cards that are there. :ivar devices: the other devices, which stay as
        long as the machine. :ivar cards: all of them.
    """

    def __init__(
        self,
        pci: PciBus,
        lock: threading.RLock,
        make: Maker,
        macs: MacAddresses,
        *,
        removed: Callable[[Nic], object],
        emit: Callable[..., None],
    ) -> None:
        self._pci, self._lock, self._make, self._macs = pci, lock, make, macs
        self._removed, self._emit = removed, emit
        self.hotplug: PciHotplug
        self.nets: Cards[Nic] = Cards()
        self.devices: Cards[Peripheral] = Cards()
        self.cards: Cards[Card] = Cards()
        self._adding = threading.Lock()  # one card at a time
        self._state = threading.Lock()  # held for a moment only; guards what follows
        self._over = False
        self._making: Uplink | None = None
        self._removals: dict[str, Removal] = {}
        self._stacks: dict[str, ExitStack] = {}

    def begin(self, nets: Sequence[Net]) -> None:
        """Make the cards that the machine has from its start.

        :raises PyvmmError: one cannot be made; ``close`` releases the others.
        """
        macs = self._macs.choose(dict(enumerate(nets)))
        for index, net in enumerate(nets):
            nic, stack = self._make(index, net, macs[index])
            self._plug(nic, stack)
            self.nets.add(nic)

    def begin_devices(
        self, devices: Sequence[Device], make: DeviceMaker, *, ascending: int = 0
    ) -> None:
        """Make the machine's other devices, from the highest slot down, so that network cards have
        the slots of their numbers.

        :param ascending: the last so many devices have their slots in the other order, in which
            Linux looks for them and gives names to disks.
        :raises PyvmmError: as ``begin``.
        """
        places = [MAX_CARDS - 1 - number for number in range(len(devices))]
        plain = len(devices) - ascending
        places[plain:] = reversed(places[plain:])
        for number, options in enumerate(devices):
            device, stack = make(places[number], number, options)
            self._plug(device, stack)
            self.devices.add(device)

    def add(self, net: Net, name: str | None = None) -> Nic:
        """Plug in a card while the guest runs. Any thread but a vCPU's.

        :param name: ``net0`` to ``net30``; by default the first that is free.
        :raises PyvmmError: the card cannot be made; nothing is left behind.
        """
        if net.mode == "none":
            raise UsageError("a card with the mode none is no card", "name a data path")
        if net.transport != "pci":
            raise UsageError(
                "transport=mmio has no hot plug: a guest looks for windows once, when it boots",
                "leave out transport=mmio, or name the card at the machine's start",
            )
        with self._adding:
            index = self._number(name)
            taken = {nic.index: nic.device.mac for nic in self.nets}
            mac = self._macs.choose({index: net}, taken)[index]
            try:
                nic, stack = self._make(index, net, mac)
            except OSError as e:  # a module cannot be loaded without a descriptor
                raise HostError(f"cannot make net{index}: {e.strerror or e}") from e
            finally:
                with self._state:
                    self._making = None
            try:
                with self._lock:
                    self._plug(nic, stack)
                    self.nets.add(nic)
                    self.hotplug.added(1 + nic.index)
            except BaseException:
                stack.close()
                raise
            if self._over:
                nic.cut()
            return nic

    def _number(self, name: str | None) -> int:
        """The number of a new card."""
        with self._state:
            if self._over:
                raise HostError("the machine is ending")
            busy = {card.index for card in self.cards}
            busy |= {removal.nic.index for removal in self._removals.values()}
        if name is None:
            free = [n for n in range(MAX_CARDS) if n not in busy]
            if not free:
                raise UsageError(
                    f"the machine has {len(self.cards)} cards, and no PCI slot is left",
                    "remove one",
                )
            return free[0]
        index = next((n for n in range(MAX_CARDS) if name == f"net{n}"), None)
        if index is None:
            raise UsageError(f"{name!r} is no card's name", f"use net0 to net{MAX_CARDS - 1}")
        if any(card.index == index for card in self.devices):
            raise UsageError(
                f"{name} has no PCI slot: the machine has {len(self.devices)} other devices",
                "name a lower number, or none",
            )
        if index in busy:
            raise UsageError(
                f"Duplicate device ID '{name}'", "remove that card, or leave out the name"
            )
        return index

    def making(self, uplink: Uplink) -> None:
        """The host side of the card that is being made: have ``cut`` apply to it."""
        with self._state:
            self._making = uplink
            over = self._over
        if over:
            uplink.cut()

    def _plug(self, card: Card, stack: ExitStack) -> None:
        """Give a card its slot, unless it is in a window of its own."""
        self._stacks[card.name] = stack
        try:
            if isinstance(card.transport, PciFunction):
                self._pci.add(card.transport, 1 + card.index)
        except BaseException:
            del self._stacks[card.name]
            raise
        self.cards.add(card)

    def state(self, nic: Nic) -> str:
        """``added`` until the guest has read of the card, ``removing`` from the request to the end
        of a removal, else ``present``.
        """
        slot = nic.slot
        if slot is None:
            return "present"
        with self._lock:
            if nic.leaving or self.hotplug.asked(slot):
                return "removing"
            return "present" if self.hotplug.seen(slot) else "added"

    # --- removal ----------------------------------------------------------------------------------

    def ask(self, nic: Nic) -> Removal:
        """Ask the guest to let go of a card; once more, if it was asked before. Any thread.

        :raises PyvmmError: the card has gone, cannot go, the machine ends, or there can be no more
            threads.
        """
        slot = nic.slot
        if slot is None:
            raise UsageError(f"{nic.name} has transport=mmio, which has no hot plug")
        with self._state:
            if self._over:
                raise HostError("the machine is ending")
            if nic not in self.nets:
                raise UsageError(f"{nic.name} has been removed", "see: pyvmm nic list")
            removal = self._removals.get(nic.name)
            if removal is None:
                removal = Removal(nic)
                thread = Thread(
                    target=self._remove, args=(removal,), name=f"{nic.name} removal", daemon=True
                )
                try:
                    thread.start()
                except RuntimeError as e:
                    raise HostError(
                        f"cannot start a thread for {nic.name}: {e}",
                        "raise the limit of processes",
                    ) from e
                self._removals[nic.name] = removal
        with self._lock:
            if not nic.leaving:
                self.hotplug.ask(slot)
        return removal

    def ejected(self, slot: int) -> None:
        """The guest, or a reset of the machine, has let go of the card in ``slot``, which somebody
        had asked for. The I/O lock is held.
        """
        nic = next(nic for nic in self.nets if nic.slot == slot)
        self._pci.remove(slot)
        nic.leave()
        with self._state:
            self._removals[nic.name].let_go()

    def _remove(self, removal: Removal) -> None:
        """The thread of a removal."""
        try:
            if removal.wait():
                self._release(removal)
        except PyvmmError as e:
            removal.error = e
        except Exception as e:
            report_bug(e)
            removal.error = HostError(f"{removal.nic.name}: {type(e).__name__}: {e}")
        finally:
            with self._state:
                del self._removals[removal.nic.name]
            removal.done.set()
        if removal.gone:
            name = removal.nic.name
            self._emit("DEVICE_DELETED", device=name, path=f"/machine/peripheral/{name}")

    def _release(self, removal: Removal) -> None:
        """Stop the data path of a card that is off the bus, and give back what the card held.

        :raises PyvmmError: the data path does not let go, and the machine is ending; or something
            could not be given back in order.
        """
        nic = removal.nic
        nic.reset()
        if nic.device.active:
            raise HostError(f"{nic.name}: the data path does not let go")
        with self._lock:
            nic.transport.reset()  # which gives back its interrupts
            self._removed(nic)
            self.nets.remove(nic)
            self.cards.remove(nic)
        stack = self._stacks.pop(nic.name)
        removal.gone = True
        stack.close()

    # --- the end ----------------------------------------------------------------------------------

    def cut(self) -> None:
        """The machine ends: no conversation of a card with another process goes on, and none
        begins. Any thread; takes no lock that a conversation holds.
        """
        with self._state:
            self._over = True
            making = self._making
        if making is not None:
            making.cut()
        for card in self.cards:
            card.cut()

    def give_up(self) -> list[Removal]:
        """The guest has ended: nobody lets go of a card any more, and none is added. Returns the
        removals that were going on.
        """
        with self._state:
            self._over = True
            removals = list(self._removals.values())
        for removal in removals:
            removal.let_go(cancelled=True)
        return removals

    def close(self) -> None:
        """Release all cards. No vCPU runs any more. A second call does nothing."""
        removals = self.give_up()
        with self._adding:
            pass
        for removal in removals:
            removal.done.wait()
        with ExitStack() as closing:
            while self._stacks:
                closing.callback(self._stacks.popitem()[1].close)
