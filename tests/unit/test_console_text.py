"""Reading a kernel's console: reports, panics, phases, and the log with time stamps."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from pyvmm.cli import main
from pyvmm.testing.console import (
    PHASES,
    Log,
    Watch,
    audible,
    offset,
    panic_quote,
    parse_kinds,
    phase,
    pieces,
)
from pyvmm.testing.phrases import GROUPS, KINDS, PHRASES, find

ALL = list(KINDS)
ROOT = Path(__file__).parents[2]
#: What two kernels wrote when a test broke them (tests/boot/breaker.py), by name and kind.
REAL = sorted((ROOT / "tests" / "data" / "console").glob("*.txt"))

#: Lines of kernels, with their kind; None for lines that are no report but look like one. They are
#: printk formats of Linux 4.9 to 7.1 with values that kernels have inserted. There is at least one
#: for each phrase that is not in REAL.
LINES = {
    "WARNING: CPU: 1 PID: 42 at net/core/dev.c:6189 napi_disable+0x1a/0x60": "warning",
    "WARNING: drivers/net/virtio_net.c:2871 at virtnet_open+0x12/0x90, CPU#0: ip/77": "warning",
    "WARNING: at virtnet_open+0x12/0x90, CPU#0: ip/77": "warning",
    "WARNING: possible circular locking dependency detected": "lockdep",
    "WARNING: possible recursive locking detected": "lockdep",
    "WARNING: possible irq lock inversion dependency detected": "lockdep",
    "WARNING: SOFTIRQ-safe -> SOFTIRQ-unsafe lock order detected": "lockdep",
    "WARNING: inconsistent lock state": "lockdep",
    "WARNING: suspicious RCU usage": "lockdep",
    "WARNING: bad unlock balance detected!": "lockdep",
    "WARNING: bad contention detected!": "lockdep",
    "WARNING: Nested lock was not taken": "lockdep",
    "WARNING: held lock freed!": "lockdep",
    "WARNING: cat/81 still has locks held!": "lockdep",
    "WARNING: lock held when returning to user space!": "lockdep",
    "WARNING: chain_key collision": "lockdep",
    "DEBUG_LOCKS_WARN_ON(1)": "lockdep",
    "INFO: trying to register non-static key.": "lockdep",
    "BUG: key ffff888005b0a2d8 has not been registered!": "lockdep",
    "BUG: looking up invalid subclass: 8": "lockdep",
    "BUG: MAX_LOCK_DEPTH too low!": "lockdep",
    "BUG: MAX_LOCKDEP_ENTRIES too low!": "lockdep",
    "[ BUG: Invalid wait context ]": "lockdep",
    "[ BUG: held lock freed! ]": "lockdep",
    "[ INFO: possible circular locking dependency detected ]": "lockdep",
    "[ INFO: inconsistent lock state ]": "lockdep",
    "[ INFO: suspicious RCU usage. ]": "lockdep",
    "rcu: INFO: rcu_preempt detected stalls on CPUs/tasks:": "rcu-stall",
    "INFO: rcu_sched detected stalls on CPUs/tasks:": "rcu-stall",
    "rcu: INFO: rcu_sched self-detected stall on CPU": "rcu-stall",
    "rcu: INFO: rcu_preempt detected expedited stalls on CPUs/tasks: { 1-... }": "rcu-stall",
    "rcu: INFO: Stall ended before state dump start": "rcu-stall",
    "rcu: rcu_preempt kthread starved for 5253 jiffies! g-467 f0x2 RCU_GP_WAIT_FQS(5)": "rcu-stall",
    "rcu: rcu_preempt kthread timer wakeup didn't happen for 5249 jiffies! g-7 f0x0": "rcu-stall",
    "INFO: rcu_tasks detected stalls on tasks:": "rcu-stall",
    "rcu: INFO: rcu_tasks_trace detected stalls on tasks:": "rcu-stall",
    "BUG: unable to handle page fault for address: ffffc90000000000": "oops",
    "BUG: unable to handle kernel paging request at ffffc90000000000": "oops",
    "BUG: unable to handle kernel NULL pointer dereference at 0000000000000010": "oops",
    "unable to execute userspace code (SMEP?) (uid: 0)": "oops",
    "cat: Corrupted page table at address 7f1c8e4c5000": "oops",
    "Thread overran stack, or stack corrupted": "oops",
    "PANIC: double fault, error_code: 0x0": "oops",
    "BUG: stack guard page was hit at 0000000095930000 (stack is 000..0)": "oops",
    "BUG: IRQ stack guard page was hit at 0000000095930000 (stack is 000..0)": "oops",
    "stack segment: 0000 [#1] PREEMPT SMP NOPTI": "oops",
    "Oops: stack segment: 0000 [#1] SMP NOPTI": "oops",
    "alignment check: 0000 [#1] SMP": "oops",
    "Oops: Split lock detected": "oops",
    "Split lock detected": "oops",
    "traps: Missing ENDBR: 0xffffffffc0402000": "oops",
    "traps: Unexpected #CP": "oops",
    "Oops: something that no version has said yet": "oops",
    "Oops: 0002 [#1] PREEMPT SMP NOPTI": "oops",
    "Fixing recursive fault but reboot is needed!": "oops",
    "Internal error: Oops: 0000000096000044 [#1] PREEMPT SMP": "oops",
    "Unable to handle kernel NULL pointer dereference at virtual address 0000000000000008": "oops",
    "Kernel BUG at foo+0x1/0x2 [verbose debug info unavailable]": "bug",
    "BUG: failure at fs/x.c:12/f()!": "bug",
    "BUG: KASAN: slab-out-of-bounds in receive_buf+0x1/0x2": "sanitizer",
    "BUG: KMSAN: uninit-value in f+0x1/0x2": "sanitizer",
    "BUG: KCSAN: data-race in f / g": "sanitizer",
    "BUG: KFENCE: out-of-bounds read in f+0x1/0x2": "sanitizer",
    "UBSAN: array-index-out-of-bounds in lib/x.c:1:2": "sanitizer",
    "kmemleak: 3 new suspected memory leaks (see /sys/kernel/debug/kmemleak)": "sanitizer",
    "BUG: sleeping function called from invalid context at kernel/locking/mutex.c:283": "bug",
    "BUG: using smp_processor_id() in preemptible [00000000] code: cat/81": "bug",
    "BUG: using __this_cpu_add() in preemptible [00000000] code: cat/81": "bug",
    "BUG: workqueue leaked lock or atomic: kworker/0:1/0x00000001/12": "bug",
    "softirq: huh, entered softirq 3 NET_RX 00000000a with preempt_count 00000101": "bug",
    "BUG: spinlock bad magic on CPU#0, cat/81": "bug",
    "BUG: rwlock wrong CPU on CPU#0, cat/81, 00000000a": "bug",
    "BUG: Bad rss-counter state mm:00000000c8a7 type:MM_ANONPAGES val:1": "bug",
    "BUG: non-zero pgtables_bytes on freeing mm: 4096": "bug",
    "BUG: Bad page map in process cat  pte:8000000005b0a067 pmd:05b0b067": "bug",
    "BUG: Bad page cache in process cat  pfn:02000": "bug",
    "BUG kmalloc-64 (Not tainted): Redzone overwritten": "bug",
    "BUG kmalloc-64 (Tainted: G    B             ): Poison overwritten": "bug",
    "Slab corruption (Not tainted): size-64 start=ffff888005b0a2d8, len=64": "bug",
    "pagealloc: memory corruption": "bug",
    "list_add corruption. next->prev should be prev (a), but was b. (next=c).": "bug",
    "list_add double add: new=a, prev=a, next=b.": "bug",
    "BUG: Dentry 00000000a{i=1,n=x}  still in use (1) [unmount of tmpfs tmpfs]": "bug",
    "CFI failure at f+0x1/0x2 (target: g+0x0/0x4; expected type: 0x12345678)": "bug",
    "BUG: something that no version has said yet": "bug",
    "watchdog: BUG: soft lockup - CPU#0 stuck for 22s! [swapper/0:1]": "lockup",
    "NMI watchdog: BUG: soft lockup - CPU#0 stuck for 22s! [swapper/0:1]": "lockup",
    "BUG: soft lockup - CPU#0 stuck for 22s! [swapper/0:1]": "lockup",
    "NMI watchdog: Watchdog detected hard LOCKUP on cpu 0": "lockup",
    "watchdog: Watchdog detected hard LOCKUP on cpu 3": "lockup",
    "watchdog: CPU1: Watchdog detected hard LOCKUP on cpu 3": "lockup",
    "BUG: workqueue lockup - pool cpus=0 node=0 flags=0x0 nice=0 stuck for 31s!": "lockup",
    "BUG: spinlock lockup suspected on CPU#1, cat/81": "lockup",
    "smp: csd: Detected non-responsive CSD lock (#1) on CPU#1, waiting 5000000001 ns": "lockup",
    "INFO: task kworker/0:1:12 blocked for more than 120 seconds.": "hung-task",
    "INFO: task tmux: server:12 blocked in I/O wait for more than 122 seconds.": "hung-task",
    "tail invoked oom-killer: gfp_mask=0x140cca(GFP_HIGHUSER_MOVABLE), order=0": "oom",
    "Out of memory: Killed process 81 (tail) total-vm:200kB, anon-rss:100kB": "oom",
    "Out of memory: Kill process 81 (tail) score 900 or sacrifice child": "oom",
    "Out of memory (oom_kill_allocating_task): Killed process 81 (tail) total-vm:2kB": "oom",
    "Memory cgroup out of memory: Killed process 81 (tail) total-vm:200kB": "oom",
    "Out of memory and no killable processes...": "oom",
    "kworker/0:1: page allocation failure: order:4, mode:0x40dc0(GFP_KERNEL)": "alloc",
    "cat: page allocation stalls for 10000ms, order:0": "alloc",
    "modprobe: vmalloc error: size 4096, failed to allocate pages": "alloc",
    "SLUB: Unable to allocate memory on node -1, gfp=0x820(GFP_ATOMIC)": "alloc",
    "SLUB: Unable to allocate memory from node 1": "alloc",
    "irq event 26: bogus return value a": "irq",
    "NETDEV WATCHDOG: eth0 (virtio_net): transmit queue 0 timed out": "network",
    "virtio_net virtio0 eth0: NETDEV WATCHDOG: CPU: 0: transmit queue 0 timed": "network",
    "unregister_netdevice: waiting for lo to become free. Usage count = 1": "network",
    "Kernel panic - not syncing: Attempted to kill init! exitcode=0x00000100": "panic",
    # Not the kernel's fault, or not a fault at all.
    "warning: `ping' uses 32-bit capabilities": None,
    "EXT4-fs warning: mounting unchecked fs": None,
    "systemd[1]: WARNING: CPU: 0 PID: 1 at nowhere": None,
    "rcu: Hierarchical RCU implementation.": None,
    "DEBUG: nothing": None,
    "traps: cat[81] general protection fault ip:401136 sp:7ffe2 error:0 in cat[401000+1000]": None,
    "traps: cat[81] trap divide error ip:401136 sp:7ffe2 error:0 in cat[401000+1000]": None,
    "cat[81]: segfault at 0 ip 0000000000401136 sp 00007ffe error 4 in cat": None,
    "x86/split lock detection: #AC: cat/81 took a split_lock trap at address: 0x401136": None,
    "Spectre V2 : WARNING: Unprivileged eBPF is enabled with eIBRS on, data leaks possible": None,
    "WARNING: Spectre-v2 mitigation is off, disabling ITS": None,
    "Lockdown: modprobe: unsigned module loading is restricted": None,
    "Run /sbin/bug as init process": None,
    "  with arguments: /usr/share/BUG: x": None,
    "my-test: BUG: 3 of 4 tests failed": None,
    "workqueue: drain_vmap_area_work hogged CPU for >10000us 4 times": None,
    "clocksource: timekeeping watchdog on CPU0: Marking clocksource 'tsc' as unstable": None,
    "NMI watchdog: Perf NMI watchdog permanently disabled": None,
    "rcu: INFO: no stall": None,
    "Freeing unused kernel image (initmem) memory: 2048K": None,
    "e1000: probe of 0000:00:03.0 failed with error -5": None,
    "debug: Oops, that was nothing": None,
}
STAMPS = (
    "[    1.234567] ",
    "[12345.678901][  T123] ",
    "[    1.234567][   C0] ",
    "<4>[    1.234567] ",
)


def watch(text: str, kinds: list[str] | None = None) -> Watch:
    w = Watch(ALL if kinds is None else kinds)
    w(text.encode())
    w.finish()
    return w


def real(path: Path) -> list[tuple[str, str, str]]:
    """Name, kind and text of what is in a file of REAL."""
    parts = re.split(r"^=== (\S+): (\S+)\n", path.read_text(), flags=re.MULTILINE)[1:]
    return list(zip(parts[::3], parts[1::3], parts[2::3], strict=True))


@pytest.mark.parametrize("stamp", ["", *STAMPS])
@pytest.mark.parametrize("line", LINES)
def test_each_line_has_its_kind(line: str, stamp: str) -> None:
    found = watch(f"{stamp}before\r\n{stamp}{line}\r\n{stamp}after\r\n")
    kind = LINES[line]
    assert [t.kind for t in found.troubles] == ([kind] if kind else [])
    if kind:
        assert found.troubles[0].message == line
        assert found.troubles[0].lines == [line, "after"]
        assert not watch(line, [k for k in ALL if k != kind]).troubles


@pytest.mark.parametrize("path", REAL, ids=lambda path: path.stem)
def test_what_real_kernels_wrote(path: Path) -> None:
    cases = real(path)
    assert len(cases) > 15
    for name, kind, text in cases:
        for fed in (text, text.replace("\n", "\r\n"), "my prompt> " + text):
            found = watch(fed)
            assert found.troubles and found.troubles[0].kind == kind, name
            assert watch(fed, [kind]).count >= 1, name
            # What may follow: die(), a panic, and, because the stall time-out was 3 s, stalls.
            more = (kind, "oops", "panic", "lockup", "rcu-stall")
            assert not watch(fed, [k for k in ALL if k not in more]).count, name


@pytest.mark.parametrize("path", sorted((REAL[0].parent / "clean").glob("*")), ids=lambda p: p.stem)
def test_a_clean_boot_is_clean(path: Path) -> None:
    """Whole consoles of kernels with loglevel=7, with a card, two CPUs and a command."""
    text = path.read_text()
    assert "Linux version" in text and text.count("\n") > 150
    found = watch(text)
    assert [t.message for t in found.troubles] == []
    assert watch(text + "[  100.000000] kernel BUG at a.c:1!\n").count == 1


def test_every_phrase_is_in_some_line() -> None:
    """Each of PHRASES names the kind of at least one line; none is hidden by one before it."""
    lines = [line for line, kind in LINES.items() if kind]
    texts = [text for path in REAL for _, _, text in real(path)]
    lines += [pieces(line)[-1][1] for text in texts for line in text.splitlines()]
    used = {find(line) for line in lines}
    assert [PHRASES[i] for i in range(len(PHRASES)) if i not in used] == []


def test_phrases_have_known_kinds_and_are_listed_once() -> None:
    assert {kind for kind, _, _ in PHRASES} == set(KINDS)
    assert len({phrase for _, _, phrase in PHRASES}) == len(PHRASES)


def test_a_program_that_talks_like_a_kernel_is_not_the_kernel() -> None:
    """Between stamped lines, text without a stamp is a program's."""
    talk = "".join(f"{line}\n" for line, kind in LINES.items() if kind)
    stamped = "[    1.234567] Run /init as init process\n"
    assert watch(stamped + talk).count == 0
    assert watch(talk).count > 0
    # Another kernel, without stamps, is listened to again.
    assert watch(stamped + "Linux version 6.1.0\nkernel BUG at a.c:1!\n").count == 1
    # A path or an argument is not the beginning of a line.
    assert watch(stamped + "[    2.000000] /tmp/BUG: Oops: 0000 [#1\n").count == 0


def test_a_line_of_the_kernel_within_other_output() -> None:
    """A program has not ended its line, or writes over it by carriage returns."""
    for before in ("50%", "[    1.000000] unfinished", "10%\r20%\r", "\r\r", "x" * 9000, "[ 1] "):
        found = watch(f"[    1.000000] up\n{before}[    2.000000] kernel BUG at a.c:1!\n")
        assert [t.message for t in found.troubles] == ["kernel BUG at a.c:1!"], before
    assert watch("10%\rkernel BUG at a.c:1!\r\n").count == 1


def test_reports_of_several_cpus_at_once() -> None:
    """With CONFIG_PRINTK_CALLER each report has its own lines."""
    text = (
        "[    1.000000][  T81] BUG: kernel NULL pointer dereference, address: 0\n"
        "[    1.000000][   C1] WARNING: CPU: 1 PID: 0 at a.c:1 b+0x1/0x2\n"
        "[    1.000001][  T81] Oops: 0002 [#1] SMP\n"
        "[    1.000001][   C1]  of the CPU\n"
        "[    1.000002][  T81]  of the task\n"
    )
    found = watch(text)
    assert [t.lines[1:] for t in found.troubles] == [
        ["Oops: 0002 [#1] SMP", " of the task"],
        [" of the CPU"],
    ]


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
    assert parse_kinds("oops, panic") == ["panic", "oops"]
    assert parse_kinds("warning,all") == ALL
    assert set(parse_kinds("bug")) == {"bug", "lockup", "sanitizer"}, "all that begins with BUG:"
    with pytest.raises(ValueError, match="ooops"):
        parse_kinds("oops,ooops")


@pytest.mark.parametrize(
    ("append", "added"),
    [
        ("", False),
        ("quiet", True),
        ("root=/dev/x quiet ro", True),
        ("loglevel=4", True),
        ("quiet loglevel=5", False),
        ("loglevel=7 quiet", True),
        ("quiet debug", False),
        ("quiet ignore_loglevel", False),
        ("ignore_loglevel quiet", False),
        ("-- quiet", False),
    ],
)
def test_the_console_gets_warnings(append: str, added: bool) -> None:
    assert audible(append) == append + " loglevel=5" * added


def test_what_is_for_init_stays_for_init() -> None:
    assert audible("quiet -- quiet x") == "quiet loglevel=5 -- quiet x"


def test_the_page_has_the_same_tables() -> None:
    """docs/verdicts.md; the message is what has to be in it."""
    page = (ROOT / "docs" / "verdicts.md").read_text()
    for text in tables():
        assert text in page, text


def tables() -> list[str]:
    kinds = "".join(f"| `{kind}` | {meaning} |\n" for kind, meaning in KINDS.items())
    phrases = "".join(f"| `{kind}` | `{phrase}` | {file} |\n" for kind, file, phrase in PHRASES)
    return [kinds, phrases]


@pytest.mark.parametrize("command", ["run", "matrix"])
def test_help_names_all_kinds(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([command, "--help"])
    text = "".join(capsys.readouterr().out.split())
    assert f"{','.join(ALL)}orall" in text
    assert set(GROUPS) == {"all", "bug"}


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
    full = bytearray()
    log = Log(full.extend, limit=10)
    for piece in (b"four\n", b"five\n", b"eleven", b"more\n"):
        log(piece)
    log.note("verdict")
    said = [line.partition(b"] ")[2] for line in bytes(full).splitlines()]
    assert said[:2] == [b"four", b"five"] and said[3:] == [b"pyvmm: verdict"]
    assert b"largest size" in said[2] and log.dropped == 11
    stamps = [float(re.match(rb"\[ *(\d+\.\d{6})\] ", line)[1]) for line in lines]  # type: ignore[index]
    assert stamps == sorted(stamps)
