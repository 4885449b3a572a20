"""The fuzz targets: what each is, and how it is made."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
CEXT = ROOT / "cext"

WORKER = (
    *("vring", "vring_packed", "dirty_log", "inflight", "thread", "event", "flow_hash", "cable"),
    *("capture", "filter", "impair", "confine", "inject", "intx", "relay", "ioctl"),
)
BUS = (
    *("bus", "serial", "pipe", "trace", "rtc", "pmtimer", "intx", "relay", "thread", "event"),
    *("confine", "ioctl"),
)
ADDRESS = "address,undefined"
#: The renamed function is in clocklock.c.
THREADS = ("-DFUZZ_THREADS", "-Dpthread_mutex_clocklock=race_clocklock")


class Target(NamedTuple):
    """One target. :ivar share: of the time, as a weight. :ivar about: in the table of docs.
    :ivar longest: bytes of an input.
    """

    name: str
    about: str
    share: int
    longest: int


class C(NamedTuple):
    """How a target in C is built. :ivar source: in this directory; the others are in cext."""

    source: str
    others: tuple[str, ...]
    sanitizers: str = ADDRESS
    flags: tuple[str, ...] = ()
    #: More sources of this directory.
    helpers: tuple[str, ...] = ()
    #: Whether libFuzzer drives it; else it runs for so many seconds by itself.
    guided: bool = True


class Python(NamedTuple):
    """A target in Python: the module in ``targets``, and the argument of its ``make``."""

    module: str
    argument: str = ""


NET_INPUT = 16 + 0x1800
LIFE_INPUT = 54 + 0x1800

TARGETS: dict[Target, C | Python] = {
    Target("vring", "both ring formats: pop, push, flush, notify", 2, NET_INPUT): C(
        "fuzz_vring.c", WORKER
    ),
    Target("net", "the worker between rings and tap; in-flight notes, log", 3, NET_INPUT): C(
        "fuzz_net.c", WORKER
    ),
    Target("life", "the worker's life: hold, attach, stop, finish, lost links", 3, LIFE_INPUT): C(
        "fuzz_life.c", WORKER
    ),
    Target("life-tsan", "the same with its thread, under ThreadSanitizer", 2, LIFE_INPUT): C(
        "fuzz_life.c", WORKER, "thread", THREADS, ("clocklock.c",)
    ),
    Target("race-net", "the worker and five other threads, under ThreadSanitizer", 1, 0): C(
        "race_net.c",
        ("net_worker", *WORKER),
        "thread",
        THREADS[1:],
        ("clocklock.c",),
        guided=False,
    ),
    Target("race-bus", "bus, pipe, serial port, ledger: six threads, the same", 1, 0): C(
        "race_bus.c", BUS, "thread", guided=False
    ),
    Target("flow", "the hash of a frame's flow", 1, 512): C("fuzz_flow.c", ("flow_hash",)),
    Target("filter", "filters of captures, over frames in segments", 1, 1024): C(
        "fuzz_filter.c", ("filter",)
    ),
    Target("bus", "ports and memory: serial, clocks, PCI latch, kicks, ISR, ledger", 2, 2048): C(
        "fuzz_bus.c", BUS
    ),
    Target("pci-emulated", "PCI, BARs, virtio registers, control queue", 3, 1024): Python(
        "pci", "emulated"
    ),
    Target("pci-vhost-net", "the same on vhost-net (a device of ours)", 2, 1024): Python(
        "pci", "vhost-net"
    ),
    Target("pci-vhost-user", "the same on vhost-user (our back-end)", 2, 1024): Python(
        "pci", "vhost-user"
    ),
    Target("pci-vhost-vdpa", "the same on vhost-vdpa (a device of ours)", 1, 1024): Python(
        "pci", "vhost-vdpa"
    ),
    Target("mmio", "virtio registers over MMIO", 1, 1024): Python("mmio"),
    Target("front-end", "our back-end against a hostile front-end", 3, 2048): Python("front_end"),
    Target("back-end", "our front-end against a hostile back-end", 3, 1024): Python("back_end"),
    Target("loader", "ELF, bzImage, multiboot 1, flat kernels", 2, 1024): Python("loader"),
    Target("qmp", "the control socket", 1, 1024): Python("qmp"),
    Target("fw-cfg", "QEMU's firmware configuration device", 1, 512): Python("fw_cfg"),
    Target("agent", "guest port and command channel", 2, 1024): Python("agent"),
    Target("helper", "the helper of a VMM that somebody has taken over", 1, 1024): Python("helper"),
    Target("answer", "what the process of a test kernel sends", 1, 1024): Python("answer"),
    Target("testbed", "client and supervisor against a hostile testbed", 1, 1024): Python(
        "testbed"
    ),
    Target("scenario", "files of scenarios, rules of faults, their words for tc", 1, 1024): Python(
        "scenario"
    ),
    Target("images", "qcow2 headers and traces", 2, 1024): Python("images"),
}
BY_NAME = {target.name: target for target in TARGETS}
