"""Serve vhost-user-net: move the packets of a virtual machine that runs in another process. Or
serve a vDPA network card from user space (VDUSE).

Keep sockets in a directory DIR that only you can enter, such as $XDG_RUNTIME_DIR.

The front-end is `pyvmm run --net vhost-user,socket=S`, QEMU with a vhost-user netdev and share=on
memory, or DPDK's virtio-user. Front-end and back-end may end and come back as often as they like.

Examples:
  pyvmm backend --socket $DIR/s --tap tap0
  pyvmm backend --socket $DIR/s --tap tap0 --queues 2 --poll --worker-cpu 2
  pyvmm backend --socket $DIR/a --connect $DIR/b      joins two machines
  pyvmm backend --socket $DIR/s --tap tap0 --pcap x.pcapng   captures (docs/capture.md)
  pyvmm backend --socket $DIR/s --tap tap0 --fault rx+loss=10%   loses packets on purpose
  pyvmm backend --socket $DIR/s --pcap x.pcapng       takes the guest's packets, and sends none
  pyvmm backend --vduse card0 --tap tap0              makes the vDPA device card0

Once its descriptors are open, the process confines itself (docs/sandbox.md), but not with --vduse.
The command ends at SIGINT or SIGTERM.

Exit status: 0 ended by a signal; 2 bad usage; 101 a capture is not whole; 106..107, 112, 125 the
tap, the socket or the vDPA device cannot be had; 128 a thread made a system call that it may not
make; 132 --sandbox on is impossible.
"""

from __future__ import annotations

import sys

from pyvmm.cli.support.options import add_sandbox, count
from pyvmm.cli.support.results import print_json
from pyvmm.errors import HostError, ThreadStopped, UsageError
from pyvmm.netopt import UID_MAX

TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse
    from typing import Any

    from pyvmm.backend.vduse import VduseBackend
    from pyvmm.capture.session import Capture
    from pyvmm.datapath.capture import CapturePoint
    from pyvmm.faultopt import FaultRule

#: Microseconds, practically forever: the worker checks in each round whether it must end.
POLL_US = 0xFFFFFFFF


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    add = parser.add_argument
    place = parser.add_mutually_exclusive_group(required=True)
    place.add_argument("--socket", metavar="S", help="the front-end's socket")
    place.add_argument(
        "--vduse", metavar="NAME", help="make the vDPA device NAME instead (root, module vduse)"
    )
    add(
        "--client",
        action="store_true",
        help="connect to S, again and again (default: listen there)",
    )
    add(
        "--peer",
        metavar="UID",
        type=count(0, UID_MAX),
        help="the front-end's user, if it is neither root nor the user of this command",
    )
    add(
        "--unsealed",
        action="store_true",
        help="take memory that cannot be sealed (DPDK): the front-end can then end this process",
    )
    port = parser.add_mutually_exclusive_group()
    port.add_argument("--tap", metavar="T", help="a tap: an existing one, or one to make")
    port.add_argument("--loopback", action="store_true", help="send every packet back")
    port.add_argument("--connect", metavar="S2", help="join S with the front-end at another socket")
    add(
        "--pcap",
        metavar="F",
        help="capture all packets as pcapng; without --tap and the like, send none",
    )
    add(
        "--fault",
        metavar="WORDS",
        help="do wrong on purpose what these words say, joined by + (docs/fault-injection.md)",
    )
    add("--fault-seed", metavar="S", help="of the random numbers for --fault (random)")
    add("--address", metavar="A", help="address with prefix length for the tap")
    add("--queues", metavar="N", type=count(1, 32), default=1, help="queue pairs, 1 to 32 (1)")
    add("--poll", action="store_true", help="busy-poll: never sleep, take no kicks")
    add(
        "--worker-cpu",
        metavar="C",
        type=int,
        help="pin the first pair's worker to CPU C, the next to C+1, ...",
    )
    add("--quiet", "-q", action="store_true", help="say nothing about connections")
    add_sandbox(parser, "this process once its descriptors are open, but not with --vduse,")
    add("--counters", action="store_true", help="print the counters at the end, as JSON")


def run(args: argparse.Namespace) -> int:
    """Serve until a signal ends it."""
    import signal
    import threading

    if args.vduse and (args.connect or args.client or args.peer is not None or args.unsealed):
        raise UsageError(
            "--vduse with --connect, --client, --peer or --unsealed", "they belong to --socket"
        )
    if not (args.tap or args.loopback or args.connect or args.pcap):
        raise UsageError("no place for packets", "add --tap, --loopback, --connect or --pcap")
    if args.address and not args.tap:
        raise UsageError("--address without --tap", "only a tap has an address")
    if args.fault_seed is not None and not args.fault:
        raise UsageError("--fault-seed without --fault", "leave it out")
    rules: list[FaultRule] = []
    if args.fault:
        from pyvmm.faultopt import of_option

        rules = of_option(args.fault)  # before the sandbox: a filter needs libpcap
    done = threading.Event()
    before = {n: signal.signal(n, lambda *_: done.set()) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        if args.vduse or args.sandbox == "off":
            return _serve(args, done, rules)
        from pyvmm import helper

        with helper.start():  # before there is a thread
            return _serve(args, done, rules)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _serve(args: argparse.Namespace, done: Any, rules: list[FaultRule]) -> int:
    import threading
    from contextlib import ExitStack

    from pyvmm.backend.net import NetService
    from pyvmm.backend.server import Backend
    from pyvmm.datapath.capture import CapturePoint
    from pyvmm.datapath.impair import ImpairPoint

    impairs: list[ImpairPoint] = []
    seed = 0
    errors: list[BaseException] = []
    points: list[tuple[str, CapturePoint]] = []
    service: dict[str, Any] = {
        "poll_us": POLL_US if args.poll else 0,
        "worker_cpu": args.worker_cpu,
    }

    def log(line: str) -> None:
        if not args.quiet:
            print(f"pyvmm backend: {line}", file=sys.stderr, flush=True)

    def make(path: str, port: Any) -> Backend | VduseBackend:
        points.append((path, CapturePoint()))
        own = NetService(port, **service, captures=points[-1][1], impair=impair())
        if args.vduse:
            from pyvmm.backend.vduse import VduseBackend

            return VduseBackend(path, own, mtu=port.mtu, log=_named(log, path))
        return Backend(own, log=_named(log, path), unsealed=args.unsealed)

    def impair() -> ImpairPoint:
        impairs.append(ImpairPoint())
        if rules:
            impairs[-1].set(rules, seed)
        return impairs[-1]

    def one(backend: Backend | VduseBackend, path: str) -> None:
        try:
            if isinstance(backend, Backend):
                backend.run(path, client=args.client, peer=args.peer)
            else:
                backend.run()
        except BaseException as e:
            errors.append(e)
        done.set()

    def stopped(problem: str) -> None:
        errors.append(ThreadStopped(problem))
        done.set()

    service["stopped"] = stopped
    if rules:
        from pyvmm.faultopt import seed_of

        seed = seed_of(args.fault_seed)
        log(f"faults on purpose: {' '.join(map(str, rules))} (seed {seed})")
    with ExitStack() as stack:
        file = _open(args.pcap) if args.pcap else -1
        backends: list[Backend | VduseBackend] = []
        for path, port in _ports(args):
            backends.append(make(path, port))
            stack.callback(backends[-1].close)
        threads = [
            threading.Thread(target=one, args=(backend, path), name=path)
            for backend, path in zip(
                backends, filter(None, (args.socket or args.vduse, args.connect)), strict=True
            )
        ]
        if not args.vduse and args.sandbox != "off":
            _confine(args, log, stopped)
        capture = _capture(file, points) if args.pcap else None
        for thread in threads:
            thread.start()
        try:
            done.wait()
        finally:
            for backend in backends:
                backend.stop()
            for thread in threads:
                thread.join()
            if capture is not None:
                capture.close()
        if args.counters:
            for backend in backends:
                print_json(backend.counters())
        for error in errors:
            raise error
    if capture is not None and (capture.lost or capture.problem):
        raise HostError(
            f"--pcap {args.pcap}: {capture.problem or f'{capture.lost} packets are missing'}",
            "capture less, or onto another disk",
        )
    return 0


def _confine(args: argparse.Namespace, log: Any, stopped: Any) -> None:
    """Give up what this process does not need any more (docs/sandbox.md)."""
    import json  # noqa: F401 - here, because afterwards nothing can be imported

    from pyvmm import sandbox
    from pyvmm.backend.process import tell_errors

    names = [("interface", args.tap), ("tap", args.tap)] if args.tap else []
    for path in filter(None, (args.socket, args.connect)):
        names += [("connect", path)] if args.client else [("listen", path), ("remove", path)]
    tell_errors(lambda line: print(f"pyvmm: {line}", file=sys.stderr, flush=True))
    why = sandbox.confine_backend(args.sandbox, names, lambda thread, problem: stopped(problem))
    if why:
        log(f"confined {why}" if why.startswith("in part") else f"not wholly confined: {why}")


def _named(log: Any, path: str) -> Any:
    return lambda line: log(f"{path}: {line}")


def _open(path: str) -> int:
    """The file for the packets, which ``_capture`` owns. What this imports is there for the
    confined process, too.
    """
    from pyvmm.capture import session  # noqa: F401
    from pyvmm.capture.files import open_private

    try:
        return open_private(path)[0]
    except OSError as e:
        raise UsageError(f"--pcap {path}: {e.strerror}", "name a file that can be written") from e


def _capture(file: int, points: list[tuple[str, CapturePoint]]) -> Capture:
    """Capture what all back-ends move."""
    from pyvmm.capture.session import Capture
    from pyvmm.datapath.capture import PointCard

    return Capture([PointCard(name, "pyvmm's back-end", point) for name, point in points], file)


def _ports(args: argparse.Namespace) -> list[tuple[str, Any]]:
    """Open the ports of the back-ends; (socket, port) of each."""
    from pyvmm.backend import ports as vu_ports

    if args.tap:
        from pyvmm.hostnet.tap import Tap

        tap = Tap(args.tap, queues=args.queues, address=args.address)
        tap.permit()
        return [(args.socket or args.vduse, tap)]
    if args.loopback:
        return [(args.socket or args.vduse, vu_ports.loop_port(args.queues))]
    if args.connect:
        return list(
            zip((args.socket, args.connect), vu_ports.joined_ports(args.queues), strict=True)
        )
    return [(args.socket or args.vduse, vu_ports.sink_port(args.queues))]
