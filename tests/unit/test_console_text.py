"""Reading a kernel's console: troubles, panics, phases, and the log with time stamps."""

from __future__ import annotations

import re

import pytest

from pyvmm.testing import console
from pyvmm.testing.console import PHASES, Log, Watch, offset, panic_quote, parse_kinds, phase

ALL = list(console.TROUBLES)

#: First lines of troubles as kernels print them, with their kind; None for lines that are no
#: trouble but look like one.
LINES = {
    "WARNING: CPU: 1 PID: 42 at net/core/dev.c:6189 napi_disable+0x1a/0x60": "warning",
    "WARNING: drivers/net/virtio_net.c:2871 at virtnet_open+0x12/0x90, CPU#0: ip/77": "warning",
    "WARNING: possible circular locking dependency detected": "lockdep",
    "WARNING: possible recursive locking detected": "lockdep",
    "WARNING: inconsistent lock state": "lockdep",
    "WARNING: suspicious RCU usage": "lockdep",
    "WARNING: bad unlock balance detected!": "lockdep",
    "DEBUG_LOCKS_WARN_ON(1)": "lockdep",
    "INFO: trying to register non-static key.": "lockdep",
    "rcu: INFO: rcu_preempt detected stalls on CPUs/tasks:": "rcu-stall",
    "rcu: INFO: rcu_sched self-detected stall on CPU": "rcu-stall",
    "rcu: INFO: rcu_preempt detected expedited stalls on CPUs/tasks: { 1-... }": "rcu-stall",
    "BUG: kernel NULL pointer dereference, address: 0000000000000010": "oops",
    "BUG: unable to handle page fault for address: ffffc90000000000": "oops",
    "Oops: 0002 [#1] PREEMPT SMP NOPTI": "oops",
    "general protection fault, probably for non-canonical address 0xdead: 0000 [#1] SMP": "oops",
    "kernel BUG at mm/slub.c:379!": "bug",
    "BUG: KASAN: slab-out-of-bounds in receive_buf+0x1/0x2": "bug",
    "BUG: sleeping function called from invalid context at kernel/locking/mutex.c:283": "bug",
    "BUG: soft lockup - CPU#0 stuck for 22s! [swapper/0:1]": "bug",
    "UBSAN: array-index-out-of-bounds in lib/x.c:1:2": "bug",
    "warning: `ping' uses 32-bit capabilities": None,
    "EXT4-fs warning: mounting unchecked fs": None,
    "systemd[1]: WARNING: CPU: 0 PID: 1 at nowhere": None,
    "rcu: Hierarchical RCU implementation.": None,
    "DEBUG: nothing": None,
}


def watch(text: str, kinds: list[str] | None = None) -> Watch:
    w = Watch(ALL if kinds is None else kinds)
    w(text.encode())
    w.finish()
    return w


@pytest.mark.parametrize("stamp", ["", "[    1.234567] ", "[12345.678901][  T123] "])
@pytest.mark.parametrize("line", LINES)
def test_each_trouble_has_its_kind(line: str, stamp: str) -> None:
    found = watch(f"{stamp}before\r\n{stamp}{line}\r\n{stamp}after\r\n")
    kind = LINES[line]
    assert [t.kind for t in found.troubles] == ([kind] if kind else [])
    if kind:
        assert found.troubles[0].message == line
        assert found.troubles[0].lines == [line, "after"]
        assert not watch(line, [k for k in ALL if k != kind]).troubles


def test_an_oops_counts_once_with_its_trace() -> None:
    text = (
        "[    1.000000] BUG: kernel NULL pointer dereference, address: 0\n"
        "[    1.000000] Oops: 0002 [#1] SMP\n[    1.000000] RIP: 0010:f+0x1/0x2\n"
        "[    1.000000] ---[ end trace 0000000000000000 ]---\n[    2.000000] other\n"
        "[    3.000000] WARNING: CPU: 0 PID: 1 at a.c:1 b+0x1/0x2\n"
    )
    found = watch(text)
    assert [t.kind for t in found.troubles] == ["oops", "warning"]
    assert found.troubles[0].lines[-1] == "---[ end trace 0000000000000000 ]---"
    assert len(found.troubles[0].lines) == 4


def test_pieces_of_any_size_and_a_flood_of_lines() -> None:
    text = "".join(f"noise {i}\n" for i in range(1000)) + "kernel BUG at a.c:1!\n"
    whole = Watch(["bug"])
    for i in range(0, len(text), 7):
        whole(text[i : i + 7].encode())
    assert [t.message for t in whole.troubles] == ["kernel BUG at a.c:1!"]
    many = watch("kernel BUG at a.c:1!\n" * 1000)
    assert (many.count, len(many.troubles)) == (1000, Watch.MAX)
    endless = Watch(ALL)
    for _ in range(1000):
        endless(b"x" * 4096)
    assert len(endless._rest) <= 4096


def test_kinds() -> None:
    assert parse_kinds("oops, bug") == ["oops", "bug"]
    assert parse_kinds("warning,all") == ALL
    with pytest.raises(ValueError, match="ooops"):
        parse_kinds("oops,ooops")


def test_panic_with_the_trace_after_it() -> None:
    text = (
        b"[    1.0] x\n[    1.000001] Kernel panic - not syncing: No working init found.\r\n"
        + b"".join(b"[    1.000002] line %d\r\n" % i for i in range(10))
    )
    text += b"[    1.000003] ---[ end Kernel panic - not syncing: No working init found. ]---\r\n"
    text += b"after\r\n"
    quote = panic_quote(text)
    assert quote[0] == "Kernel panic - not syncing: No working init found."
    assert quote[1] == "line 0"
    assert quote[-1].startswith("---[ end Kernel panic")


def test_panic_after_an_oops_begins_there() -> None:
    lines = [
        "noise",
        "Oops: 0002 [#1] SMP",
        *(f" f{i}+0x1/0x2" for i in range(20)),
        "Kernel panic - not syncing: Fatal exception",
    ]
    quote = panic_quote("\n".join(lines).encode())
    assert quote == lines[1:]
    assert panic_quote(b"no panic\n") == []
    # A line far away belongs to another trouble.
    far = ["Oops: 0002 [#1] SMP", *(["noise"] * 100), "Kernel panic - not syncing: x"]
    assert panic_quote("\n".join(far).encode()) == ["Kernel panic - not syncing: x"]


def test_kaslr() -> None:
    text = (
        b"[    1.000000] Kernel Offset: 0x1e000000 from 0xffffffff81000000"
        b" (relocation range: ...)\n"
    )
    assert offset(text) == 0x1E00_0000
    assert offset(b"Kernel Offset: disabled\n") == 0


@pytest.mark.parametrize(
    ("phases", "said", "text"),
    [
        ({}, False, "before there was any output"),
        ({}, True, "while the kernel booted"),
        ({"init": 1}, True, "in init"),
        ({"init": 1, "net_up": 2, "command": 3}, True, "while the command ran"),
        ({"init": 1, "command": 3, "command_end": 4}, True, "after the command's end"),
    ],
)
def test_phase(phases: dict[str, int], said: bool, text: str) -> None:
    assert text in PHASES[phase(phases, said)]


def test_log() -> None:
    out = bytearray()
    log = Log(out.extend)
    for piece in (b"one\r\ntw", b"o\n", b"\n", b"end"):
        log(piece)
    lines = bytes(out).split(b"\n")
    assert [line.partition(b"] ")[2] for line in lines] == [b"one", b"two", b"", b"end"]
    stamps = [float(re.match(rb"\[ *(\d+\.\d{6})\] ", line)[1]) for line in lines]  # type: ignore[index]
    assert stamps == sorted(stamps)
