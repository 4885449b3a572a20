"""Boot a guest; run a command in it, or connect this terminal to its console.

With COMMAND the guest runs it, its output is printed here, and pyvmm exits with its status. Without
COMMAND this terminal is the guest's console: Ctrl-A x ends the machine, Ctrl-A Ctrl-A types Ctrl-A.
If standard input is a file or a pipe, COMMAND reads it; without COMMAND, a shell in the guest reads
its commands from there.

Examples:
  pyvmm run -- ip addr
  pyvmm run --cpus 2 --net emulated,mtu=9000 --report report.json -- ping -c 3 192.168.100.1
  pyvmm run --kernel bzImage --initrd initrd.img --append 'loglevel=7' --timeout 60
  pyvmm run --net vhost-net,queues=2 --cpus 2 --exits -- ping -q -c 100 -i 0.01 192.168.100.1
  pyvmm run --net vhost-net,internet=on -- wget -qO- http://10.0.2.2:8000/
  pyvmm run --net vhost-net,bridge=br0 -- sh -c 'udhcpc -i eth0 -q && ping -c 3 example.com'
  pyvmm run --net emulated,notify=exit --exits -- ping -q -c 100 -i 0.01 192.168.100.1
  pyvmm run --detach --name vm0 -- ping 192.168.100.1
  pyvmm run --budget 'notify==0' --budget 'user_exits<=100' -- ping -c 100 -i 0.01 192.168.100.1
  pyvmm run --trace trace.json --net vhost-net -- ping -c 3 192.168.100.1
  pyvmm run --explain page.html --net emulated -- ping -c 3 192.168.100.1
  pyvmm run --pcap dump.pcapng -- ping -c 3 192.168.100.1
  pyvmm run --kernel vmlinux --fail-on oops,warning --junit r.xml --log console.log -- run-tests
  pyvmm run --kernel vmlinux --timeout 300 --hang-timeout 10 --json verdict.json -- run-tests
  pyvmm run --add build/mytest --add data:/data -- mytest /data/cases
  pyvmm run --kernel bzImage --initrd default --modules . -- modprobe btrfs
  tar c results | pyvmm run -- tar x
  pyvmm run --root / -- python3 -m pytest -q
  pyvmm run --root tree --init systemd --memory 512M -- systemctl is-system-running --wait
  pyvmm run --share .:rw -- ./run-my-test.sh
  pyvmm run --share ~/cases:/cases --share out:/out:rw -- sh -c 'ls /cases >/out/list'
  pyvmm run --disk scratch.raw -- sh -c 'mke2fs /dev/vda && mount /dev/vda /mnt && run-tests'
  pyvmm run --disk base.qcow2,snapshot=on --disk input.img,format=raw,ro=on -- run-tests
  pyvmm run --device vhost-user,id=rng,socket=/run/rng.sock -- head -c 8 /dev/hwrng
  pyvmm run --sandbox on --kernel bzImage --initrd untrusted.img --timeout 60
  pyvmm run --jail 5001,memory=512M,cpus=1,pids=64 --net emulated,bridge=br0 --kernel theirs

Network cards: --net MODE[,key=value...], once per card
  emulated    the data path in this process
  classic     emulated as the first VMMs had it, each step since undone: worker=vcpu,notify=exit,
              interrupt=ioctl,batch=off,without=event-idx+indirect+offloads (docs/ladder.md)
  vhost-net   the data path in the kernel: no packet wakes this process up; needs /dev/vhost-net
  vhost-user  the data path in another process, such as `pyvmm backend` or DPDK's
              (docs/vhost-user.md)
  vhost-vdpa  the data path in a device, a SmartNIC or pyvmm's own in software; needs vDPA
              (docs/vhost-vdpa.md)
  user        as emulated, without tap or privileges: the guest reaches what you can reach, and
              the host at 10.0.2.2 (docs/user-network.md)
  none        no card
  Keys of all modes:
      tap=NAME        an existing tap (default: pyvmm makes one, in a network namespace of its own)
      bridge=NAME     the tap is a port of this bridge of the host (needs root)
      mac=, mtu=      the guest's MAC address; the MTU offered to it, 68..65521
      host=, guest=   addresses with prefix length (default 192.168.100.1/24 and .2/24; the next
                      card has 192.168.101.1/24, ...)
      queues=N        queue pairs, 1 to 64 (1); with several pairs tap= must be a multi-queue tap
      queue-size=N    entries per queue (256)
      link=off        start with the cable pulled (on)
      transport=mmio  virtio over MMIO, for kernels without PCI (docs/mmio.md); no legacy=on (pci)
      legacy=on       also for drivers from before virtio 1.0 (docs/legacy.md)
      speed=N         of the cable in Mbit/s, for `ethtool` in the guest (10000)
      worker-cpu=N    the worker of queue pair k runs on CPU N + k only
      switchable=A+B  the data path may later be switched to the modes A and B (docs/switch.md): the
                      card offers what all modes can honour, and takes the keys of all modes
      fault=WORDS     lose, delay, repeat, damage packets on purpose: words joined by +, such as
                      rx+loss=10% (docs/fault-injection.md)
      fault-seed=S    of the random numbers for fault= (random); not where tc does it
      without=A+B     do not offer: offloads, tso, uso, mrg-rxbuf, indirect, event-idx, ctrl-vq,
                      ring-reset, notification-data, speed, hdrlen
      with=A+B        offer, too: packed (virtqueues), in-order (neither with vhost-net), coalescing
                      (of interrupts), hash-report, device-stats (counters for `ethtool -S` in the
                      guest), tunnel-gso (segments in VXLAN tunnels: Linux 6.17; these four with
                      emulated only), rss (docs/rss.md), access-platform (Linux maps buffers, as
                      AF_XDP needs)
      notify=exit     each kick is an exit of the vCPU, as in the classic device (ioeventfd)
      internet=on     the guest reaches what you can reach, as with user, and the host at 10.0.2.2;
                      not with tap=, bridge=, macvtap=, fd=, socket= or device= (off)
  Keys of emulated and vhost-net only:
      macvtap=IFACE   the card shares this interface of the host's: a macvtap (needs root)
      fd=N+M          an open tap that pyvmm inherits, one descriptor per queue pair; with emulated
                      also a connected socket, of passt for example (docs/run.md)
  Keys of emulated only:
      interrupt=ioctl each interrupt is a call of the thread that has moved the frame (irqfd)
      worker=vcpu     the vCPU that kicks sends the frames itself; needs notify=exit (thread)
      batch=off       one frame at a time, each with an interrupt of its own (on)
  Key of emulated, vhost-net, and vhost-user without socket= only:
      poll=USEC       look for more packets for this many microseconds before sleeping (0)
  Keys of vhost-user only, which has no worker-cpu=, and no tap= together with socket=:
      socket=PATH     where the back-end listens (default: start pyvmm's own, on a tap as above)
      server=on       pyvmm listens at socket=, and the back-end connects (off)
      peer=UID        the back-end's user, if it is neither root nor the user of pyvmm
  Key of vhost-vdpa only, which has no worker-cpu=, and no tap= together with device=:
      device=D        the vDPA device: its path, such as /dev/vhost-vdpa-0, or its name (default:
                      pyvmm makes one, on a tap as above; that needs root)
  Keys of user, which has neither tap= nor switchable=, and one queue pair; and of internet=on:
      hostfwd=A+B     ports that lead into the guest: [tcp:|udp:][ADDR:]PORT-[ADDR:]PORT
      loopback=off    10.0.2.2 does not stand for the host's 127.0.0.1 (on)

Disks: --disk FILE[,key=value...], once per disk: /dev/vda, /dev/vdb, ... (docs/disk.md)
  FILE is an image or a block device; a comma in its name is written twice. Keys:
      format=F        raw or qcow2; needed unless FILE ends in .raw or .qcow2
      ro=on           the guest may only read (off)
      snapshot=on     what the guest writes is thrown away (off)
      backing=on      a qcow2 image may name a backing file, which the guest may read (off)
      notify=exit     as for network cards

Other devices: --device vhost-user,id=KIND,socket=PATH[,key=value...], once per device
  A back-end at PATH serves the device (docs/devices.md). KIND is block, console, fs, gpio, i2c,
  rng, scmi, scsi, sound, vsock, or the number of another kind.
  Keys:
      queues=N        virtqueues in all (of the kind)
      queue-size=N    entries per virtqueue (256)
      config-size=N   bytes of the device's configuration (of the kind)
      tag=NAME        of a file system, for back-ends that have none
      notify=exit, server=on, peer=UID: as for network cards

Exit status: the command's; or 2 bad usage, 101 a result or the output could not be written,
102..104 no usable KVM, 105 bad kernel or initrd, 106..107 network, 108 no vhost-net, 112 no fitting
vhost-user back-end, 116 the guest hangs (--hang-timeout), 117 a --budget is broken, 118 the kernel
reported what --fail-on names, 119 the guest ended before COMMAND did, 120 panic, 121 reboot, 122
triple fault, 123 KVM error, 124 time-out, 125 no fitting vDPA device, 128 a thread of pyvmm's was
stopped, 130 Ctrl-C, 131 a --share that cannot be had or broke off, 132 --sandbox on is impossible,
133 a --disk that cannot be had or broke off, 134 --jail is impossible or its memory ran out, 141
nobody reads the output, 143 SIGTERM.
"""

from __future__ import annotations

import errno
import os
import stat
import sys
import time
from contextlib import ExitStack, suppress

from pyvmm.cli.support.options import (
    ADD_HELP,
    CPU_HELP,
    DETACHED,
    INIT_HELP,
    JAIL_HELP,
    MODULES_HELP,
    ROOT_HELP,
    RUNNING,
    SHARE_HELP,
    TROUBLE_KINDS,
    add_host,
    add_sandbox,
    count,
    cpu_model,
    jail,
    seconds,
    trouble_kinds,
)
from pyvmm.errors import HostError, PyvmmError, UsageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence
    from typing import Any

    from pyvmm.assembly import Description
    from pyvmm.capture.session import Capture
    from pyvmm.card.card import Card
    from pyvmm.card.nic import Nic
    from pyvmm.card.peripheral import Peripheral
    from pyvmm.cli.support.outputs import Output, Outputs
    from pyvmm.cli.support.pipes import Kept
    from pyvmm.cli.support.terminal import Terminal
    from pyvmm.cli.support.verdicts import RunFiles
    from pyvmm.cli.support.watchdog import Watchdog
    from pyvmm.control.registry import Claim
    from pyvmm.devices.console import FdSink, Stream
    from pyvmm.devopt import Device, User
    from pyvmm.diskopt import Disk
    from pyvmm.exits.kernel_trace import KernelTrace
    from pyvmm.kvm.ahead import Ahead
    from pyvmm.machine import Machine
    from pyvmm.netopt import Net
    from pyvmm.outcome import Outcome
    from pyvmm.scenario import Player, Scenario
    from pyvmm.shareopt import Root, Share


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    add = parser.add_argument
    add(
        "--kernel",
        metavar="K",
        help="bzImage, vmlinux, PVH ELF or multiboot kernel (default: of the image, see --image)",
    )
    add(
        "--initrd",
        metavar="I",
        action="append",
        help="initial RAM disk, or the name of an image to take its (default: the image's; with "
        "--kernel, only if --root or --share is given); repeatable",
    )
    add("--add", metavar="F[:PATH]", action="append", default=[], help=ADD_HELP)
    add("--share", metavar="DIR[:PATH][:rw]", action="append", default=[], help=SHARE_HELP)
    add("--disk", metavar="FILE[,K=V]", action="append", default=[], help="a disk, see below")
    add("--root", metavar="DIR", help=ROOT_HELP)
    add("--user", metavar="NAME", help="with --root: the user of DIR who runs COMMAND (root)")
    add("--init", metavar="PROGRAM", help=INIT_HELP)
    add("--modules", metavar="DIR", help=MODULES_HELP)
    add("--image", metavar="NAME", help="an image of `pyvmm image list` (default)")
    add("--append", metavar="S", default="", help="more kernel command line")
    add("--cpus", metavar="N", type=int, default=1, help="virtual CPUs, 1 to 255 (1)")
    add("--cpu", metavar="CPU", type=cpu_model, help=CPU_HELP)
    add("--memory", metavar="SIZE", default="256M", help="guest memory, as 256M or 4G (256M)")
    add(
        "--memory-backing",
        choices=("memfd", "huge"),
        default="memfd",
        help="a memfd, or a memfd of reserved huge pages (memfd)",
    )
    add("--net", metavar="MODE[,K=V]", action="append", help="a network card, see below (emulated)")
    add(
        "--device",
        metavar="vhost-user,K=V",
        action="append",
        default=[],
        help="a device with a vhost-user back-end, see below",
    )
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
        help="seconds until init must run, exit status 124",
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
        help=f"exit with 118 if the kernel reports one of these: {TROUBLE_KINDS}",
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
        help="kernel with symbols, to name the places where a guest hung (default: --kernel)",
    )
    add(
        "--report",
        metavar="FILE",
        help="write exits, phases, features and counters as JSON ('-': stdout)",
    )
    add(
        "--trace",
        metavar="FILE",
        help="write a timeline of exits, kicks, interrupts for ui.perfetto.dev (docs/trace.md)",
    )
    add(
        "--explain",
        metavar="FILE",
        help="write a page with sequence diagrams of set-up and packets (docs/explain.md)",
    )
    add(
        "--trace-events",
        metavar="N",
        type=count(16, 1 << 24),
        default=32768,
        help="how many events --trace and --explain keep per vCPU or worker, 56 bytes each (32768)",
    )
    add(
        "--trace-kernel",
        action="store_true",
        help="with --trace or --explain: also kicks, frames and interrupts by the kernel's "
        "tracepoints (root)",
    )
    add(
        "--scenario",
        metavar="FILE",
        help="play a scenario of faults on demand: a file, or one of pyvmm's (docs/scenarios.md)",
    )
    add("--pcap", metavar="FILE", help="capture all cards' packets as pcapng (docs/capture.md)")
    add("--exits", action="store_true", help="print the guest's exits by cause at the end")
    add(
        "--budget",
        metavar="B",
        action="append",
        help="exit with 117 if the run breaks it: 'user_exits<=5000', 'exits[serial0]<=100' "
        "(docs/budgets.md)",
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
        help="path of the control socket, or none (default: in the runtime directory)",
    )
    add_host(parser, "where to run (auto)")
    add_sandbox(parser, "this process before the guest runs")
    add("--jail", metavar="UID[:GID][,K=V]", type=jail, help=JAIL_HELP)
    add(
        "--verbose",
        "-v",
        action="store_true",
        help="show the guest's console on stderr while COMMAND runs",
    )
    add(
        "--detach",
        metavar="FILE",
        nargs="?",
        const="",
        help="leave the machine running in the background; its output goes to FILE (needs --name)",
    )
    add(
        "--console",
        action="store_true",
        help="standard input is the guest's console, also if it is no terminal",
    )
    add("guest_command", metavar="COMMAND", nargs="*", help="after --: what the guest runs")


def run(args: argparse.Namespace) -> int:
    """Choose the host, then run the guest there."""
    from pyvmm.cli.support.hostchoice import elsewhere, surely_here

    if args.trace_kernel and args.trace is None and args.explain is None:
        raise UsageError("--trace-kernel without --trace or --explain", "add one of them")
    if args.trace_kernel and args.sandbox == "on":
        raise UsageError(
            "--trace-kernel and --sandbox on",
            "the kernel's trace is read at the end: leave one out",
        )
    if args.jail is not None:
        _check_jail(args)
    if args.pcap == "-":
        raise UsageError(
            "--pcap - would mix packets with the guest's output",
            "name a file, or: pyvmm capture NAME - | wireshark -k -i -",
        )
    if args.json == "-" and args.report == "-":
        raise UsageError("--json - and --report - both write to stdout", "give one a file")
    if args.budget:
        from pyvmm.exits.budget import Budget

        args.budget = [Budget(text) for text in args.budget]
    use = _use_of_stdin(args)
    if args.detach is not None and DETACHED not in os.environ:
        from pyvmm.cli.support.detach import detach

        if use == "commands":
            raise UsageError(
                "--detach: a machine in the background cannot read standard input",
                "give a command: pyvmm run --detach --name NAME -- COMMAND",
            )
        args.initrd = _initrds(args)
        _check(args)
        return detach(args)
    if use == "nothing":
        raise UsageError(
            "no command, and standard input is empty: nobody could use the guest's console",
            "give a command: pyvmm run -- COMMAND; "
            "or, for a machine in the background, --detach --name NAME",
        )
    args.feed = use in ("commands", "input")
    if use == "commands":
        args.guest_command = ["sh"]
    words = ["run", "--host", "local", *args.argv[args.argv.index("run") + 1 :]]
    vhost = any("vhost-net" in net for net in args.net or ())
    kept: Kept | None = None
    ahead: Ahead | None = None

    def note() -> str:
        if kept is not None:
            kept.for_others(words)
        return _socket_note(args, words)

    with ExitStack() as stack:
        # What this process has loaded by now, it shares with the helper; to part costs time.
        own = args.jail is not None or any("fd=" in net for net in args.net or ())
        if not own and surely_here(args.host, vhost=vhost):
            _start_helper(args, stack)
            from pyvmm.kvm.ahead import Ahead

            # Now, because KVM may take as long for a VM as this process for the rest of a machine.
            ahead = stack.enter_context(Ahead())
        args.initrd = _initrds(args)
        _check(args)
        if any(map(_is_pipe, (args.kernel, *args.initrd))):
            from pyvmm.cli.support.pipes import Kept

            kept = stack.enter_context(Kept())
            _keep_pipes(args, kept)
        status = elsewhere(
            args.host,
            args.kernel,
            words,
            vhost=vhost,
            vdpa=any("vhost-vdpa" in net for net in args.net or ()),
            writable=[
                *(s.directory for s in _shares(args) if s.writable),
                *(d.directory for d in _disks(args) if d.writable and not d.snapshot),
            ],
            results=[
                *(s.directory for s in _shares(args) if s.writable),
                *(d.file for d in _disks(args) if d.writable and not d.snapshot),
            ],
            note=note,
            lasting=args.detach is not None,
        )
        if status is not None:
            return status
        for net in _nets(args):
            net.check_open(inherited=True)  # before the helper's channel takes a number
        if args.jail is not None:
            return _in_jail(args, kept.filenos() if kept is not None else [])
        return _here(args, ahead=ahead)


def _here(
    args: argparse.Namespace,
    outputs: Outputs | None = None,
    claim: Claim | None = None,
    mounts: Sequence[int] = (),
    ahead: Ahead | None = None,
) -> int:
    """Run the guest in this process.

    :param outputs: the files that the user asks for; None: they are still to be opened.
    :param claim: the machine's name and control socket, likewise.
    :param mounts: descriptors that are for back-ends alone.
    :param ahead: has a VM for the guest. Without it, this process has no thread yet.
    """
    from pyvmm.cli.support.signals import orderly

    with ExitStack() as stack:
        _start_helper(args, stack, mounts)
        return orderly(lambda: _boot(args, outputs, claim, ahead))


def _check_jail(args: argparse.Namespace) -> None:
    """:raises UsageError: an option needs what a jail has not."""
    from pyvmm.netopt import Net

    if args.trace_kernel:
        raise UsageError(
            "--trace-kernel and --jail: the kernel's trace is of the whole host",
            "leave one of them out",
        )
    for net in map(Net.parse, args.net or ()):
        what = f"--net {net.mode} and --jail"
        modes = {net.mode, *net.switchable}
        if net.mode == "user" or net.internet:
            way = what if net.mode == "user" else f"internet=on of {what}"
            raise UsageError(
                f"{way}: a jail has none of the host's network to reach",
                "give the card a tap or a bridge: --net emulated,bridge=br0",
            )
        if "vhost-vdpa" in modes and not net.device:
            raise UsageError(
                f"{what}: a jail can make no vDPA device", "name one of the host's: device="
            )
        if net.server:
            raise UsageError(
                f"{what}: server=on: nobody outside of a jail finds a socket in it",
                "let the back-end listen: leave out server=on",
            )
        outside = net.tap or net.bridge or net.macvtap
        if outside and modes - {"emulated", "vhost-net"}:
            raise UsageError(
                f"{what}: only emulated and vhost-net can use a tap from outside of a jail",
                f"use one of them, or leave out the key for {outside}",
            )
    if _jailed(args) is not None:
        _check_links(args)
    for device in _devices(args):
        if device.server:
            raise UsageError(
                "--device and --jail: server=on: nobody outside of a jail finds a socket in it",
                "let the back-end listen: leave out server=on",
            )


def _jailed(args: argparse.Namespace) -> User | None:
    """The user of the jail for which this process opens files, as root; None if there is none."""
    if args.jail is None or os.geteuid():
        return None
    return args.jail.uid, args.jail.gid


def _check_links(args: argparse.Namespace) -> None:
    """Refuse links that are not root's before root reads what is named; the jail looks again.

    :raises UsageError: there is one.
    """
    from pyvmm.assembly import added_names, initrd_files
    from pyvmm.hostnet.links import follow

    names = [args.kernel, args.vmlinux, args.modules]
    names += [*initrd_files(args.initrd or ()), *added_names(args.add or ())]
    for name in filter(None, names):
        with suppress(OSError, ValueError):  # to read it will say what is wrong
            follow(name)


def _in_jail(args: argparse.Namespace, kept: list[int]) -> int:
    """Open what the run needs of the host, then run the guest in a jail.

    :param kept: descriptors of files that the command line names.
    """
    from pyvmm.assembly import extra_archive, initrd_files, packed_files
    from pyvmm.cli.support.jailed import (
        run_in,
        socket_place,
        take_mounts,
        take_taps,
        take_vdpa,
    )
    from pyvmm.images import directory
    from pyvmm.jail import need_root

    need_root()
    want = _description(args)
    args.jail.check(want.memory, cpus=want.cpus, cards=len(want.nets), devices=want.devices)
    # The back-end may replace its socket, so its directory has to be there.
    sockets = [*(net.socket for net in want.nets), *(d.socket for d in _devices(args))]
    directories = [socket_place(path, args.jail.uid) for path in sockets if path]
    directories += want.trees()
    files = [want.kernel, *initrd_files(want.initrds), *packed_files(extra_archive(want)[0])]
    if args.kernel is None:
        directories.append(f"{directory()}/{args.image or 'default'}")
    if args.vmlinux is not None:
        files.append(args.vmlinux)
    with ExitStack() as stack:
        outputs = stack.enter_context(_outputs(args))
        args.net = take_taps(args.net or ["emulated"], stack, _tell_new_tap)
        if args.verbose:
            print(f"pyvmm: jail: {args.jail.text}", file=sys.stderr)
        keep = [*kept, *outputs.filenos()]
        keep += [fd for net in _nets(args) for fd in net.fds]
        given = take_vdpa(_nets(args), stack)
        keep += [device.fileno() for device in given]
        mounts = take_mounts(want.devices, (args.jail.uid, args.jail.gid), stack, files)
        claim = None
        if (qmp := _qmp(args)) is not None:
            from pyvmm.control.registry import Claim

            claim = Claim(args.name, None if qmp == "auto" else qmp)
            stack.callback(claim.close)
            keep += claim.filenos()

        def body() -> int:
            outputs.leave_files()
            if given:
                from pyvmm.datapath.vdpa_device import take

                take(given)
            if claim is not None:
                claim.leave_name()
            return _here(args, outputs, claim, mounts)

        done = run_in(
            args.jail,
            body,
            files=files,
            keep=keep,
            directories=directories,
            mounts=mounts,
            timeout=args.timeout,
        )
        return outputs.status(done)


def _start_helper(args: argparse.Namespace, stack: ExitStack, without: Sequence[int] = ()) -> None:
    """Start the helper that a sandbox needs, unless it runs, before this process has a thread.

    :param without: descriptors that the helper does not get.
    """
    if args.sandbox == "off":
        return
    from pyvmm import helper

    if helper.current() is None:
        stack.enter_context(helper.start(without))


def _initrds(args: argparse.Namespace) -> list[str]:
    """The paths of the initrds, which may be named by their images.

    pyvmm's init mounts the root and the shares. So a kernel of the user's gets the image's initrd
    if it has none.

    :raises ImageError: there is no such image, or the kernel is none.
    """
    if not args.initrd:
        # A kernel with a disk has an init of its own there.
        mounts = args.root is not None or (args.share and not args.disk)
        if args.kernel is None or not mounts:
            return []
        if not _is_pipe(args.kernel):  # which can be read only once, and later
            from pyvmm.boot import is_linux

            if not is_linux(args.kernel):
                return []
    from pyvmm.images import find, is_name

    if not args.initrd:
        return [find(args.image or "default").initrd]
    return [
        find(name).initrd if is_name(name) and not os.path.exists(name) else name  # noqa: PTH110
        for name in args.initrd
    ]


def _is_pipe(path: str | None) -> bool:
    try:
        return path is not None and stat.S_ISFIFO(os.stat(path).st_mode)  # noqa: PTH116
    except (OSError, ValueError):
        return False  # opening it will say what is wrong


def _keep_pipes(args: argparse.Namespace, kept: Kept) -> None:
    """Read the pipes among kernel and initrd to their ends, within the run's time-out."""
    watchdog: Watchdog | None = None
    if args.timeout is not None:
        from pyvmm.cli.support.watchdog import Watchdog

        watchdog = Watchdog(args.timeout)
    try:
        args.kernel = kept.keep(args.kernel, "kernel")
        args.initrd = [kept.keep(path, "initrd") for path in args.initrd]
    finally:
        if watchdog is not None:
            watchdog.close()


def _check(args: argparse.Namespace) -> None:
    """Refuse what no machine can be made of, before a testbed starts for it.

    :raises PyvmmError: the error that the machine would raise.
    """
    from pyvmm.assembly import extra_archive
    from pyvmm.macs import MacAddresses

    want = _description(args)
    MacAddresses("").choose(dict(enumerate(want.nets)))
    if args.scenario is not None:
        from pyvmm.scenario import load

        # Before a sandbox closes, because a filter needs libpcap, and where the file is.
        args.played = load(args.scenario)
    if args.host != "local":  # else the machine is made here, and checks it
        extra_archive(want)


def _description(args: argparse.Namespace) -> Description:
    """The machine's description, as far as it can be checked before the machine is made."""
    from pyvmm.assembly import Description

    kernel, initrd = _files(args)
    return Description(
        kernel,
        initrd=initrd,
        cpus=args.cpus,
        memory=args.memory,
        nets=_nets(args),
        devices=_devices(args),
        shares=_shares(args),
        disks=_disks(args),
        root=_root(args),
        command=args.guest_command or None,
        add=args.add,
        modules=args.modules,
    )


def _nets(args: argparse.Namespace) -> list[Net]:
    """The cards of ``--net``."""
    if args.net == ["none"]:
        return []  # without the module that knows all about cards
    from pyvmm.netopt import Net

    return [Net.parse(text) for text in args.net or ["emulated"]]


def _devices(args: argparse.Namespace) -> list[Device]:
    """The devices of ``--device``."""
    if not args.device:
        return []
    from pyvmm.devopt import Device

    return [Device.parse(text) for text in args.device]


def _disks(args: argparse.Namespace) -> list[Disk]:
    """The disks of ``--disk``, whose images are looked at once."""
    if not args.disk:
        return []
    if getattr(args, "disks", None) is None:
        from pyvmm.diskopt import Disk

        args.disks = [Disk.parse(text, _jailed(args)) for text in args.disk]
    disks: list[Disk] = args.disks
    return disks


def _shares(args: argparse.Namespace) -> list[Share]:
    """The directories of ``--share``, which are looked at once."""
    if not args.share:
        return []
    if getattr(args, "shares", None) is None:
        from pyvmm.shareopt import Share

        args.shares = [Share.parse(text, _jailed(args)) for text in args.share]
    shares: list[Share] = args.shares
    return shares


def _root(args: argparse.Namespace) -> Root | None:
    """The tree for the guest's root, which is looked at once."""
    if args.root is None:
        if args.user is not None:
            raise UsageError(f"--user {args.user} without --root", "the image has only root")
        if args.init is not None:
            raise UsageError(
                f"--init {args.init} without --root", "name the tree: --root DIR --init PROGRAM"
            )
        return None
    if getattr(args, "tree", None) is None:
        from pyvmm.shareopt import Root

        args.tree = Root(args.root, user=args.user, init=args.init, jailed=_jailed(args))
    tree: Root = args.tree
    return tree


def _files(args: argparse.Namespace) -> tuple[str, list[str]]:
    """The kernel and the initrds: those that the user names, or the image's."""
    if args.kernel is not None:
        return args.kernel, args.initrd
    from pyvmm.images import find

    image = find(args.image or "default")
    return image.kernel, args.initrd or [image.initrd]


def _use_of_stdin(args: argparse.Namespace) -> str:
    """What standard input is to the guest: ``input`` of its command, if it is a file or a pipe;
    ``none`` for a command without one; without a command ``console``, or ``commands`` for a shell
    that reads them to their end, as from a file or a pipe; or ``nothing``
    if the guest would wait forever at a prompt: nobody can type a command, no time-out ends it, and
    it has no name by which another process could end it.

    Only the images of pyvmm are known to have a shell. All other guests get the console.
    """
    if args.guest_command:
        mode = os.fstat(0).st_mode
        given = stat.S_ISREG(mode) or stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode)
        return "input" if given else "none"
    other = args.init not in (None, "systemd")  # which may have no shell for us
    if args.console or args.kernel or args.initrd or other or os.isatty(0):
        return "console"
    status = os.fstat(0)
    if stat.S_ISREG(status.st_mode):
        empty = os.lseek(0, 0, os.SEEK_CUR) >= status.st_size
    else:
        from pyvmm.fd import is_null

        empty = is_null(0)
    if not empty:
        return "commands"
    steered = args.name or args.qmp or args.timeout is not None
    return "console" if steered else "nothing"


def _socket_note(args: argparse.Namespace, words: list[str]) -> str:
    """What the user of ``socket=`` must know if the guest runs in the testbed; empty without
    ``socket=``.

    :raises UsageError: there is ``fd=``, and descriptors do not get there.
    """
    import shlex

    from pyvmm.netopt import Net

    notes = []
    for net in map(Net.parse, args.net or ()):
        if net.fds:
            raise UsageError(
                f"--net {net.mode}: fd={net.fds[0]}: the guest runs in the testbed, and descriptors"
                " do not get there",
                "start the program that opens it there: pyvmm testbed -- PROGRAM",
            )
        if net.socket:
            client = " --client" if net.server else ""
            backend = f"pyvmm backend --socket {shlex.quote(net.socket)}{client} --tap tap0"
            both = (
                f"{backend} --address 192.168.100.1/24 & {shlex.join(['pyvmm', *words])}; kill $!"
            )
            notes.append(
                f"socket={net.socket}: the guest runs in the testbed, so the back-end must, too: "
                f"pyvmm testbed -- sh -c {shlex.quote(both)}"
            )
    for device in _devices(args):
        notes.append(
            f"socket={device.socket}: the guest runs in the testbed, so the back-end must, too: "
            f"pyvmm testbed -- sh -c 'BACKEND & {shlex.join(['pyvmm', *words])}; kill $!'"
        )
    return "\n".join(notes)


def _outputs(args: argparse.Namespace) -> Outputs:
    """Open the files that the user asks for."""
    from pyvmm.cli.support.outputs import Outputs

    return Outputs(
        {
            f"--{name}": getattr(args, name)
            for name in ("log", "junit", "json", "report", "trace", "explain", "pcap")
        },
        private=("--pcap",),
    )


def _boot(
    args: argparse.Namespace, outputs: Outputs | None, claim: Claim | None, ahead: Ahead | None
) -> int:
    """Run the guest here, with its files and signals; returns the exit status. For the parameters
    see ``_here``.
    """
    watchdog: Watchdog | None = None
    if args.timeout is not None:
        from pyvmm.cli.support.watchdog import Watchdog

        watchdog = Watchdog(args.timeout)
    run = _Run(args, claim, ahead)
    try:
        run.outputs = outputs or _outputs(args)
        status = run.to_its_end(watchdog)
    except BaseException as e:
        if run.files is not None or "GITHUB_ACTIONS" in os.environ:
            from pyvmm.cli.support.verdicts import broken_off

            broken_off(e, run.machine, run.files)
        if isinstance(e, PyvmmError) or not isinstance(e, Exception):
            raise
        import traceback  # a bug of ours must not look like the status of a test

        traceback.print_exc()
        raise HostError("pyvmm itself failed, see above", "please report it") from None
    finally:
        if watchdog is not None:
            watchdog.close()
        if run.outputs is not None:
            run.outputs.close()
    return run.outputs.status(status)


class _Run:
    """One run of a guest on this host.

    :ivar outputs: the files that the user asks for; owned by the code that sets this attribute.
    :ivar files: follow the run; None if the user asks for none of them.
    :ivar machine: None until it is made.
    """

    def __init__(self, args: argparse.Namespace, claim: Claim | None, ahead: Ahead | None) -> None:
        self.args, self._claim, self._ahead = args, claim, ahead
        self.commanded = bool(args.guest_command)
        self.outputs: Outputs | None = None
        self.files: RunFiles | None = None
        self.machine: Machine | None = None
        self.sinks: list[FdSink] = []
        self.terminal: Terminal | None = None

    def to_its_end(self, watchdog: Watchdog | None) -> int:
        """Boot the guest, attend it, report the verdict; returns the exit status."""
        from pyvmm.machine import Machine

        if not self.commanded:  # now, because a confined process takes twice as long for it
            from pyvmm.cli.support import terminal  # noqa: F401

        args, outputs = self.args, self.outputs
        assert outputs is not None
        if args.fail_on or any(option in outputs for option in ("--log", "--junit", "--json")):
            from pyvmm.cli.support.verdicts import RunFiles

            self.files = RunFiles(args, outputs)
            if watchdog is not None:
                watchdog.files = self.files
        scenario: Scenario | None = args.played if args.scenario is not None else None
        append = args.append
        kernel, initrd = _files(args)
        if args.kernel is None:
            from pyvmm.images import CMDLINE

            append = f"{CMDLINE} {append}".rstrip()
        if args.fail_on:
            from pyvmm.testing.console import audible

            append = audible(append)
        with Machine(
            kernel,
            initrd=initrd,
            append=append,
            cpus=args.cpus,
            memory=args.memory,
            huge=args.memory_backing == "huge",
            cpu=args.cpu,
            nets=_nets(args),
            devices=_devices(args),
            shares=_shares(args),
            disks=_disks(args),
            root=_root(args),
            command=args.guest_command or None,
            on_reboot=args.on_reboot,
            name=args.name,
            qmp=self._claim or _qmp(args),
            trace=args.trace_events if args.trace or args.explain else 0,
            hang_timeout=args.hang_timeout,
            add=args.add,
            modules=args.modules,
            stdin=0 if args.feed else None,
            sandbox="off" if args.trace_kernel else args.sandbox,
            ahead=self._ahead,
        ) as machine:
            self.machine = machine
            for note in machine.notes:
                print(f"pyvmm: {note}", file=sys.stderr)
            for nic in machine.nets:
                if nic.net.tap is not None and nic.tap_created:
                    _tell_new_tap(nic.name, nic.tap)
                if nic.net.switchable:
                    _tell_offer(nic)
            if self.files is not None:
                self.files.attach(machine)
            for budget in args.budget or ():
                budget.check_names(machine.accounts)
            if watchdog is not None:
                watchdog.close()
                watchdog.arm()
            tracing = _trace_kernel(machine) if args.trace_kernel else None
            capture = _capture(machine, outputs) if "--pcap" in outputs else None
            player = machine.play(scenario) if scenario is not None else None
            machine.confine([args.vmlinux] if args.vmlinux is not None else [])
            if args.verbose:
                print(f"pyvmm: sandbox: {machine.sandbox}", file=sys.stderr)
            try:
                outcome = self._attend(machine)
                if watchdog is not None:
                    watchdog.judging()
            finally:
                if capture is not None:
                    _end_capture(capture, outputs["--pcap"])
                _write_traces(machine, outputs, tracing)
            verdict = self._verdict(machine, outcome, kernel)
            if "--report" in outputs:
                report = {**machine.report(), "verdict": verdict}
                if player is not None:
                    report["scenario"] = player.report()
                outputs.write("--report", _json(report))
            if player is not None and not player.finished:
                _tell_scenario(player)
            if args.exits:
                from pyvmm.cli.support.tables import exits_table

                print(exits_table(machine), file=sys.stderr)
            for nic in machine.nets:
                if nic.without_internet:
                    why = f"internet=on is over: {nic.without_internet}"
                    print(f"pyvmm: {nic.name}: {why}", file=sys.stderr)
            for card in (*machine.nets, *machine.devices):
                _tell_mistakes(card)
            for device in machine.devices if "init" in machine.phases else ():
                _tell_unused(device)
        return int(verdict["code"]) or self._lost_output(machine, outcome)

    def _attend(self, machine: Machine) -> Outcome:
        """Let the guest run to its end; then a slow reader gets the rest of the output."""
        start, limit = time.monotonic(), self.args.timeout
        outcome = self._run_guest(machine)
        left = None if limit is None else max(0.0, start + limit - time.monotonic())
        for stream in (machine.console, machine.stdout, machine.stderr):
            stream.drain(left)
        if self.terminal is not None and self.terminal.raw:
            # The guest may have left the cursor in the middle of a line.
            end = "" if machine.console.text.endswith((b"\n", b"\r")) else "\n"
            print(f"{end}pyvmm: the machine has ended", file=sys.stderr)
        return outcome

    def _run_guest(self, machine: Machine) -> Outcome:
        from pyvmm.devices.console import BACKGROUND_MAX, FdSink
        from pyvmm.outcome import Outcome

        args = self.args

        def gone() -> None:
            """Nobody reads standard output. A command of our init ends by SIGPIPE; no other guest
            can be told.
            """
            if not self.commanded or not machine.hears_of_readers:
                machine.quit(Outcome("stopped", "nobody reads the output"))

        def deliver(stream: Stream, fd: int) -> None:
            # In the background nobody looks at the file while the guest fills it.
            limit = BACKGROUND_MAX if DETACHED in os.environ else None
            self.sinks.append(FdSink(fd, gone=gone if fd == 1 else lambda: None, limit=limit))
            stream.add_sink(self.sinks[-1])

        def started() -> None:
            if DETACHED in os.environ:
                print(f"{RUNNING} {machine.name}", file=sys.stderr, flush=True)

        deliver(machine.stdout, 1)
        deliver(machine.stderr, 2)
        if self.commanded:
            if args.verbose:
                deliver(machine.console, 2)
            machine.start()
            started()
            return machine.wait(args.timeout, boot_timeout=args.boot_timeout)
        from pyvmm.cli.support.terminal import Terminal

        deliver(machine.console, 1)
        terminal = Terminal(machine)
        try:
            terminal.open()
            machine.start()
            started()
            return machine.wait(args.timeout, boot_timeout=args.boot_timeout)
        finally:
            terminal.close()
            self.terminal = terminal

    def _lost_output(self, machine: Machine, outcome: Outcome) -> int:
        """The exit status of a run that would succeed, if input or output of the guest is lost: 141
        if the reader has gone, as for any command; 0 if nothing is lost.
        """
        if machine.input_error is not None:
            print(
                f"pyvmm: standard input could not be read: {machine.input_error.strerror}",
                file=sys.stderr,
            )
            return HostError.exit_code
        if machine.input_ignored and outcome.status is not None:
            print(
                "pyvmm: the command got no standard input: the image is older than this pyvmm; "
                "build it again: pyvmm image build",
                file=sys.stderr,
            )
        errors = [sink.error for sink in self.sinks if sink.error is not None]
        if any(isinstance(error, BrokenPipeError) for error in errors):
            return 141
        dropped = sum(sink.dropped for sink in self.sinks)
        if outcome.kind != "stopped":  # the user who ends a machine at once wants no more output
            dropped += machine.stdout.dropped + machine.stderr.dropped
        if not errors and not dropped:
            return 0
        beyond = sum(sink.beyond for sink in self.sinks)
        if errors:
            why: str | None = errors[0].strerror
        elif beyond:
            why = f"the file of --detach has its largest size, {beyond} bytes came after it"
        else:
            why = f"its reader did not take {dropped} bytes in time"
        print(f"pyvmm: the guest's output is lost: {why}", file=sys.stderr)
        return HostError.exit_code

    def _verdict(self, machine: Machine, outcome: Outcome, kernel: str) -> dict[str, Any]:
        """The verdict, for the report. If the run did not end as it should, the verdict and what
        helps to find the cause are printed on stderr.
        """
        args, files = self.args, self.files
        budgets = [budget.check(machine.accounts) for budget in args.budget or ()]
        held = all(result.held for result in budgets)
        checked = {"budgets": [result.as_dict() for result in budgets]} if budgets else {}
        lost = [device.broken for device in machine.devices if device.broken is not None]
        clean = not lost and outcome.error() is None and (outcome.status == 0 or not self.commanded)
        if files is None and held and clean:
            return {"kind": "passed", "code": outcome.status or 0, "message": "", **checked}
        from pyvmm.cli.support.verdicts import tell
        from pyvmm.testing.judge import judge

        verdict = judge(
            outcome,
            console=machine.console.text,
            boot=machine.boot,
            phases=machine.phases,
            commanded=self.commanded,
            watch=files.watch if files is not None else None,
            symbols=args.vmlinux or kernel,
            budgets=budgets,
            lost=lost,
        )
        tell(machine, verdict, shown=not self.commanded or args.verbose)
        if files is not None:
            files.finish(verdict, machine)
        return {
            "kind": verdict.kind,
            "code": verdict.code,
            "message": verdict.message,
            **checked,
        }


def _qmp(args: argparse.Namespace) -> str | None:
    """The path of the control socket; None for a machine without one. If this host has no place for
    the socket, this is an error only for a machine to which the user gives a name.
    """
    from pyvmm.control.registry import directory

    if args.qmp == "none":
        if args.name is not None:
            raise UsageError(
                "--name with --qmp none", "a machine without a control socket has no name"
            )
        return None
    if args.qmp is None and args.name is None:
        try:
            where = directory()
            if os.statvfs(where).f_flag & os.ST_RDONLY:
                raise HostError(
                    f"{where}: {os.strerror(errno.EROFS)}",
                    "set XDG_RUNTIME_DIR to a directory of your own that can be written",
                )
        except HostError as e:
            print(f"pyvmm: no control socket: {e}", file=sys.stderr)
            return None
    return args.qmp or "auto"


def _tell_new_tap(card: str, tap: str) -> None:
    """Say that the tap that the user names did not exist: it may be misspelt."""
    print(
        f"pyvmm: {card}: there was no tap {tap}; it has been made, and goes with the machine",
        file=sys.stderr,
    )


def _tell_offer(nic: Nic) -> None:
    """Print which features the modes of ``switchable=`` have in common."""
    from pyvmm.virtio.features import names

    modes = ", ".join([nic.net.mode, *nic.net.switchable])
    offer = " ".join(names(nic.device.offered()))
    print(f"pyvmm: {nic.name} can be switched between {modes}; offers {offer}", file=sys.stderr)


def _tell_mistakes(card: Card) -> None:
    """Print what the card's driver did wrong (docs/drivers.md)."""
    device = card.device
    for text in device.mistakes:
        print(f"pyvmm: {card.name}: {text}", file=sys.stderr)
    if device.refused > len(device.mistakes):
        print(f"pyvmm: {card.name}: {device.refused} writes refused in all", file=sys.stderr)


def _tell_unused(device: Peripheral) -> None:
    """Print that the guest has no driver of a disk."""
    if device.kind == "block" and not device.device.negotiated:
        print(
            f"pyvmm: {device.name}: the guest has not used the disk: its kernel needs"
            " CONFIG_VIRTIO_BLK and CONFIG_VIRTIO_PCI; if the image is older than this pyvmm:"
            " pyvmm image build",
            file=sys.stderr,
        )


def _tell_scenario(player: Player) -> None:
    """Say that a scenario has not been played to its end."""
    told = player.report()
    why = f": {player.problem}" if player.problem else ""
    print(
        f"pyvmm: --scenario {told['name']}: {told['played']} of {told['steps']} steps were"
        f" played{why}",
        file=sys.stderr,
    )


def _capture(machine: Machine, outputs: Outputs) -> Capture:
    """Capture all cards; ``_end_capture`` ends that."""
    from pyvmm.capture.session import Capture

    if not machine.nets:
        raise UsageError("--pcap without a network card", "leave out --net none")
    return Capture(machine.nets, outputs["--pcap"].duplicate())


def _end_capture(capture: Capture, output: Output) -> None:
    """Complete the file, and say what it lacks."""
    capture.close()
    if capture.full:
        output.cut = capture.problem
        return
    output.problem = capture.problem
    if capture.lost:
        print(
            f"pyvmm: --pcap {output.path}: {capture.lost} of {capture.packets} packets are lost: "
            "the file was too slow",
            file=sys.stderr,
        )


def _trace_kernel(machine: Machine) -> KernelTrace:
    """Trace what the kernel does for the machine's cards; ``_write_traces`` ends that."""
    from pyvmm.exits.kernel_trace import KernelTrace, other_machines

    others = other_machines()
    if others:
        print(
            f"pyvmm: --trace-kernel: KVM runs {others} other machine{'s' if others > 1 else ''}, "
            "whose interrupts may be taken for this one's; stop them, or see docs/explain.md",
            file=sys.stderr,
        )
    return KernelTrace([nic.tap for nic in machine.nets])


def _write_traces(machine: Machine, outputs: Outputs, tracing: KernelTrace | None) -> None:
    """Write the timeline, and the page made of it. If this fails, the output reports it later, and
    the verdict stands.
    """
    kernel = None
    if tracing is not None:
        try:
            kernel = tracing.stop()
        except HostError as e:
            print(f"pyvmm: {e}", file=sys.stderr)
    if "--trace" in outputs:
        from pyvmm.exits.trace import write

        try:
            write(machine, outputs["--trace"].write, kernel)
        except OSError:
            pass
    if "--explain" in outputs:
        from pyvmm.exits.trace import document
        from pyvmm.explain.arrows import Diagram
        from pyvmm.explain.page import page
        from pyvmm.explain.read import take

        name = outputs["--explain"].path
        try:
            trace = take(document(machine, kernel), name)
            outputs.write("--explain", page([(name, Diagram(trace, trace.card(None)))]))
        except UsageError as e:
            outputs["--explain"].problem = str(e)


def _json(data: dict[str, Any]) -> str:
    import json

    return json.dumps(data, indent=2) + "\n"
