"""Boot a guest; run a command in it, or give it the terminal.

With COMMAND the guest runs it, its output comes here, and pyvmm exits with its status. Without,
this terminal is the guest's console: Ctrl-A x leaves, Ctrl-A Ctrl-A types Ctrl-A.

Examples:
  pyvmm run -- ip addr pyvmm run --cpus 2 --memory 512M --net emulated,mtu=9000 --report report.json
  -- ping -c 3 192.168.100.1 pyvmm run --kernel bzImage --initrd initrd.img --append 'loglevel=7'
  --timeout 60 pyvmm run --net vhost-net,queues=2 --cpus 2 --exits -- iperf3 -c 192.168.100.1 pyvmm
  run --net emulated,notify=exit --exits -- iperf3 -c 192.168.100.1 pyvmm run --budget 'notify==0'
  --budget 'user_exits<=100' -- ping -c 100 -i 0.01 192.168.100.1 pyvmm run --trace trace.json --net
  vhost-net -- ping -c 3 192.168.100.1 pyvmm run --kernel vmlinux --boot-timeout 30 --fail-on
  oops,warning --junit result.xml --log console.log -- run-tests pyvmm run --kernel vmlinux
  --timeout 300 --hang-timeout 10 --json verdict.json -- run-tests

Network cards: --net MODE[,key=value...], once a card
  emulated    the data path in this process vhost-net   the data path in the kernel: no packet wakes
  this process up; needs /dev/vhost-net vhost-user  the data path in another process, such as `pyvmm
  backend` or DPDK's (docs/vhost-user.md) none        no card Keys of all:
      tap=NAME        an existing tap (default: one of pyvmm's own, in a network namespace of its
      own) mac=, mtu=      the guest's MAC address; the MTU offered to it, 68..65521 host=, guest=
      addresses with prefix length (default 192.168.100.1/24 and .2/24, then .101., ...) queues=N
      queue pairs, 1 to 16 (1); a user's tap must be a multi-queue one for more queue-size=N
      entries a queue (256) link=off        start with the cable pulled (on) worker-cpu=N    the
      worker of pair k runs on CPU N + k only switchable=A+B  the data path may later be switched to
      modes A and B (docs/switch.md): offer what all can
                      honour; keys of all these modes may be given
      without=A+B     do not offer: offloads, tso, mrg-rxbuf, indirect, event-idx, ctrl-vq
      notify=exit     each kick is an exit of the vCPU, as in the classic device (default:
      ioeventfd)
  Of emulated alone:
      poll=USEC       look for more that long before sleeping (0)
  Of vhost-user alone, which has no worker-cpu=, and with socket= no tap=:
      socket=PATH     where the back-end listens (default: start one of pyvmm's own, on a tap as
      above) server=on       listen there, and the back-end connects (off)

Exit status: the guest command's; or 2 bad usage, 102..104 no usable KVM, 105 bad kernel or initrd,
106..107 network, 108 no vhost-net, 112 no fitting vhost-user back-end, 116 the guest hangs
(--hang-timeout), 117 a --budget is broken, 118 the kernel reported what --fail-on names, 119 the
guest ended before the command did, 120 panic, 121 reboot, 122 triple fault, 123 KVM error, 124
time-out, 130 Ctrl-C, 143 SIGTERM.
"""

from __future__ import annotations

import os
import sys
import time

from pyvmm.cli.support.values import count, seconds, trouble_kinds

TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse
    from typing import Any

    from pyvmm.card.nic import Nic
    from pyvmm.cli.support.verdicts import Extras
    from pyvmm.machine import Machine
    from pyvmm.outcome import Outcome


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    add = parser.add_argument
    add(
        "--kernel",
        metavar="K",
        help="bzImage, vmlinux, PVH ELF or multiboot kernel (default: the image built by `pyvmm image build`)",
    )
    add("--initrd", metavar="I", help="initial RAM disk")
    add("--image", metavar="NAME", help="a built image by name, see `pyvmm image list`")
    add("--append", metavar="S", default="", help="more kernel command line")
    add("--cpus", metavar="N", type=int, default=1, help="virtual CPUs, 1 to 64 (1)")
    add("--memory", metavar="SIZE", default="256M", help="guest memory, as 256M or 4G (256M)")
    add(
        "--memory-backing",
        choices=("memfd", "huge"),
        default="memfd",
        help="what it is made of: memfd, or memfd of reserved huge pages (memfd)",
    )
    add("--net", metavar="MODE[,K=V]", action="append", help="a network card, see below (emulated)")
    add(
        "--timeout",
        metavar="S",
        type=seconds(0, 1e7),
        help="seconds until the guest is stopped, exit status 124",
    )
    add(
        "--boot-timeout",
        metavar="S",
        type=seconds(0, 1e7),
        help="seconds until init runs, likewise",
    )
    add(
        "--hang-timeout",
        metavar="S",
        type=seconds(0.1, 1e7),
        help="seconds without any progress, exit status 116",
    )
    add(
        "--fail-on",
        metavar="LIST",
        type=trouble_kinds,
        help="exit with 118 on these in the console: oops,warning,bug,rcu-stall,lockdep or all",
    )
    add(
        "--junit",
        metavar="FILE",
        help="write the verdict, and KTAP results in the output, as JUnit XML",
    )
    add(
        "--json",
        metavar="FILE",
        help="write the verdict with its reasons and phase times as JSON ('-': stdout)",
    )
    add("--log", metavar="FILE", help="write the console with time stamps")
    add(
        "--vmlinux",
        metavar="FILE",
        help="kernel with symbols, to say where a guest hung (default: --kernel)",
    )
    add(
        "--report",
        metavar="FILE",
        help="write exits, phases, features and counters as JSON ('-': stdout)",
    )
    add(
        "--trace",
        metavar="FILE",
        help="write a timeline for ui.perfetto.dev: exits, kicks, interrupts, batches, set-up (docs/trace.md)",
    )
    add(
        "--trace-events",
        metavar="N",
        type=count(16, 1 << 24),
        default=32768,
        help="so many of the latest a vCPU or worker, 56 bytes each (32768)",
    )
    add("--exits", action="store_true", help="print at the end how often the guest exited, and why")
    add(
        "--budget",
        metavar="B",
        action="append",
        help="exit with 117 if it is broken: 'user_exits<=5000', 'notify_per_kpacket<=20', 'exits[serial0]<=100' (docs/budgets.md)",
    )
    add(
        "--on-reboot",
        choices=("exit", "restart"),
        default="exit",
        help="what a guest's reboot does (exit)",
    )
    add(
        "--name",
        metavar="NAME",
        help="name of the machine, for `pyvmm stop NAME` and the like (vm0, vm1, ...)",
    )
    add(
        "--qmp",
        metavar="PATH",
        help="its control socket, or none (default: in the runtime directory)",
    )
    add("--host", choices=("auto", "local", "testbed"), default="auto", help="where to run (auto)")
    add(
        "--verbose",
        "-v",
        action="store_true",
        help="show the guest's console on stderr while COMMAND runs",
    )
    add("guest_command", metavar="COMMAND", nargs="*", help="after --: what the guest runs")


def run(args: argparse.Namespace) -> int:
    """Choose the host, then run the guest there."""
    from pyvmm.cli.support.hostchoice import elsewhere
    from pyvmm.cli.support.signals import orderly
    from pyvmm.errors import UsageError

    if args.json == "-" and args.report == "-":
        raise UsageError("--json - and --report - both write to stdout", "give one a file")
    if args.budget:
        from pyvmm.exits.budget import Budget

        args.budget = [Budget(text) for text in args.budget]
    at = args.argv.index("run") + 1
    vhost = any("vhost-net" in net for net in args.net or ())
    status = elsewhere(
        args.host, args.kernel, ["run", "--host", "local", *args.argv[at:]], vhost=vhost
    )
    return orderly(lambda: _boot(args)) if status is None else status


def _boot(args: argparse.Namespace) -> int:
    from pyvmm.errors import HostError, PyvmmError
    from pyvmm.machine import Machine
    from pyvmm.netopt import Net

    command = args.guest_command or None
    guard = None
    if args.timeout is not None:
        from pyvmm.cli.support.watchdog import LastResort

        guard = LastResort(args.timeout)
    extras: Extras | None = None
    report = trace = None
    vm: Machine | None = None
    try:
        if args.fail_on or args.log or args.junit or args.json:
            from pyvmm.cli.support.verdicts import Extras

            extras = Extras(args)
            if guard is not None:
                guard.extras = extras
        nets = [Net.parse(text) for text in args.net or ["emulated"]]
        kernel, initrd, append = args.kernel, args.initrd, args.append
        if kernel is None:
            from pyvmm.images import CMDLINE, find

            image = find(args.image or "default")
            kernel, initrd = image.kernel, initrd or image.initrd
            append = f"{CMDLINE} {append}".rstrip()
        report = _open_report(args.report)
        trace = _open_report(args.trace, "--trace")
        with Machine(
            kernel,
            initrd=initrd,
            append=append,
            cpus=args.cpus,
            memory=args.memory,
            huge=args.memory_backing == "huge",
            nets=nets,
            command=command,
            on_reboot=args.on_reboot,
            name=args.name,
            qmp=_qmp(args),
            trace=args.trace_events if args.trace is not None else 0,
            hang_timeout=args.hang_timeout,
        ) as vm:
            for nic in vm.nets:
                if nic.net.switchable:
                    _tell_offer(nic)
            if extras is not None:
                extras.attach(vm)
            for budget in args.budget or ():
                budget.check_names(vm)
            if guard is not None:
                guard.close()
                guard.arm()
            try:
                outcome = _attend(vm, args, interactive=command is None)
            finally:
                if trace is not None:
                    _write_trace(vm, trace)
            verdict = _verdict(vm, outcome, args, kernel, extras)
            if report is not None:
                _write_report(vm, report, verdict)
            if args.exits:
                from pyvmm.cli.support.tables import exits_table

                print(exits_table(vm), file=sys.stderr)
            return int(verdict["code"])
    except BaseException as e:
        if extras is not None or "GITHUB_ACTIONS" in os.environ:
            from pyvmm.cli.support.verdicts import broken_off

            broken_off(e, vm, extras)
        if isinstance(e, PyvmmError) or not isinstance(e, Exception):
            raise
        import traceback  # ours to mend: no status of a test's must come of it

        traceback.print_exc()
        raise HostError("pyvmm itself failed, see above", "please report it") from None
    finally:
        for fd in (report, trace):
            if fd is not None and fd > 2:
                os.close(fd)
        if guard is not None:
            guard.close()
        if extras is not None:
            extras.close()


def _qmp(args: argparse.Namespace) -> str | None:
    """Where the control socket is to be: a machine that nobody named runs without where there is no
    place for one.
    """
    from pyvmm.control.registry import directory
    from pyvmm.errors import HostError, UsageError

    if args.qmp == "none":
        if args.name is not None:
            raise UsageError(
                "--name with --qmp none", "a machine without a control socket has no name"
            )
        return None
    if args.qmp is None and args.name is None:
        try:
            directory()
        except HostError as e:
            print(f"pyvmm: no control socket: {e}", file=sys.stderr)
            return None
    return args.qmp or "auto"


def _tell_offer(nic: Nic) -> None:
    """What the modes of ``switchable=`` have in common."""
    from pyvmm.virtio.features import names

    modes = ", ".join([nic.net.mode, *nic.net.switchable])
    offer = " ".join(names(nic.device.offered()))
    print(f"pyvmm: {nic.name} can be switched between {modes}; offers {offer}", file=sys.stderr)


def _attend(vm: Machine, args: argparse.Namespace, *, interactive: bool) -> Outcome:
    """Let the guest run to its end; who reads its output slowly gets the rest after that."""
    start = time.monotonic()
    outcome = _run_guest(vm, args, interactive=interactive)
    left = None if args.timeout is None else max(0.0, start + args.timeout - time.monotonic())
    for stream in (vm.console, vm.stdout, vm.stderr):
        stream.drain(left)
    return outcome


def _run_guest(vm: Machine, args: argparse.Namespace, *, interactive: bool) -> Outcome:
    from pyvmm.devices.console import FdSink

    if not interactive:
        vm.stdout.add_sink(FdSink(1))
        vm.stderr.add_sink(FdSink(2))
        if args.verbose:
            vm.console.add_sink(FdSink(2))
        vm.start()
        return vm.wait(args.timeout, boot_timeout=args.boot_timeout)
    from pyvmm.cli.support.terminal import Terminal

    vm.console.add_sink(FdSink(1))
    vm.stdout.add_sink(FdSink(1))
    vm.stderr.add_sink(FdSink(2))
    terminal = Terminal(vm)
    try:
        terminal.open()
        vm.start()
        return vm.wait(args.timeout, boot_timeout=args.boot_timeout)
    finally:
        terminal.close()


def _verdict(
    vm: Machine, outcome: Outcome, args: argparse.Namespace, kernel: str, extras: Extras | None
) -> dict[str, Any]:
    """The verdict, as the report has it; what is not orderly is told on stderr with what helps to
    find out why.
    """
    commanded = bool(args.guest_command)
    budgets = [budget.check(vm) for budget in args.budget or ()]
    held = all(result.held for result in budgets)
    if (
        extras is None
        and held
        and outcome.error() is None
        and (outcome.status == 0 or not commanded)
    ):
        passed = {"kind": "passed", "code": outcome.status or 0, "message": ""}
        return passed | ({"budgets": [result.as_dict() for result in budgets]} if budgets else {})
    from pyvmm.cli.support.verdicts import judge, tell

    watch = extras.watch if extras is not None else None
    verdict = judge(
        vm,
        outcome,
        commanded=commanded,
        watch=watch,
        symbols=args.vmlinux or kernel,
        budgets=budgets,
    )
    tell(vm, verdict, shown=not commanded or args.verbose)
    if extras is not None:
        extras.finish(verdict, vm)
        extras.lost(vm)
    told: dict[str, Any] = {"kind": verdict.kind, "code": verdict.code, "message": verdict.message}
    return told | ({"budgets": [result.as_dict() for result in budgets]} if budgets else {})


def _open_report(path: str | None, option: str = "--report") -> int | None:
    """Open the report's or the trace's file before the guest runs: a bad path must not cost a whole
    run.
    """
    from pyvmm.errors import UsageError

    if path is None:
        return None
    if path == "-":
        return 1
    try:
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
    except OSError as e:
        raise UsageError(f"{option} {path}: {e.strerror}", "name a file that can be written") from e


def _write_trace(vm: Machine, fd: int) -> None:
    """A trace that cannot be written is no reason to lose the run's verdict."""
    from pyvmm.exits.trace import write

    def put(data: bytes) -> None:
        view = memoryview(data)
        while view:
            view = view[os.write(fd, view) :]

    try:
        write(vm, put)
    except OSError as e:
        print(f"pyvmm: the trace is lost: {e.strerror}", file=sys.stderr)


def _write_report(vm: Machine, fd: int, verdict: dict[str, Any]) -> None:
    import json

    text = json.dumps({**vm.report(), "verdict": verdict}, indent=2) + "\n"
    try:
        if fd <= 2:
            sys.stdout.write(text)
        data = memoryview(text.encode() if fd > 2 else b"")
        while data:
            data = data[os.write(fd, data) :]
    except OSError as e:
        print(f"pyvmm: the report is lost: {e.strerror}", file=sys.stderr)
