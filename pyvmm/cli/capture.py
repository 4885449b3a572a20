"""Capture the packets of a running machine's network cards, on whatever data path they are.

Examples:
  pyvmm capture vm0 dump.pcapng
  pyvmm capture vm0 - | wireshark -k -i -
  pyvmm capture vm0 - --filter 'tcp port 80' | tshark -r -
  pyvmm capture vm0 dump.pcapng --nic 1 --snaplen 128
  pyvmm capture vm0 sent.pcapng --nic 0 --queue 1    what the guest sends by its first pair

Ctrl-C ends the capture, and so does the end of the machine. The file is pcapng, with one interface
per card, the direction of each packet, times in nanoseconds, and the virtio-net header as a comment
where it says anything (docs/capture.md). Only you can read a new file. --filter takes an expression
of pcap-filter(7), and needs libpcap0.8.

No card waits for a capture, which takes time of the processors like any other program. What is lost
because FILE is too slow, or has 1 GiB (--limit), is counted and printed.

Exit status: 0; 2 bad usage, such as a filter that is none, or a card on a back-end of somebody
else's; 101 the file could not be written, or there is no libpcap; 113 no such machine, or it ended
in the middle of the capture; 114 refused, with the cause; 141 nobody reads the output.
"""

from __future__ import annotations

import os
import signal
import sys

from pyvmm.cli.support import remote
from pyvmm.cli.support.options import SSH, count
from pyvmm.errors import MachineMissing, UsageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse

    from pyvmm.cli.support.outputs import Output
    from pyvmm.control.client import Client

SNAPLEN = 1 << 18
#: Bytes of the end of the stream in which the last blocks of statistics are looked for.
TAIL = 1 << 15
ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    remote.add_arguments(parser)
    parser.add_argument("file", metavar="FILE", help="the file to write ('-': stdout)")
    parser.add_argument(
        "--nic", metavar="N", type=int, help="this card only, counted from 0 (all cards)"
    )
    parser.add_argument(
        "--queue",
        metavar="N",
        type=count(0, 127),
        help="this virtqueue only: even to the guest, odd from the guest; not at a tap (all)",
    )
    parser.add_argument(
        "--snaplen",
        metavar="BYTES",
        type=count(1, SNAPLEN),
        default=SNAPLEN,
        help="keep at most so many bytes of each packet (all)",
    )
    parser.add_argument(
        "--limit",
        metavar="SIZE",
        help="write at most so much; packets beyond are lost (1G if FILE is a file, else all)",
    )
    parser.add_argument(
        "--filter", metavar="EXPRESSION", default="", help="capture only these packets"
    )


def run(args: argparse.Namespace) -> int:
    """Capture to the end; returns the exit status."""
    if args.file != "-" and args.host.startswith(SSH):
        raise UsageError(
            f"the file {args.file} would be made on the other machine",
            f"write it here: pyvmm capture {args.name} - --host {args.host} >{args.file}",
        )
    if args.file == "-" and os.isatty(1):
        raise UsageError(
            "a capture is no text for a terminal",
            f"name a file, or: pyvmm capture {args.name} - | wireshark -k -i -",
        )
    return remote.with_client(args, lambda client: _capture(client, args))


def _capture(client: Client, args: argparse.Namespace) -> int:
    from pyvmm.capture.session import LIMIT, LIMIT_MIN
    from pyvmm.cli.support.outputs import Output
    from pyvmm.memory import parse_size

    wish = {"snaplen": args.snaplen}
    if args.nic is not None:
        wish["nic"] = args.nic
    if args.queue is not None:
        wish["queue"] = args.queue
    if args.filter:
        from pyvmm.capture.bpf import compile_filter, rows

        wish |= {"filter": rows(compile_filter(args.filter, args.snaplen))}
        wish["expression"] = args.filter
    limit = parse_size(args.limit, "--limit") if args.limit is not None else None
    if limit is not None and not LIMIT_MIN <= limit < 1 << 63:
        raise UsageError(f"--limit {args.limit}", f"use {LIMIT_MIN >> 20}M at least")
    output = Output("FILE", args.file, private=True, keep=True)
    if limit is not None or output.regular:
        wish["limit"] = limit or LIMIT
    try:
        return _follow(client, wish, output)
    finally:
        output.close()


def _follow(client: Client, wish: dict[str, object], output: Output) -> int:
    from pyvmm.capture.pcapng import last_statistics
    from pyvmm.capture.session import FULL
    from pyvmm.control.captures import follow

    tail = b""

    def put(data: bytes) -> None:
        nonlocal tail
        if not tail:
            where = "stdout" if output.path == "-" else output.path
            print(f"pyvmm: capturing to {where}; Ctrl-C ends it", file=sys.stderr, flush=True)
        (output.write if tail else output.replace)(data)  # an older file stays until then
        tail = (tail + data)[-TAIL:]

    # A signal is noticed by its byte in a pipe, whatever the main thread does at that moment.
    ends = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    before = {number: signal.signal(number, lambda *_: None) for number in ENDING}
    signal.set_wakeup_fd(ends[1])
    try:
        sock, early = client.take_over("x-pyvmm-capture", **wish)
        with sock:
            sock.settimeout(None)
            follow(sock, early, put, ends[0])
    except BrokenPipeError:
        return 141
    except OSError as e:
        if not output.problem:
            raise
        print(f"pyvmm: {output.path} is lost: {e.strerror}", file=sys.stderr)
        return 101
    finally:
        signal.set_wakeup_fd(-1)
        for number, handler in before.items():
            signal.signal(number, handler)
        for fd in ends:
            os.close(fd)
    counted = last_statistics(tail)
    if not counted:
        raise MachineMissing("the machine broke the capture off; its last packets may be missing")
    for one in counted:
        if one.comment:
            print(f"pyvmm: at the end: {one.comment}", file=sys.stderr)
    lost = sum(one.lost for one in counted)
    packets = sum(one.accepted for one in counted)
    full = any(FULL in one.comment for one in counted)
    words = f", and {lost} lost: the file {'is full' if full else 'was too slow'}" if lost else ""
    print(f"pyvmm: {packets - lost} packets captured{words}", file=sys.stderr)
    return 0
