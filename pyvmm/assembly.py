"""Assembly: makes the parts of a machine from its description, connects them and loads the guest.

``Parts`` is the list of a machine's parts, in the order in which they are made. ``machine`` runs
the parts and knows what an end means: the parts call it by ``Wires``.
"""

from __future__ import annotations

import os
import threading
from contextlib import ExitStack

from pyvmm.boot import BootState, is_linux, load
from pyvmm.boot.acpi import build as build_acpi
from pyvmm.boot.acpi import waking_vector
from pyvmm.boot.mptable import build as build_mptable
from pyvmm.bus import Bus
from pyvmm.devices.console import Console, Spotter, Stream
from pyvmm.devices.guest_port import GuestPage, GuestPort
from pyvmm.devices.hotplug import PciHotplug
from pyvmm.devices.legacy import Power, PvPanic
from pyvmm.devices.rtc import Rtc
from pyvmm.errors import KvmUnsuitable, UsageError
from pyvmm.exits.accounts import MachineAccounts
from pyvmm.host.limits import memory_note
from pyvmm.kvm.ahead import Ahead
from pyvmm.kvm.vcpu import Vcpu
from pyvmm.kvm.vm import Vm
from pyvmm.macs import MacAddresses, mac_text
from pyvmm.memory import GuestMemory, parse_size
from pyvmm.outcome import Outcome
from pyvmm.panics import PanicWatch
from pyvmm.pci import PciBus
from pyvmm.plugs import Plugs
from pyvmm.spec import acpi
from pyvmm.spec.platform import (
    GPE_PCI_HOTPLUG,
    IRQ_COM1,
    IRQ_COM2,
    IRQ_RTC,
    IRQ_SCI,
    MAX_CARDS,
    MAX_CPUS,
    PORT_COM1,
    PORT_COM2,
    PORT_GUEST_STDERR,
    PORT_GUEST_STDOUT,
)
from pyvmm.vcpus import VcpuThreads

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from pyvmm.card.nic import Nic
    from pyvmm.card.peripheral import Peripheral
    from pyvmm.devices.guest_channel import Channel
    from pyvmm.devices.guest_input import GuestInput
    from pyvmm.devopt import Device
    from pyvmm.diskopt import Disk
    from pyvmm.hang import HangWatch
    from pyvmm.images.cpio import Archive
    from pyvmm.kvm.cpu import Cpu
    from pyvmm.kvm.recorder import Recorder
    from pyvmm.netopt import Net
    from pyvmm.shareopt import Root, Share
    from pyvmm.virtio.mmio import VirtioMmio
    from pyvmm.virtio.net import NetDevice
    from pyvmm.virtio.pci.transport import VirtioPci

#: Parameters of every guest; ``append`` comes later and so wins.
BASE_CMDLINE = "console=ttyS0 panic=-1"
#: The host's and the guest's address of a card whose host side is ours: with a tap, and in mode
#: ``user``. The card's number comes in, and begins with the third word.
TAP_ADDRESSES = ("192.168.{}.1/24", "192.168.{}.2/24", 100)
USER_ADDRESSES = ("10.0.{}.2/24", "10.0.{}.15/24", 2)
#: With this parameter the kernel reports a crash that happens before it has the real console, which
#: takes over. It comes last: the kernel reads its parameters in order, and a ``quiet`` after it
#: would find the early console busy with earlier output, with an exit or two per character.
EARLY_CONSOLE = "earlyprintk=ttyS0,115200"
#: The most bytes of a command on the kernel command line. Base64 makes them longer, and Linux takes
#: 2047 bytes for everything (COMMAND_LINE_SIZE). Longer commands go into an archive.
COMMAND_WORD_MAX = 1200
#: What each card takes of that: the word with its addresses has about 50 characters.
NET_WORD = 40
#: Bytes of all cards' words, beyond which the MTU is left out: Linux has it from the device, too.
NET_WORDS_MAX = 1500
COMMAND_FILE = "/etc/pyvmm.cmd"
#: What init mounts, where the command begins, and whose it is (guest/init.c).
SHARES_FILE, PLACE_FILE = "/etc/pyvmm.shares", "/etc/pyvmm.place"
USER_FILE, INIT_FILE = "/etc/pyvmm.user", "/etc/pyvmm.init"
#: Parameters for systemd as the guest's init: the tree's disks are not there, and nobody answers
#: the questions of a first boot. The images' ``quiet`` is not for systemd.
SYSTEMD_CMDLINE = "fstab=no systemd.firstboot=no systemd.show_status=yes"
INIT_TEXT = b" as init process"  # "Run /init as init process": the kernel's last word before init


class Description:
    """The description of a machine: the parameters of ``Machine``, checked.

    :ivar memory: in bytes. :ivar initrds: paths, in order.
    :ivar devices: those that are no network cards; the last ``disks`` of them are disks.
    :ivar raw_command: the command as init takes it; None without one.
    :raises UsageError: a value is out of range, or two do not go together.
    """

    def __init__(
        self,
        kernel: str,
        *,
        initrd: str | os.PathLike[str] | Sequence[str] | None = None,
        append: str = "",
        cpus: int = 1,
        memory: str | int = "256M",
        nets: Sequence[Net] = (),
        devices: Sequence[Device] = (),
        shares: Sequence[Share] = (),
        disks: Sequence[Disk] = (),
        root: Root | None = None,
        command: Sequence[str] | None = None,
        huge: bool = False,
        load_address: int | None = None,
        load_mode: str = "protected32",
        test_devices: bool = False,
        trace: int = 0,
        hang_timeout: float | None = None,
        agent: bool = False,
        cpu: str | None = None,
        add: Sequence[str] = (),
        modules: str | None = None,
        stdin: int | None = None,
    ) -> None:
        if not 1 <= cpus <= MAX_CPUS:
            raise UsageError(
                f"--cpus {cpus}", f"use 1 to {MAX_CPUS}: the id of a local APIC has 8 bits"
            )
        if agent and command is not None:
            raise UsageError("agent and command", "run commands by Machine.run")
        if stdin is not None and command is None:
            raise UsageError("stdin without a command", "name the command that reads it")
        if isinstance(add, str):
            raise UsageError(f"add={add!r}", "give a list: add=[...]")
        self.raw_command: bytes | None = None
        if command is not None:
            from pyvmm.devices.guest_frames import command_bytes

            self.raw_command = command_bytes(command)
        self.kernel, self.append, self.command = kernel, append, command
        several = [initrd] if isinstance(initrd, str | os.PathLike) else initrd or ()
        self.initrds = [os.fspath(path) for path in several]
        self.add, self.modules, self.stdin = list(add), modules, stdin
        self.load_address, self.load_mode = load_address, load_mode
        self.cpus, self.memory, self.huge = cpus, parse_size(memory), huge
        self.nets = [net for net in nets if net.mode != "none"]
        self.shares = [*([root] if root is not None else []), *shares]
        self.root = root
        if root is not None and root.init and not root.systemd and command is not None:
            raise UsageError(
                f"--init {root.init} with a command: only systemd can be told to run it",
                "leave it out, and run it by pyvmm exec",
            )
        for number, share in enumerate(self.shares):
            share.number(number)
            if any(share.path == other.path for other in self.shares[:number]):
                raise UsageError(
                    f"--share: two directories at {share.path}", "name another path for one"
                )
        self.devices = [*devices, *self.shares, *disks]
        self.disks = len(disks)
        if len(self.nets) + len(self.devices) > MAX_CARDS:
            others = f" and {len(self.devices)} other devices" if self.devices else ""
            raise UsageError(
                f"--net: {len(self.nets)} cards{others}",
                f"use at most {MAX_CARDS}: PCI bus 0 has no more slots",
            )
        self.test_devices, self.agent = test_devices, agent
        self.trace, self.hang_timeout = trace, hang_timeout
        self.cpu: Cpu | None = None
        if cpu is not None:
            from pyvmm.kvm.cpu import Cpu

            self.cpu = Cpu(cpu)

    def files(self) -> list[str]:
        """The files and directories that the description names for the guest's memory."""
        return [self.kernel, *initrd_files(self.initrds), *self.trees()]

    def trees(self) -> list[str]:
        """Those of ``files`` that may be directories."""
        return [*added_names(self.add), *([self.modules] if self.modules is not None else [])]


def added_names(add: Sequence[str]) -> list[str]:
    """The files and directories of the host that ``--add`` names."""
    return [text.rpartition(":/")[0] or text for text in add]


def initrd_files(initrds: Sequence[str]) -> list[str]:
    """The files that initrds may be: of multiboot's, each is FILE [ARGUMENTS][,FILE ...]."""
    return [*initrds, *(part.split(" ")[0] for text in initrds for part in text.split(","))]


class Wires:
    """What the parts tell the machine. Threads of vCPUs call these functions, some with the I/O
    lock held, and so do threads that watch the guest. No function may wait.

    :param end: the guest has come to this end, or asks for a reset.
    :param reached: the guest's init has come to this point of the run (docs/report.md).
    :param init_runs: the kernel starts init; called once or more often.
    :param command_ended: the guest's command has ended with this exit status, or a test kernel has
        reported its own.
    :param emit: send this event with its data to the clients of the control socket.
    :param wake: something has happened that ends a sleep of the machine.
    """

    __slots__ = ("command_ended", "emit", "end", "init_runs", "reached", "wake")

    def __init__(
        self,
        *,
        end: Callable[[Outcome], object],
        reached: Callable[[str], None],
        init_runs: Callable[[], None],
        command_ended: Callable[[int], None],
        emit: Callable[..., None],
        wake: Callable[[], None],
    ) -> None:
        self.end, self.reached, self.init_runs = end, reached, init_runs
        self.command_ended, self.emit = command_ended, emit
        self.wake = wake


class Parts:
    """The parts of a machine.

    :param stack: closes each part that has to be closed, the latest first, also if a later one
        cannot be made.
    :param began: when the description was read; CLOCK_MONOTONIC, ns.
    :param name: of the machine; may be empty.
    :ivar lock: the I/O lock, under which devices in Python answer.
    :ivar notes: what the user should know of what is added to the initrd, and of the memory.
    :ivar boot: how the guest starts. :ivar cmdline: the kernel command line that it has got.
    :raises PyvmmError: a part cannot be made.
    """

    def __init__(
        self,
        want: Description,
        wires: Wires,
        stack: ExitStack,
        began: int,
        name: str,
        ahead: Ahead | None,
    ) -> None:
        self._want, self._wires, self._stack = want, wires, stack
        closing = stack.callback
        self.lock = threading.RLock()
        self.recorder: Recorder | None = None
        if want.trace:
            from pyvmm.kvm.recorder import Recorder

            self.recorder = Recorder(want.trace)
            closing(self.recorder.close)
        for options in want.devices:
            closing(options.abandon)
            options.begin()  # before there is memory that a child would have to give up
        self.memory = GuestMemory(want.memory, huge=want.huge)
        closing(self.memory.close)
        self.kvm, blank = (ahead or Ahead()).take()
        closing(self.kvm.close)
        closing(blank.close)
        most = self.kvm.extension("KVM_CAP_MAX_VCPUS")
        if want.cpus > most > 0:
            raise UsageError(
                f"--cpus {want.cpus}: this host's KVM has at most {most} vCPUs", f"use 1 to {most}"
            )
        self.vm = Vm(self.kvm, self.memory, blank)
        closing(self.vm.close)
        if self.recorder is not None:
            self.vm.recorder = self.recorder.scope("kvm")
        self.bus = Bus()
        closing(self.bus.close)
        self.console = Console("console", self.vm, IRQ_COM1)
        self.stdout, self.stderr = Stream("stdout"), Stream("stderr")
        self.streams: list[Stream] = [self.console, self.stdout, self.stderr]
        self.console.add_sink(Spotter(INIT_TEXT, wires.init_runs))
        self.panics = PanicWatch(self.console, lambda: wires.end(Outcome("panic")))
        self._page = GuestPage(self.memory)
        self._mounted = False  # the guest has mounted the shares
        for stream in self.streams:
            closing(stream.close)
        # Our init may run in any Linux, and takes commands at any time.
        linux = not want.test_devices and want.load_address is None and is_linux(want.kernel)
        self.bell = self._make_bell() if linux or want.stdin is not None else None
        self.channel = self._make_channel() if linux else None
        self.input = self._make_input(want.stdin) if want.stdin is not None else None
        self.pci = PciBus(self.bus, self._reset)
        self._add_board()
        self.plugs = Plugs(
            self.pci,
            self.lock,
            self._make_net,
            MacAddresses(name),
            removed=lambda nic: self.accounts.removed(nic),
            emit=wires.emit,
        )
        self.plugs.hotplug = PciHotplug(
            self.bus, lambda: self.power.gpe0.event(GPE_PCI_HOTPLUG), self.plugs.ejected
        )
        self.nets = self.plugs.nets
        self.vcpus: list[Vcpu] = []
        for index in range(want.cpus):
            vcpu = Vcpu(self.vm, index, want.cpus, self.bus, want.cpu)
            closing(vcpu.close)
            self.vcpus.append(vcpu)
            if self.recorder is not None:
                vcpu.trace(self.recorder.ring("vcpus", f"vcpu{index}"))
        self.accounts = MachineAccounts(
            self.kvm,
            self.vm,
            self.bus,
            self.vcpus,
            self.nets,
            self.lock,
            began,
            devices=self.plugs.devices,
        )
        closing(self.accounts.close)
        closing(self.plugs.close)  # before what a switch counts by
        self.plugs.begin(want.nets)
        self.plugs.begin_devices(want.devices, self._make_device, ascending=want.disks)
        self._load()
        if self.is_linux():
            from pyvmm.doctor import can_run_linux_locally

            good, reason = can_run_linux_locally()
            if not good:
                raise KvmUnsuitable(
                    f"no Linux guest can run here: {reason}",
                    "use --host testbed; a program of yours: pyvmm testbed -- python3 PROGRAM",
                )
        self._set_boot_state()
        self.vcpu_threads = VcpuThreads(
            self.vcpus, self.bus, self.lock, flush=self.port.flush, over=wires.end
        )
        self.hang_watch = (
            self._make_hang_watch(want.hang_timeout) if want.hang_timeout is not None else None
        )
        self.vm.settle()

    def _reset(self) -> None:
        self._wires.end(Outcome("reboot"))

    def _alarm(self) -> None:
        """The clock's alarm has come: an interrupt, and an event of ACPI."""
        with self.lock:
            for level in (1, 0):
                self.vm.irq_line(IRQ_RTC, level)
            self.power.pm1.event(acpi.PM1_RTC)
        if self.power.pm1.wakes:
            self._wires.wake()

    def is_linux(self) -> bool:
        """Whether the kernel is Linux."""
        return "Linux" in self.boot.kind or "bzImage" in self.boot.kind

    def _make_bell(self) -> Console:
        """The second serial port, by which the VMM interrupts init."""
        bell = Console("bell", self.vm, IRQ_COM2)
        self._stack.callback(bell.close)
        bell.plug(self.bus, PORT_COM2, "serial1")
        self.streams.append(bell)
        return bell

    def _make_channel(self) -> Channel:
        from pyvmm.devices.guest_channel import Channel, Pages

        assert self.bell is not None
        return Channel(self.bus, self.bell.feed, Pages(self.memory))

    def _make_input(self, fd: int) -> GuestInput:
        from pyvmm.devices.guest_input import GuestInput

        assert self.bell is not None
        source = GuestInput(self.bus, self.bell.feed, self._page.store, fd)
        self._stack.callback(source.close)
        return source

    def _add_board(self) -> None:
        """Put the devices with fixed ports on the bus."""
        bus, wires = self.bus, self._wires
        self.console.plug(bus, PORT_COM1, "serial0")
        self.stdout.plug(bus, PORT_GUEST_STDOUT, "guest-stdout")
        self.stderr.plug(bus, PORT_GUEST_STDERR, "guest-stderr")
        self.port = GuestPort(
            bus,
            self._page,
            self.stdout,
            self.stderr,
            reached=self._reached,
            ended=wires.command_ended,
            no_share=self._no_share,
            channel=self.channel,
        )
        self.rtc = Rtc(bus, self._alarm)
        self._stack.callback(self.rtc.close)
        self.power = Power(
            bus,
            lambda: wires.end(Outcome("poweroff")),
            self._reset,
            lambda: wires.end(Outcome("suspend")),
            lambda level: self.vm.irq_line(IRQ_SCI, level),
        )
        PvPanic(bus, self.panics.pvpanic)
        if self._want.test_devices:
            from pyvmm.devices.testdev import add_test_devices

            def debug_exit(status: int) -> None:
                wires.command_ended(status)
                wires.end(Outcome("debug-exit"))

            add_test_devices(bus, self.vm, self.memory, self._want.cpus, self.console, debug_exit)

    def _reached(self, point: str) -> None:
        """The guest's init has come to ``point``."""
        if point == "shares":
            self._mounted = True
        elif point in ("command", "agent") and self._want.shares and not self._mounted:
            self._wires.end(
                Outcome(
                    "share",
                    "its init knows of none; if the image is older than this pyvmm: "
                    "pyvmm image build",
                )
            )
        self._wires.reached(point)

    def _no_share(self, number: int, error: int) -> None:
        """The guest cannot mount a share."""
        if self._want.shares:
            from pyvmm.shareopt import reason  # loaded by now: a vCPU's thread may load nothing

            self._wires.end(Outcome("share", reason(self._want.shares, number, error)))

    def _thread_stopped(self, problem: str) -> None:
        """A worker was no longer ours: end the machine."""
        self._wires.end(Outcome("thread-stopped", problem))

    def _make_net(self, index: int, net: Net, mac: bytes) -> tuple[Nic, ExitStack]:
        """Make a network card, which is not plugged in, and the stack that releases it."""
        from pyvmm.card.nic import Nic
        from pyvmm.card.thread import CardThread
        from pyvmm.card.uplink import Uplink
        from pyvmm.virtio.net import NetDevice

        host, guest = net.host, net.guest
        if net.own_network:
            ours, own, first = USER_ADDRESSES if net.mode == "user" else TAP_ADDRESSES
            host, guest = host or ours.format(first + index), guest or own.format(first + index)
        scope = self.recorder.scope(f"net{index}") if self.recorder is not None else None
        with ExitStack() as undo:
            uplink = Uplink(net, host, guest, scope, self._thread_stopped, mac)
            undo.callback(uplink.close)
            self.plugs.making(uplink)
            own_mac, own_mtu = uplink.given(net)
            if net.mac is None and own_mac is not None:
                mac = own_mac
            offer, without = -1, net.excluded()
            for mode in net.switchable:
                trial = uplink.open(net.switched(mode), mac).path
                try:
                    net.check_offer(mode, trial.features())
                    offer &= trial.features()
                    without |= trial.withholds
                finally:
                    trial.close()
            route = uplink.open(net, mac)
            undo.callback(route.path.close)
            net.check_offer(net.mode, route.path.features())
            if net.may_offload:
                self.memory.settle()
            thread = CardThread(f"net{index}")
            undo.callback(thread.end)
            device = NetDevice(
                f"net{index}",
                self.memory,
                route.path,
                uplink,
                mac,
                mtu=net.mtu or own_mtu,
                pairs=net.queues,
                queue_size=net.queue_size,
                offer=offer,
                without=without,
                speed=net.speed,
                link=net.link,
                jobs=thread,
                lock=self.lock,
            )
            undo.callback(device.close)
            device.recorder = scope
            transport = self._make_transport(index, net, device)
            undo.callback(transport.close)
            nic = Nic(
                index,
                net,
                device,
                transport,
                uplink,
                route,
                thread,
                self.lock,
                lambda: self.accounts.ledger(),
                self._wires.emit,
            )
            nic.host, nic.guest = host, guest
            undo.pop_all()
        release = ExitStack()
        for close in (uplink.close, transport.close, nic.close):
            release.callback(close)
        return nic, release

    def _make_transport(self, index: int, net: Net, device: NetDevice) -> VirtioPci | VirtioMmio:
        if net.transport == "mmio":
            from pyvmm.virtio.mmio import VirtioMmio

            return VirtioMmio(
                self.vm, self.bus, device, index, notify=net.notify, interrupt=net.interrupt
            )
        from pyvmm.spec.virtio_pci import VIRTIO_TRANS_ID_NET
        from pyvmm.virtio.net import PCI_CLASS_NETWORK_ETHERNET
        from pyvmm.virtio.pci.transport import VirtioPci

        return VirtioPci(
            self.vm,
            self.bus,
            device,
            PCI_CLASS_NETWORK_ETHERNET,
            notify=net.notify,
            interrupt=net.interrupt,
            notify_pages=net.may_offload,
            transitional=VIRTIO_TRANS_ID_NET if net.legacy else None,
        )

    def _make_device(
        self, index: int, number: int, options: Device
    ) -> tuple[Peripheral, ExitStack]:
        """Make a device with a vhost-user back-end, which is not plugged in, and the stack that
        releases it.
        """
        from pyvmm.card.peripheral import make

        name = f"dev{number}"
        return make(
            index,
            name,
            options,
            self.vm,
            self.bus,
            self.memory,
            self.lock,
            recorder=self.recorder.scope(name) if self.recorder is not None else None,
            emit=self._wires.emit,
            lost=lambda why: self._wires.end(Outcome("share", why)),
        )

    def _make_hang_watch(self, limit: float) -> HangWatch:
        from pyvmm.hang import HangWatch

        watch = HangWatch(
            self.vcpus,
            self.plugs.cards,
            self.memory,
            kick=self.vcpu_threads.kick,
            linux=self.is_linux(),
            limit=limit,
            found=lambda text: self._wires.end(Outcome("hang", text)),
        )
        self._stack.callback(watch.stop)
        self.vcpu_threads.kicked = watch.looked_at
        return watch

    def _load(self) -> None:
        """Put kernel and firmware tables into memory."""
        want = self._want
        # ECAM is not advertised: Linux would look at it and then use 0xCF8 for the registers that
        # exist.
        cards = [nic for nic in self.nets if not nic.leaving]
        com2 = self.bell is not None
        rsdp = build_acpi(self.memory, cpus=want.cpus, com2=com2, windows=windows(cards))
        build_mptable(self.memory, cpus=want.cpus)
        self.cmdline = cmdline(want, cards)
        archive, self.notes = extra_archive(want, len(cards))
        self.notes += filter(None, [memory_note(self.memory.size)])
        self._packed = packed_files(archive)
        self.boot = load(
            self.memory,
            want.kernel,
            initrd=want.initrds,
            cmdline=self.cmdline,
            rsdp=rsdp,
            load_address=want.load_address,
            load_mode=want.load_mode,
            archive=archive,
        )

    def sources(self) -> list[str]:
        """The files and directories that a reset reads again."""
        return [*self._want.files(), *self._packed]

    def _set_boot_state(self) -> None:
        """Leave everything but memory as the boot loader does."""
        if self.boot.bios:
            self.vm.start_as_bios()
        self.vcpus[0].set_boot_state(self.boot)

    def restart(self) -> None:
        """Reset the machine: devices, memory and the VM itself start over; consoles and accounts go
        on. No vCPU may run.
        """
        self.accounts.restart()
        self._reset_devices()
        self.power.reset()
        self.plugs.hotplug.reset()
        self.rtc.reset()
        self.panics.restart()
        self._page.name(0)
        self._mounted = False
        if self.channel is not None:
            self.channel.reset()
        if self.input is not None:
            self.input.reset()
        self.memory.zero()
        self._renew_vm(keep_clock=False)
        self._load()
        self._set_boot_state()

    def wake(self) -> bool:
        """End a sleep (S3): as ``restart``, but memory is kept, and the guest goes on at its waking
        vector. No vCPU may run.

        :returns: False if the guest has named no waking vector; nothing has changed.
        """
        vector = waking_vector(self.memory)
        if not vector:
            return False
        self.accounts.renew("sleep")
        self._reset_devices()
        self._renew_vm(keep_clock=True)
        regs = {"rip": vector & 15}
        self.vcpus[0].set_boot_state(
            BootState("real16", "waking vector", vector, regs, 0, segment=vector >> 4)
        )
        self.power.woken()
        return True

    def _reset_devices(self) -> None:
        self.pci.reset()
        for nic in self.nets:
            if nic.slot is None:
                nic.transport.reset()
        self.console.reset()
        if self.bell is not None:
            self.bell.reset()

    def _renew_vm(self, *, keep_clock: bool) -> None:
        """Make the VM and its vCPUs new; their memory stays as it is."""
        for stream in self.streams:
            stream.release(False)
        for vcpu in self.vcpus:
            vcpu.detach()
        self.vm.recreate(keep_clock=keep_clock)
        for vcpu in self.vcpus:
            vcpu.reattach()
        self.vm.settle()


def fits_the_line(raw: bytes, cards: int) -> bool:
    """Whether a command goes on the kernel command line, beside the words of so many cards."""
    return len(raw) <= COMMAND_WORD_MAX - NET_WORD * max(0, cards - 1)


def packed_files(archive: Archive | None) -> set[str]:
    """The host's files that are in an archive of ``extra_archive``."""
    entries = archive.entries.values() if archive is not None else ()
    return {entry.source.path for entry in entries if entry.source is not None}


def extra_archive(want: Description, cards: int = 1) -> tuple[Archive | None, list[str]]:
    """What Linux unpacks after the initrd: what the user adds, the list of shares, and the command,
    if it is too long for the kernel command line. None if there is nothing of these. With it, what
    the user should know of it.

    :raises PyvmmError: something cannot be added.
    """
    archive: Archive | None = None
    notes: list[str] = []
    if want.add or want.modules is not None:
        from pyvmm.boot.release import release
        from pyvmm.images.additions import Additions

        added = Additions(want.add, want.modules, want.initrds, lambda: release(want.kernel))
        archive, notes = added.archive, added.notes
    if want.raw_command is not None and not fits_the_line(want.raw_command, cards):
        from pyvmm.images.cpio import Archive

        archive = archive or Archive()
        archive.file(COMMAND_FILE, want.raw_command)
    if want.shares:
        from pyvmm.images.cpio import Archive
        from pyvmm.shareopt import place, words

        archive = archive or Archive()
        archive.file(SHARES_FILE, words(want.shares))
        if want.root is not None and want.root.account:
            archive.file(USER_FILE, want.root.account, 0o600)
        if want.root is not None and want.root.init:
            archive.file(INIT_FILE, want.root.init_words)
        try:
            here = os.path.realpath(os.curdir)
        except OSError:  # it has been removed
            here = ""
        archive.file(PLACE_FILE, place(want.shares, here))
    return archive, notes


def net_words(nets: Sequence[Nic]) -> list[str]:
    """The words by which our init configures the cards. The gateway of the first card with a way
    out is the default route, or else the first gateway; to name others would do nothing.
    """
    words, mtus = [], []
    routed = sorted(
        (nic for nic in nets if nic.guest and nic.host), key=lambda n: not n.net.way_out
    )
    for nic in nets:
        if nic.guest:
            gateway = f",gw={nic.host.partition('/')[0]}" if nic.host and nic in routed[:1] else ""
            if nic.name_server:
                gateway += f",dns={nic.name_server}"
            words.append(f"pyvmm.net={mac_text(nic.device.mac)},{nic.guest}{gateway}")
            mtus.append(f",mtu={nic.net.mtu}" if nic.net.mtu else "")
    if sum(map(len, words + mtus)) <= NET_WORDS_MAX:
        words = [word + mtu for word, mtu in zip(words, mtus, strict=True)]
    return words


def windows(nets: Sequence[Nic]) -> list[tuple[int, int]]:
    """The address of the window and the GSI of each card of virtio over MMIO."""
    cards = [nic.index for nic in nets if nic.slot is None]
    if not cards:
        return []
    from pyvmm.virtio.mmio import line_of, window_of

    return [(window_of(index), line_of(index)) for index in cards]


def cmdline(want: Description, nets: Sequence[Nic]) -> str:
    """The kernel command line.

    :raises UsageError: the command is too long for it.
    """
    parts = [] if want.test_devices else [BASE_CMDLINE]
    if want.root is not None and want.root.systemd:
        parts.append(SYSTEMD_CMDLINE)
    if want.agent:
        parts.append("pyvmm.agent")
    if want.stdin is not None:
        parts.append("pyvmm.stdin=port")
    parts += net_words(nets)
    if "acpi=off" in want.append.split():
        # Not besides ACPI's tables, by which Linux would take the same window a second time.
        parts += [f"virtio_mmio.device=4K@{base:#x}:{gsi}" for base, gsi in windows(nets)]
    raw = want.raw_command
    if raw is not None and fits_the_line(raw, len(nets)):
        import base64

        parts.append("pyvmm.cmd=" + base64.urlsafe_b64encode(raw).decode().rstrip("="))
    append, dashes, rest = f" {want.append}".partition(" -- ")  # the words after "--" are for init
    parts.append(append.strip())
    if not want.test_devices:
        parts.append(EARLY_CONSOLE)
    if dashes:
        parts += ["--", rest]
    return " ".join(filter(None, parts))
