"""A virtual machine: its public interface, and its life from the start of the guest to the end.

``assembly`` makes the parts, ``vcpus`` runs the vCPUs. When the vCPUs have stopped, the
supervisor's thread in this module starts the guest over or ends the machine. Any thread may ask for
an end at any time, without waiting, because the request has a lock of its own.
"""

from __future__ import annotations

import threading
import time
from contextlib import ExitStack

from pyvmm.assembly import Description, Parts, Wires
from pyvmm.errors import (
    CommandFailed,
    GuestEnded,
    GuestTimeout,
    HostError,
    PyvmmError,
    UsageError,
)
from pyvmm.kvm.vcpu import RUNS_OFF
from pyvmm.outcome import Outcome
from pyvmm.sandbox import CHOICES, Sandbox
from pyvmm.spec.platform import IRQ_GED
from pyvmm.threads import Thread, aside

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from types import TracebackType
    from typing import Any, Self

    from pyvmm.boot import BootState
    from pyvmm.card.nic import Nic
    from pyvmm.control import Door
    from pyvmm.control.registry import Claim
    from pyvmm.devices.guest_agent import CommandResult
    from pyvmm.devopt import Device
    from pyvmm.diskopt import Disk
    from pyvmm.exits.budget import Result
    from pyvmm.exits.ledger import Ledger
    from pyvmm.exits.phases import Phase
    from pyvmm.kvm.ahead import Ahead
    from pyvmm.netopt import Net
    from pyvmm.plugs import Removal
    from pyvmm.scenario import Player, Scenario
    from pyvmm.shareopt import Root, Share

#: Seconds for which pause() waits for vCPUs that are outside of the guest because the pipe of a
#: console is full.
PAUSE_PATIENCE = 2.0
#: Seconds from the request for an end in which another process may do its part. After them no
#: conversation is waited for any more.
PARTING_S = 0.4


class Machine:
    """A virtual machine, from its description to its end; a context manager that leaves nothing
    behind.

    :param kernel: bzImage, vmlinux, PVH ELF or multiboot file. :param initrd: initial RAM disk,
        optional, or several in order; for multiboot the modules: ``FILE [ARGUMENTS][,FILE ...]``.
    :param append: more kernel command line. :param cpus: 1 to 255. :param memory: ``"256M"`` or
        bytes.
    :param nets: network cards, in PCI order. :param devices: other devices, each with a vhost-user
        back-end (docs/devices.md).
    :param shares: directories of the host that the guest mounts (docs/share.md); like ``command``,
        only with images built by pyvmm. :param root: a tree of the host for the guest's root
        (docs/root.md), likewise.
    :param disks: images of the host, in the order of the guest's names for them (docs/disk.md).
    :param command: an argv for our init (images built by pyvmm).
    :param on_reboot: ``"exit"`` or ``"restart"``.
    :param name: of the machine among the running ones (default: ``vm0``, ``vm1``, ...); only with a
        control socket.
    :param qmp: path of the control socket (docs/control.md), ``"auto"`` for a socket in the runtime
        directory, None for no socket; or a claim that has the socket and the machine's name, which
        the machine owns from here on.
    :param huge: back guest memory with huge pages.
    :param load_address: the kernel is a flat binary for this guest-physical address, entered in
        ``load_mode`` (``boot.FLAT_MODES``).
    :param test_devices: add the ports that test kernels expect of QEMU (docs/test-kernels.md); the
        command line is then ``append`` alone.
    :param trace: record events with their times for ``exits.trace.write``: at most so many per
        track; 0: none.
    :param hang_timeout: seconds after which a guest is ended that makes no progress and never will
        (docs/verdicts.md).
    :param agent: the guest's init, of an image of pyvmm's, runs no command of its own, but waits
        for those of ``run`` until ``power_off``.
    :param cpu: how the CPU differs from the host's, such as ``"host,-x2apic"`` (docs/cpu.md).
    :param add: files and directories for the guest, each ``FILE|DIR[:PATH]``, and
    :param modules: a tree of kernel modules: what Linux unpacks after the initrd (docs/add.md).
    :param stdin: a descriptor from which the command's standard input is read while the machine
        runs; it is lent. By default the command reads nothing.
    :param sandbox: ``off``, ``auto`` or ``on``: whether ``start`` confines this process, for good
        (docs/sandbox.md). It is off here because the process is the caller's: afterwards it can
        open hardly a file, start no program and make no other machine.
    :param ahead: has a VM for the machine, which takes the VM; None: the machine makes one.
    :raises PyvmmError: the machine cannot be made; nothing is left behind.

    ::

        with pyvmm.Machine(kernel=k, initrd=i, memory="128M", nets=[pyvmm.Net("emulated")]) as vm:
            vm.start()
            vm.console.expect("login:")
            outcome = vm.wait(timeout=60)
    """

    def __init__(
        self,
        kernel: str,
        *,
        initrd: str | Sequence[str] | None = None,
        append: str = "",
        cpus: int = 1,
        memory: str | int = "256M",
        nets: Sequence[Net] = (),
        devices: Sequence[Device] = (),
        shares: Sequence[Share] = (),
        disks: Sequence[Disk] = (),
        root: Root | None = None,
        command: Sequence[str] | None = None,
        on_reboot: str = "exit",
        name: str | None = None,
        qmp: str | Claim | None = None,
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
        sandbox: str = "off",
        ahead: Ahead | None = None,
    ) -> None:
        if sandbox not in CHOICES:
            raise UsageError(f"--sandbox {sandbox}", f"use {', '.join(CHOICES)}")
        if on_reboot not in ("exit", "restart"):
            raise UsageError(f"--on-reboot {on_reboot}", "use exit or restart")
        for net in nets:
            net.check_open()
        description = Description(
            kernel,
            initrd=initrd,
            append=append,
            cpus=cpus,
            memory=memory,
            nets=nets,
            devices=devices,
            shares=shares,
            disks=disks,
            root=root,
            command=command,
            huge=huge,
            load_address=load_address,
            load_mode=load_mode,
            test_devices=test_devices,
            trace=trace,
            hang_timeout=hang_timeout,
            agent=agent,
            cpu=cpu,
            add=add,
            modules=modules,
            stdin=stdin,
        )
        began = time.monotonic_ns()
        self.cpus, self._cpu = cpus, cpu or "host"
        self.on_reboot = on_reboot
        self.command_status: int | None = None
        #: Set when init runs (our init or the kernel's last words report it), and at the end.
        self.booted = threading.Event()
        self._pausing = threading.Lock()  # one pause or resume at a time
        #: Guards the request for an end. Held for a moment only, and never by a thread that waits.
        self._asking = threading.Lock()
        self._request: Outcome | None = None
        self._asleep = False
        self._stir = threading.Event()  # something has come that ends a sleep
        self._outcome: Outcome | None = None
        self._failure: BaseException | None = None
        self._done = threading.Event()
        self._supervisor: threading.Thread | None = None
        self._parting = threading.Timer(PARTING_S, self._cut)
        self._parting.daemon = True
        self._control: Door | None = None
        wires = Wires(
            end=self._finish,
            reached=self._reached,
            init_runs=self.booted.set,
            command_ended=self._command_ended,
            emit=self.emit,
            wake=self._stir.set,
        )
        self._stack = ExitStack()
        self._players: list[Player] = []
        self._sandbox = Sandbox(sandbox, nets, devices)
        self._stack.callback(self._sandbox.close)
        self._confined = False
        try:
            claim = None
            if qmp is not None:  # the name is taken first, because addresses follow from it
                from pyvmm.control.registry import Claim

                claim = (
                    Claim(name, None if qmp == "auto" else qmp, listen=False)
                    if isinstance(qmp, str)
                    else qmp
                )
                self._stack.callback(claim.close)
            self._parts = parts = Parts(
                description,
                wires,
                self._stack,
                began,
                claim.name if claim is not None else "",
                ahead,
            )
            self.memory, self.kvm, self.vm, self.bus = parts.memory, parts.kvm, parts.vm, parts.bus
            self.pci, self.nets, self.vcpus = parts.pci, parts.nets, parts.vcpus
            self.devices, self._cards = parts.plugs.devices, parts.plugs.cards
            self.console, self.stdout, self.stderr = parts.console, parts.stdout, parts.stderr
            self.channel, self.recorder = parts.channel, parts.recorder
            self.waits_for_commands = agent
            self.accounts, self.vcpu_threads = parts.accounts, parts.vcpu_threads
            if claim is not None:
                from pyvmm.control import Door

                self._control = Door(self, claim)
                self._stack.callback(self._control.close)
        except BaseException:
            self._stack.close()
            raise

    @property
    def boot(self) -> BootState:
        """How the guest starts."""
        return self._parts.boot

    @property
    def notes(self) -> list[str]:
        """What the user should know of what is added to the initrd, and of the guest's memory, one
        line each.
        """
        return self._parts.notes

    @property
    def input_error(self) -> OSError | None:
        """Why the command's standard input could not be read to its end; None if it could."""
        return self._parts.input.error if self._parts.input is not None else None

    @property
    def input_ignored(self) -> bool:
        """Whether there is standard input for the command, and the guest has not asked for it: its
        init is of an image that an older pyvmm has built.
        """
        return self._parts.input is not None and not self._parts.input.asked

    def cmdline(self) -> str:
        """The kernel command line."""
        return self._parts.cmdline

    # --- running ----------------------------------------------------------------------------------

    @property
    def sandbox(self) -> str:
        """``on`` or ``off``, and the reason if ``auto`` has not made it whole."""
        return self._sandbox.state

    def confine(self, files: Sequence[str] = ()) -> None:
        """Confine this process now, if ``sandbox`` asks for it; ``start`` does so otherwise. Call
        it before ``start``.

        :param files: files and directories that may be read afterwards, besides the machine's own.
        :raises SandboxError: the kernel refuses.
        """
        if not self._sandbox.wanted or self._confined:
            return
        self._confined = True
        removable = self._control.files() if self._control is not None else []
        with self._parts.lock:
            readable = [*self._parts.sources(), *files]
            self._sandbox.enter(readable, removable, self._thread_stopped)

    def _thread_stopped(self, thread: str, problem: str) -> None:
        """A thread of this process is not ours any more: end the machine, without that thread."""
        self.vcpu_threads.lose(thread)
        self._finish(Outcome("thread-stopped", problem), final=True)

    def start(self) -> None:
        """Let the guest run; returns at once."""
        if self._supervisor is not None:
            raise HostError("the machine has been started already")
        self.confine()
        for stream in self._parts.streams:
            stream.start()
        if self._parts.hang_watch is not None:
            self._parts.hang_watch.start()
        self._supervisor = Thread(target=self._supervise, name="supervisor", daemon=True)
        self._supervisor.start()

    def wait(self, timeout: float | None = None, *, boot_timeout: float | None = None) -> Outcome:
        """Wait for the end of the machine.

        :param timeout: seconds; after them the machine is stopped and the outcome is ``timeout``.
        :param boot_timeout: seconds until init must run, else likewise; also from this call on.
        :raises BaseException: an error in the VMM itself.
        """
        total = timeout
        if boot_timeout is not None and (timeout is None or boot_timeout < timeout):
            begin = time.monotonic()
            if not self.booted.wait(boot_timeout):
                self.stop(Outcome("timeout", f"init did not run within {boot_timeout:g} s"))
            elif timeout is not None:
                timeout = max(timeout - (time.monotonic() - begin), 0)
        if not self._done.wait(timeout):
            self.stop(Outcome("timeout", f"{total:g} s are over"))
        self._sandbox.hold(True)  # the caller may have much to do with a machine that has ended
        failure = self.vcpu_threads.failure or self._failure
        if failure is not None:
            raise failure
        assert self._outcome is not None
        return self._outcome

    def run(
        self,
        command: str | Sequence[str],
        *,
        input: bytes = b"",
        timeout: float = 60.0,
        ready_timeout: float = 120.0,
        user: str | None = None,
        env: Mapping[str, str] | None = None,
        cwd: str | None = None,
    ) -> CommandResult:
        """Run a command in the running guest, to its end; beside the guest's own command, or one
        after another with ``agent=True``. The guest runs an image of pyvmm's.

        :param command: for ``sh -c``, or an argv. :param input: its standard input. :param timeout:
            seconds; after them the command is killed.
        :param ready_timeout: seconds that the guest may take until it takes commands.
        :param user: ``NAME[:GROUP]`` or numbers (root). :param env: more environment. :param cwd:
            working directory (the home of ``user``, or that of the guest's own command).
        :raises PyvmmError: the guest ended (``Outcome.error``), or the command did not end in
            time.
        """
        if self.channel is None:
            raise UsageError("this machine takes no commands", "it needs Linux as its kernel")
        from pyvmm.devices.guest_agent import run

        try:
            return run(
                self.channel,
                command,
                input=input,
                timeout=timeout,
                ready_timeout=ready_timeout,
                user=user,
                env=env,
                cwd=cwd,
            )
        except CommandFailed as e:
            error = self._outcome.error() if self._outcome is not None else None
            if error is not None:
                raise error from e
            raise

    def power_off(self, timeout: float = 60.0) -> Outcome:
        """Let the guest's init power off; returns how the guest ended.

        :param timeout: seconds, as in ``wait``.
        """
        if self.channel is not None:
            self.channel.leave()
        return self.wait(timeout)

    @property
    def hears_of_readers(self) -> bool:
        """Whether the guest's init is told if nobody reads the output of its command any more, so
        that the command can end by SIGPIPE.
        """
        return self._parts.port.answers

    @property
    def outcome(self) -> Outcome | None:
        """How the machine ended; None before its end."""
        return self._outcome

    def stop(self, outcome: Outcome | None = None) -> None:
        """End the machine now; returns when no vCPU runs any more. Any thread but a vCPU's."""
        self.quit(outcome or Outcome("stopped"))
        self._done.wait()

    def quit(self, outcome: Outcome | None = None) -> None:
        """End the machine soon: ``stop`` without waiting. Without an outcome the end is the control
        socket's ``quit``.
        """
        if outcome is None:
            outcome = Outcome("stopped", "by the control socket")
            outcome.asked = True
        for stream in self._parts.streams:
            stream.hurry()
        self._finish(outcome, final=True)
        if self._supervisor is None:
            self._outcome = self._outcome or self._request
            self._done.set()
            self.booted.set()
            self._end_sessions(outcome)

    def close(self) -> None:
        """Stop, and release everything. A second call does nothing."""
        if not self._done.is_set():
            self.stop()
        self._sandbox.hold(False)
        if self._supervisor is not None:
            self._supervisor.join()
        self._cut()
        self._stack.close()

    def play(self, scenario: str | Scenario) -> Player:
        """Play a scenario of faults on demand (docs/scenarios.md), in a thread of its own, from the
        moment when the driver of its first step's card is ready. Any thread but a vCPU's.

        :param scenario: a file, or a name of pyvmm's own scenarios, or an object of
            ``pyvmm.scenario``.
        :return: the player, which the machine ends.
        :raises UsageError: there is none, or it is malformed, or about a card that there is not.
        """
        from pyvmm.scenario import Player, load

        what = load(scenario) if isinstance(scenario, str) else scenario
        player = Player(what, lambda: self.nets)
        self._players.append(player)
        self._stack.callback(player.close)
        return player

    # --- control ----------------------------------------------------------------------------------

    @property
    def name(self) -> str | None:
        """The machine's name; None without a control socket."""
        return self._control.name if self._control is not None else None

    @property
    def qmp(self) -> str | None:
        """Path of the control socket; None without one."""
        return self._control.path if self._control is not None else None

    @property
    def io_lock(self) -> threading.RLock:
        """The lock that device code holds, and a restart of the machine. Hold it to look at
        devices, VM and vCPUs from another thread.
        """
        return self._parts.lock

    @property
    def state(self) -> str:
        """``prelaunch``, ``running``, ``paused``, ``suspended``, ``shutdown`` or
        ``guest-panicked``: QEMU's RunState.
        """
        if self._done.is_set():
            return (
                "guest-panicked" if self._outcome and self._outcome.kind == "panic" else "shutdown"
            )
        if self._supervisor is None:
            return "prelaunch"
        if self._asleep:
            return "suspended"
        return "paused" if self.vcpu_threads.paused else "running"

    def pause(self) -> bool:
        """Stop the vCPUs, then park the data paths: when this returns, nothing changes guest memory
        or registers any more.

        Any thread but a vCPU's. Received packets wait in the tap or in the back-end. A vCPU whose
        output nobody reads is outside of the guest, and stops before it enters the guest again.
        ``wait`` and its time-outs go on.

        :returns: False if the machine was paused already.
        :raises HostError: the machine has ended.
        """
        with self._pausing:
            if self._done.is_set():
                raise HostError("the machine has ended")
            if self.vcpu_threads.paused:
                return False
            self.vcpu_threads.pause(PAUSE_PATIENCE)
            for card in self._cards:
                card.set_paused(True)
            self.emit("STOP")
            return True

    def resume(self) -> bool:
        """Go on after ``pause``. Any thread but a vCPU's.

        :returns: False if the machine was not paused.
        :raises PyvmmError: the machine has ended, or a data path does not start again: its card
            needs a reset, and everything else goes on.
        """
        with self._pausing:
            if self._done.is_set():
                raise HostError("the machine has ended")
            if not self.vcpu_threads.paused:
                return False
            failed: PyvmmError | None = None
            for card in self._cards:
                try:
                    card.set_paused(False)
                except PyvmmError as e:
                    failed = e
            self.vcpu_threads.resume()
            self.emit("RESUME")
            if failed is not None:
                raise failed
            return True

    def reset(self) -> None:
        """Press the reset button: the machine starts over soon, whatever ``on_reboot`` is. A paused
        machine stays paused.

        :raises HostError: the machine has ended, or is about to.
        """
        outcome = Outcome("reboot", "reset by the control socket")
        outcome.asked = True
        if self._supervisor is None:
            raise HostError("the machine has not been started", "start it")
        if not self._finish(outcome):
            other = self._request  # None: the machine has just started over
            if self._done.is_set() or (other is not None and not self._will_restart(other)):
                raise HostError("the machine has ended")

    def powerdown(self) -> None:
        """Press the power button (ACPI): the guest powers off if it has a driver for the button
        (docs/control.md). A guest that is suspended to memory wakes up.

        :raises HostError: the machine has ended.
        """
        if self._asleep:
            self.wake()
            return
        with self._parts.lock:
            if self._done.is_set():
                raise HostError("the machine has ended")
            for level in (1, 0):
                self.vm.irq_line(IRQ_GED, level)
        self.emit("POWERDOWN")

    def add_nic(self, net: Net | str, *, name: str | None = None) -> Nic:
        """Plug in a network card; also while the guest runs (docs/hotplug.md). Any thread but a
        vCPU's.

        :param net: the card, as in ``nets``, or as with ``--net``. :param name: ``net0`` to
            ``net30``; by default the first that is free.
        :returns: the card, whose driver the guest may not have loaded yet.
        :raises PyvmmError: the card cannot be made, or the machine takes none; nothing is left
            behind.
        """
        self._check_plugs()
        if isinstance(net, str):
            from pyvmm.netopt import Net

            net = Net.parse(net)
        net.check_open()
        nic = self._parts.plugs.add(net, name)
        with self._pausing:
            if self.vcpu_threads.paused:
                nic.set_paused(True)
        return nic

    def ask_removal(self, nic: Nic | str) -> Removal:
        """Ask the guest to let go of a card, and do not wait. Any thread but a vCPU's.

        :param nic: the card or its name.
        :raises PyvmmError: there is no such card, or the machine cannot lose it.
        """
        self._check_plugs()
        if isinstance(nic, str):
            found = next((n for n in self.nets if n.name == nic), None)
            if found is None:
                names = ", ".join(n.name for n in self.nets) or "none"
                raise UsageError(f"there is no card {nic!r}", f"cards: {names}")
            nic = found
        return self._parts.plugs.ask(nic)

    def remove_nic(self, nic: Nic | str, *, timeout: float = 30.0) -> None:
        """Remove a network card: the guest lets go of it, then everything that the card held is
        given back (docs/hotplug.md). Any thread but a vCPU's.

        :param nic: the card or its name. :param timeout: seconds for the guest. The request stands
            after them, and another call repeats it.
        :raises GuestTimeout: the guest has not let go of the card in time.
        :raises PyvmmError: there is no such card, the machine cannot lose it or has ended, or
            something could not be given back in order.
        """
        removal = self.ask_removal(nic)
        if not removal.done.wait(timeout):
            raise GuestTimeout(
                f"the guest has not let go of {removal.nic.name} within {timeout:g} s",
                "the request stands; repeat it, or reset the machine",
            )
        if removal.error is not None:
            raise removal.error
        if not removal.gone:
            raise HostError("the machine has ended")

    def nic_state(self, nic: Nic) -> str:
        """``added`` until the guest has read of a card, ``removing`` while it is to let go of the
        card, else ``present``.
        """
        return self._parts.plugs.state(nic)

    def _check_plugs(self) -> None:
        """:raises HostError: no card can come or go."""
        if self._done.is_set():
            raise HostError("the machine has ended")
        if not self._parts.is_linux():
            raise HostError(
                f"this guest ({self.boot.kind}) does not know of cards that come and go",
                "only Linux does; give the cards by --net at the start",
            )

    def wake(self) -> None:
        """Wake up a guest that is suspended to memory (S3).

        :raises HostError: it is not suspended, or the machine has ended.
        """
        if self._done.is_set():
            raise HostError("the machine has ended")
        if not self._asleep:
            raise HostError("the guest is not suspended")
        self._stir.set()

    def emit(self, event: str, **data: object) -> None:
        """Send an event to the clients of the control socket. Any thread; never waits."""
        if self._control is not None:
            self._control.emit(
                event, {key.replace("_", "-"): value for key, value in data.items()} or None
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        exc: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _finish(self, outcome: Outcome, *, final: bool = False) -> bool:
        """Ask for the end with ``outcome``. The first reason stands, unless it is a reboot and the
        new reason is final, or a sleep. Any thread; never waits, whatever else the machine is
        doing.

        :returns: whether ``outcome`` is now the reason.
        """
        with self._asking:
            first = self._request.kind if self._request is not None else "suspend"
            if first != "suspend" and not (final and first == "reboot"):
                return False
            outcome.status = self.command_status
            self._request = outcome
            for stream in self._parts.streams:
                stream.release()
            self.vcpu_threads.halt()
            self._stir.set()
            if self._cards and not self._will_restart(outcome) and self._parting.ident is None:
                aside(self._parting.start)
            return True

    def _cut(self) -> None:
        """End the cards' conversations with other processes. Any thread; takes no lock that a
        conversation holds.
        """
        self._parts.plugs.cut()

    def _reached(self, point: str) -> None:
        """The guest's init has come to ``point``."""
        self.accounts.reach(point)
        if point == "init":
            self.booted.set()

    def _command_ended(self, status: int) -> None:
        self.command_status = status

    def _will_restart(self, request: Outcome) -> bool:
        if request.kind == "suspend":
            return True
        return request.kind == "reboot" and (request.asked or self.on_reboot == "restart")

    def _supervise(self) -> None:
        """The supervisor's thread: run the guest, start it over if necessary, report the end."""
        try:
            outcome = self._run_guest()
        except BaseException as e:
            self._failure = e
            outcome = Outcome("stopped", str(e))
        try:
            self._shut_down(outcome)
        except BaseException as e:
            self._failure = self._failure or e
        self._outcome = outcome
        if self._control is not None:
            self._control.ended(outcome)
        self._done.set()
        self.booted.set()
        self._end_sessions(outcome)

    def _end_sessions(self, outcome: Outcome) -> None:
        """Tell those who wait for commands in the guest that it has ended."""
        if self.channel is not None:
            error = outcome.error()
            self.channel.gone(
                f"the guest has ended ({outcome.kind})",
                error.exit_code if error is not None else GuestEnded.exit_code,
            )

    def _run_guest(self) -> Outcome:
        """Run the vCPUs, and start the guest over after a reset, until a final end; returns it."""
        while True:
            self.vcpu_threads.run()
            request = self._request
            assert request is not None
            if request.kind == "reboot" and not request.asked:
                self._name_panic(request)
            if not self._will_restart(request):
                return request
            try:
                for card in self._cards:  # without the I/O lock: other processes have a part in it
                    card.reset()
            except HostError:
                if self._request is request:
                    raise
                continue  # stopped for good meanwhile
            if request.kind == "suspend":
                self._sleep(request)
                continue
            with self._parts.lock:
                if self._request is not request:
                    continue  # meanwhile the machine has been stopped
                self._parts.restart()
            with self._asking:
                if self._request is not request:
                    continue
                self._request = None
                self.vcpu_threads.rearm()
            self.emit(
                "RESET",
                guest=not request.asked,
                reason="host-qmp-system-reset" if request.asked else "guest-reset",
            )

    def _sleep(self, request: Outcome) -> None:
        """Suspended to memory (S3): wait until something wakes the guest, or the machine is to end
        or to start over. No vCPU runs, and the cards are as after a reset.
        """
        with self._asking:
            if self._request is not request:
                return
            self._request = None
            self._stir.clear()
            self._asleep = True
        self.emit("SUSPEND")
        if not self._parts.power.pm1.wakes:  # an alarm may have come before
            self._stir.wait()
        with self._parts.lock:
            with self._asking:
                self._asleep = False
                if self._request is not None:
                    return
            woken = self._parts.wake()
        if not woken:
            self._finish(Outcome("reboot", "the guest slept without a waking vector"))
            return
        with self._asking:
            if self._request is None:
                self.vcpu_threads.rearm()
        self.emit("WAKEUP")

    def _shut_down(self, outcome: Outcome) -> None:
        """After the last vCPU has stopped: note where each one was, then stop the other parts."""
        for player in self._players:
            player.halt()
        self.vcpu_threads.end()
        if self._parts.hang_watch is not None:
            self._parts.hang_watch.stop()
        self._parts.panics.stop()
        self.accounts.reach("end")
        if outcome.kind in ("timeout", "hang"):
            outcome.states = [v.state() for v in self.vcpus]
            registers = [v.registers() for v in self.vcpus]
            outcome.rips = [r["rip"] for r in registers]
            stuck = [i for i, state in enumerate(outcome.states) if state == RUNS_OFF]
            outcome.registers = registers[stuck[0] if stuck else 0]
        self._parts.plugs.give_up()
        with ExitStack() as rest:  # the others, too, if a card's data path does not stop in order
            rest.callback(self._name_panic, outcome)
            for stream in reversed(self._parts.streams):
                rest.callback(stream.finish)
            rest.callback(self._parting.cancel)
            for card in reversed(list(self._cards)):
                rest.callback(card.stop)

    def _name_panic(self, request: Outcome) -> None:
        """Report an end as a panic, if a panic has led to it."""
        if request.kind == "reboot" and self.on_reboot == "exit" and not self._parts.panics.text():
            self.console.finish(0.2)  # panic=-1 reboots while its text is still in the pipe
        self._parts.panics.judge(request)

    # --- what it has counted ----------------------------------------------------------------------

    @property
    def phases(self) -> dict[str, int]:
        """The points that the guest has reached -> CLOCK_MONOTONIC, ns (docs/report.md)."""
        return self.accounts.phases

    @property
    def reboots(self) -> int:
        """How often the machine has started over."""
        return self.accounts.reboots

    def ledger(self) -> Ledger:
        """The exits up to now."""
        return self.accounts.ledger()

    def kvm_stats(self) -> dict[str, Any] | None:
        """KVM's binary statistics of the VM and its vCPUs; None if the kernel has none."""
        return self.accounts.kvm_stats()

    @property
    def old_stats(self) -> list[dict[str, Any]]:
        """KVM's statistics of the VMs before each restart, the latest ``accounts.OLD_STATS``."""
        return self.accounts.old_stats

    def phase_exits(self) -> list[Phase]:
        """Exits, KVM's statistics and packets of each phase so far: ``boot``, ``init``,
        ``command``, ``shutdown``.
        """
        from pyvmm.exits.phases import phases_of

        return phases_of(self.accounts)

    def check_budget(self, text: str) -> Result:
        """Check a budget such as ``notify_per_kpacket<=20`` (docs/budgets.md), against the counts
        up to now if the machine runs.

        :raises UsageError: the text is no budget, or limits what the machine does not count.
        """
        from pyvmm.exits.budget import Budget

        budget = Budget(text)
        budget.check_names(self.accounts)
        return budget.check(self.accounts)

    def report(self) -> dict[str, object]:
        """All counts of the run, for JSON (docs/report.md). Call it before ``close``."""
        from pyvmm.exits.report import build

        return build(
            self.accounts,
            self._outcome,
            memory_bytes=self.memory.size,
            cpu=self._cpu,
            boot=self.boot,
            cmdline=self.cmdline(),
            streams=(self.console, self.stdout, self.stderr),
            sandbox=self.sandbox,
        )
