"""How fast one worker moves packets between its rings and a real tap, without a guest: for
profiling.

    python tests/perf/ring_bench.py [--frames N] [--size BYTES] [--repeat N] [--packed] [--profile]
        [--trace] [--capture] [--only tx|rx|loop]

The mock driver prepares a full ring, then the worker alone is timed: transmit into a tap whose host
end drops the frames, receive from a tap queue filled beforehand, and a loop from one ring to the
other (cext/cable.h). For instructions per packet, which repeat on a busy machine, run it by
valgrind --tool=callgrind --toggle-collect=serve, with --only and --repeat 1. Prints packets per
second, nanoseconds, system calls and CPU time a packet, with the spread. With --profile it waits
for `perf record -p PID` before each direction. Numbers depend on the machine: compare, do not gate.
"""

from __future__ import annotations

import argparse
import os
import socket
import statistics
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from pyvmm.backend.ports import loop_port
from pyvmm.capture.session import Capture
from pyvmm.datapath.capture import CapturePoint, PointCard
from pyvmm.datapath.emulated import EmulatedNet
from pyvmm.hostnet.netns import Namespace
from pyvmm.hostnet.tap import Interface
from pyvmm.kvm.recorder import Recorder
from pyvmm.memory import GuestMemory
from pyvmm.spec import virtio, virtio_net
from tests.driver import Events, NetDriver

RING = 16384


def acked(gso: bool, packed: bool) -> int:
    """Negotiated features; with GSO the worker must be ready for frames of 64 KiB."""
    form = [virtio.VIRTIO_F_RING_PACKED] if packed else []
    bits = [
        *form,
        virtio.VIRTIO_F_VERSION_1,
        virtio.VIRTIO_RING_F_EVENT_IDX,
        virtio_net.VIRTIO_NET_F_MRG_RXBUF,
    ]
    if gso:
        bits += [virtio_net.VIRTIO_NET_F_GUEST_CSUM, virtio_net.VIRTIO_NET_F_GUEST_TSO4]
    return sum(1 << b for b in bits)


def one(
    direction: str,
    frames: int,
    size: int,
    gso: bool,
    packed: bool,
    pause: Any,
    recorder: Any = None,
    captured: bool = False,
) -> tuple[float, dict[str, int]]:
    """Seconds for ``frames`` packets of ``size`` bytes, and the worker's counters."""
    with Namespace(address="192.168.92.1/24", mtu=max(1500, size)) as ns:
        memory = GuestMemory(64 << 20)
        for gpa in range(0, memory.size, 4096):
            memory.write(gpa, b"\1")  # a guest that runs has touched its memory
        buffers = min(RING, frames * (1 + size // 1536) + 64)
        form: dict[str, Any] = {"packed": True} if packed else {}
        driver = NetDriver(memory, size=RING, rx_size=1536, rx_buffers=buffers, **form)
        port = loop_port(1) if direction == "loop" else None
        point = CapturePoint()
        path = EmulatedNet(port or ns.tap, recorder=recorder, captures=point)
        capture = Capture([PointCard("net0", "", point)], null()) if captured else None
        # An unknown protocol: the host's stack drops it first thing.
        frame = b"\x02" * 6 + b"\x52" * 6 + b"\x88\xb5" + bytes(size - 14)
        if direction != "tx":
            driver.fill()
        if direction == "rx":
            with ns.socket(socket.AF_PACKET, socket.SOCK_RAW) as s:
                s.bind(("tap0", 0))
                for _ in range(frames):
                    s.send(frame)
        else:
            for _ in range(frames):
                driver.queue(frame)
            driver.tx.publish(kick=False)
        pause(direction)
        start = time.perf_counter()
        ns.tap.set_offloads(acked(gso, packed))
        path.start(acked(gso, packed), memory, [r.vring() for r in driver.rings], Events())
        done = "tx_packets" if direction == "tx" else "rx_packets"
        while path.counters()[done] < frames and time.perf_counter() - start < 60:
            time.sleep(0.0002)
        seconds = time.perf_counter() - start
        path.stop()
        counters = path.counters()
        path.close()
        if port is not None:
            port.close()
        if capture is not None:
            capture.close()
            counters["captured"] = capture.packets - capture.lost
        driver.close()
        memory.close()
    return seconds, counters


def null() -> int:
    """A file that takes everything at once."""
    return os.open(os.devnull, os.O_WRONLY)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--frames", type=int, default=10000, help=f"at most {RING}")
    parser.add_argument("--size", type=int, nargs="*", default=[64, 1514])
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--packed", action="store_true", help="packed rings")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--trace", action="store_true", help="record kicks, batches and packets")
    parser.add_argument("--only", choices=("tx", "rx", "loop"), help="one direction")
    parser.add_argument("--capture", action="store_true", help="capture the packets to /dev/null")
    args = parser.parse_args()

    def pause(direction: str) -> None:
        if args.profile:
            input(f"{direction}: perf record -p {os.getpid()}, then Enter ")

    scope = Recorder().scope("bench") if args.trace else None
    # Let all frames of a receive run wait in the tap.
    original = Interface.set_txqueuelen
    Interface.set_txqueuelen = lambda self, frames: original(self, args.frames + 100)  # type: ignore[method-assign]
    for size in args.size:
        for direction, gso in (("tx", False), ("rx", False), ("rx", True), ("loop", False)):
            if args.only not in (None, direction):
                continue
            done = "tx_packets" if direction == "tx" else "rx_packets"
            times, cpu = [], []
            for _ in range(args.repeat):
                seconds, c = one(
                    direction, args.frames, size, gso, args.packed, pause, scope, args.capture
                )
                if c[done] < args.frames:
                    raise SystemExit(f"{direction}: only {c[done]} of {args.frames} frames passed")
                times.append(seconds)
                cpu.append(c["worker_cpu_ns"] / args.frames)
            median = statistics.median(times)
            calls = c["fd_reads"] + c["fd_writes"] + c["rx_calls"] + c["tx_calls"] + c["wakeups"]
            label = f"{direction}{' big window' if gso else ''}"
            print(
                f"{label:14} {size:5} bytes: {args.frames / median / 1e3:7.0f} kpps, "
                f"{median / args.frames * 1e9:5.0f} ns "
                f"({min(times) / args.frames * 1e9:.0f} to {max(times) / args.frames * 1e9:.0f}), "
                f"{calls / args.frames:.3f} system calls a packet, worker's CPU "
                f"{statistics.median(cpu):.0f} ns ({min(cpu):.0f} to {max(cpu):.0f})"
                + (f", {c['captured']} captured" if args.capture else "")
            )


if __name__ == "__main__":
    main()
