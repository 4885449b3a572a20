"""Boot a guest; run a command in it, or give it the terminal.

With COMMAND the guest runs it, its output comes here, and pyvmm exits with its status. Without, this terminal is
the guest's console: Ctrl-A x leaves, Ctrl-A Ctrl-A types Ctrl-A.

Examples:
  pyvmm run -- ip addr
  pyvmm run --cpus 2 --memory 512M --net emulated,mtu=9000 --report report.json -- ping -c 3 192.168.100.1
  pyvmm run --kernel bzImage --initrd initrd.img --append 'loglevel=7' --timeout 60
  pyvmm run --net vhost-net,queues=2 --cpus 2 --exits -- iperf3 -c 192.168.100.1
  pyvmm run --net emulated,notify=exit --exits -- iperf3 -c 192.168.100.1

Network cards: --net MODE[,key=value...], once a card
  emulated    the data path in this process
  vhost-net   the data path in the kernel: no packet wakes this process up; needs /dev/vhost-net
  vhost-user  the data path in another process, such as `pyvmm backend` or DPDK's (docs/vhost-user.md)
  none        no card
  Keys of all:
      tap=NAME        an existing tap (default: one of pyvmm's own, in a network namespace of its own)
      mac=, mtu=      the guest's MAC address; the MTU offered to it, 68..65521
      host=, guest=   addresses with prefix length (default 192.168.100.1/24 and .2/24, then .101., ...)
      queues=N        queue pairs, 1 to 16 (1); a user's tap must be a multi-queue one for more
      queue-size=N    entries a queue (256)
      link=off        start with the cable pulled (on)
      worker-cpu=N    the worker of pair k runs on CPU N + k only
      without=A+B     do not offer: offloads, tso, mrg-rxbuf, indirect, event-idx, ctrl-vq
      notify=exit     each kick is an exit of the vCPU, as in the classic device (default: ioeventfd)
  Of emulated alone:
      poll=USEC       look for more that long before sleeping (0)
  Of vhost-user alone, which has no tap= and no worker-cpu=:
      socket=PATH     where the back-end listens
      server=on       listen there, and the back-end connects (off)

Exit status: the guest command's; or 2 bad usage, 102..104 no usable KVM, 105 bad kernel or initrd, 106..107 network, 108 no
vhost-net, 112 no fitting vhost-user back-end, 119 the guest
ended before the command did, 120 panic, 121 reboot, 122 triple fault, 123 KVM error, 124 time-out, 130 Ctrl-C, 143 SIGTERM.
"""

from __future__ import annotations

import os
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse

    from pyvmm.machine import Machine, Outcome


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
    add("--net", metavar="MODE[,K=V]", action="append", help="a network card, see below (emulated)")
    add("--timeout", metavar="S", type=float, help="seconds until the guest is stopped, exit status 124")
    add("--report", metavar="FILE", help="write exits, phases, features and counters as JSON ('-': stdout)")
    add("--exits", action="store_true", help="print at the end how often the guest exited, and why")
    add("--on-reboot", choices=("exit", "restart"), default="exit", help="what a guest's reboot does (exit)")
    add("--host", choices=("auto", "local", "testbed"), default="auto", help="where to run (auto)")
    add("--verbose", "-v", action="store_true", help="show the guest's console on stderr while COMMAND runs")
    add("guest_command", metavar="COMMAND", nargs="*", help="after --: what the guest runs")


def run(args: argparse.Namespace) -> int:
    """Choose the host, then run the guest there."""
    from pyvmm.cli.signals import orderly
    from pyvmm.cli.where import elsewhere
    from pyvmm.errors import UsageError

    if args.timeout is not None and not 0 < args.timeout <= 1e7:
        raise UsageError(f"--timeout {args.timeout:g}", "use a positive number of seconds")
    at = args.argv.index("run") + 1
    vhost = any(net.partition(",")[0] == "vhost-net" for net in args.net or ())
    status = elsewhere(args.host, args.kernel, ["run", "--host", "local", *args.argv[at:]], vhost=vhost)
    return orderly(lambda: _boot(args)) if status is None else status


def _boot(args: argparse.Namespace) -> int:
    from pyvmm.machine import Machine
    from pyvmm.net import Net

    nets = [Net.parse(text) for text in args.net or ["emulated"]]
    kernel, initrd, append = args.kernel, args.initrd, args.append
    if kernel is None:
        from pyvmm.images import CMDLINE, find

        image = find(args.image or "default")
        kernel, initrd = image.kernel, initrd or image.initrd
        append = f"{CMDLINE} {append}".rstrip()
    report = _open_report(args.report)
    command = args.guest_command or None
    try:
        with Machine(
            kernel,
            initrd=initrd,
            append=append,
            cpus=args.cpus,
            memory=args.memory,
            nets=nets,
            command=command,
            on_reboot=args.on_reboot,
        ) as vm:
            status = _attend(vm, args, interactive=command is None)
            if report is not None:
                _write_report(vm, report)
            if args.exits:
                from pyvmm.cli.tables import exits_table

                print(exits_table(vm), file=sys.stderr)
            return status
    finally:
        if report is not None and report > 2:
            os.close(report)


def _attend(vm: Machine, args: argparse.Namespace, *, interactive: bool) -> int:
    from pyvmm.devices.console import FdSink

    if interactive:
        from pyvmm.cli.terminal import Terminal

        vm.console.add_sink(FdSink(1))
        vm.stdout.add_sink(FdSink(1))
        vm.stderr.add_sink(FdSink(2))
        terminal = Terminal(vm)
        try:
            terminal.open()
            vm.start()
            outcome = vm.wait(args.timeout)
        finally:
            terminal.close()
    else:
        vm.stdout.add_sink(FdSink(1))
        vm.stderr.add_sink(FdSink(2))
        if args.verbose:
            vm.console.add_sink(FdSink(2))
        vm.start()
        outcome = vm.wait(args.timeout)
    return _verdict(vm, outcome, commanded=not interactive, shown=interactive or args.verbose)


def _verdict(vm: Machine, outcome: Outcome, *, commanded: bool, shown: bool) -> int:
    """The exit status; what is not orderly is told on stderr with what helps to find out why."""
    from pyvmm.errors import GuestEnded

    error = outcome.error()
    if error is None and commanded and outcome.status is None and outcome.kind != "stopped":
        error = GuestEnded("the guest powered off before the command ended", "see its console: --verbose")
    if error is None:
        return outcome.status or 0
    if not shown and vm.console.text:
        tail = bytes(vm.console.text[-2000:]).decode(errors="replace").splitlines()[-20:]
        print("pyvmm: the last of the guest's console:", *tail, sep="\n  ", file=sys.stderr)
    if outcome.registers:
        items = [f"{name} {value:016x}" for name, value in outcome.registers.items()]
        for i in range(0, len(items), 4):
            print("  " + "  ".join(items[i : i + 4]), file=sys.stderr)
    print(f"pyvmm: {error}", file=sys.stderr)
    return error.exit_code


def _open_report(path: str | None) -> int | None:
    """Open the report's file before the guest runs: a bad path must not cost a whole run."""
    from pyvmm.errors import UsageError

    if path is None:
        return None
    if path == "-":
        return 1
    try:
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
    except OSError as e:
        raise UsageError(f"--report {path}: {e.strerror}", "name a file that can be written") from e


def _write_report(vm: Machine, fd: int) -> None:
    import json

    text = json.dumps(vm.report(), indent=2) + "\n"
    try:
        os.write(fd, text.encode()) if fd > 2 else sys.stdout.write(text)
    except OSError as e:
        print(f"pyvmm: the report is lost: {e.strerror}", file=sys.stderr)
