"""What Linux prints when something in it has broken: each phrase with its kind and its place in the
kernel's source.

A phrase is the beginning of a printk format, in the kernel's spelling. Whatever the function
inserts is a conversion as in C (%s, %d, %u, %x, %p and the like). The text before a phrase that
the file's ``pr_fmt`` adds ("watchdog: ", "rcu: ") is left out: every phrase may have it. The
sources are those of Linux 6.1, and for phrases that other versions have, of 4.19 to 7.1.

docs/verdicts.md has the same tables, and a test compares them.
"""

from __future__ import annotations

import re

#: Kind -> its meaning, for people. ``--fail-on`` takes these names.
KINDS = {
    "panic": "the kernel gave up; counts if the guest starts over (`--on-reboot restart`)",
    "oops": "an exception in kernel mode: bad address, divide error, invalid opcode, double fault",
    "bug": "the kernel's own state is broken: `BUG()`, corrupted lists and pages, wrong context",
    "lockup": "a CPU or a worker pool that does not get on: soft and hard lockups",
    "sanitizer": "a report of KASAN, KMSAN, KCSAN, KFENCE, UBSAN or kmemleak",
    "warning": "`WARN()` and its like",
    "hung-task": "a task that cannot be woken for minutes",
    "rcu-stall": "an RCU grace period that does not end, or an RCU thread that does not run",
    "lockdep": "wrong locking, found by lockdep or by RCU's checks",
    "oom": "no memory is left, and a process was killed for it",
    "alloc": "an allocation failed, and nobody was killed",
    "irq": "an interrupt that no driver wants",
    "network": "an interface that does not transmit, or cannot be removed",
}
#: Names for several kinds. The kernel begins the reports of all three kinds with "BUG:".
GROUPS = {"all": tuple(KINDS), "bug": ("bug", "lockup", "sanitizer")}

#: Kind, file, phrase. The first phrase that fits gives a line its kind.
PHRASES = (
    ("panic", "kernel/panic.c", "Kernel panic - not syncing: "),
    # Exceptions. Since 6.10, the line of die() begins with "Oops: ".
    ("oops", "arch/x86/mm/fault.c", "BUG: kernel NULL pointer dereference, address: "),
    ("oops", "arch/x86/mm/fault.c", "BUG: unable to handle "),
    ("oops", "arch/x86/mm/fault.c", "kernel tried to execute NX-protected page"),
    ("oops", "arch/x86/mm/fault.c", "unable to execute userspace code (SMEP?)"),
    ("oops", "arch/x86/mm/fault.c", "%s: Corrupted page table at address %lx"),
    ("oops", "arch/x86/mm/fault.c", "Thread overran stack, or stack corrupted"),
    ("oops", "arch/x86/kernel/traps.c", "PANIC: double fault"),
    ("oops", "arch/x86/kernel/traps.c", "BUG: %s stack guard page was hit at "),
    ("oops", "arch/x86/kernel/traps.c", "BUG: stack guard page was hit at "),
    ("oops", "arch/x86/kernel/traps.c", "Split lock detected"),
    ("oops", "arch/x86/kernel/traps.c", "Missing ENDBR: "),
    ("oops", "arch/x86/kernel/traps.c", "Unexpected #CP"),
    ("oops", "arch/x86/kernel/dumpstack.c", "%s: %04lx [#%d]"),
    ("oops", "arch/x86/kernel/dumpstack.c", "Oops: "),
    ("oops", "kernel/exit.c", "Fixing recursive fault but reboot is needed!"),
    ("oops", "arch/arm64/mm/fault.c", "Unable to handle kernel "),
    ("lockup", "kernel/watchdog.c", "BUG: soft lockup - CPU#%d stuck for "),
    ("lockup", "kernel/watchdog.c", "Watchdog detected hard LOCKUP"),
    ("lockup", "kernel/workqueue.c", "BUG: workqueue lockup - pool"),
    ("lockup", "kernel/locking/spinlock_debug.c", "BUG: spinlock lockup suspected"),
    ("lockup", "kernel/smp.c", "csd: %s non-responsive CSD lock (#%d)"),
    ("sanitizer", "mm/kasan/report.c", "BUG: KASAN: "),
    ("sanitizer", "mm/kmsan/report.c", "BUG: KMSAN: "),
    ("sanitizer", "kernel/kcsan/report.c", "BUG: KCSAN: "),
    ("sanitizer", "mm/kfence/report.c", "BUG: KFENCE: "),
    ("sanitizer", "lib/ubsan.c", "UBSAN: "),
    ("sanitizer", "mm/kmemleak.c", "%d new suspected memory leaks"),
    # Up to 4.10, lockdep put its headlines into brackets.
    ("lockdep", "kernel/locking/lockdep.c", "WARNING: possible circular locking dependency"),
    ("lockdep", "kernel/locking/lockdep.c", "WARNING: possible recursive locking"),
    ("lockdep", "kernel/locking/lockdep.c", "WARNING: possible irq lock inversion"),
    ("lockdep", "kernel/locking/lockdep.c", "WARNING: %s-safe -> %s-unsafe lock order detected"),
    ("lockdep", "kernel/locking/lockdep.c", "WARNING: inconsistent lock state"),
    ("lockdep", "kernel/locking/lockdep.c", "WARNING: bad unlock balance detected!"),
    ("lockdep", "kernel/locking/lockdep.c", "WARNING: bad contention detected!"),
    ("lockdep", "kernel/locking/lockdep.c", "WARNING: Nested lock was not taken"),
    ("lockdep", "kernel/locking/lockdep.c", "WARNING: held lock freed!"),
    ("lockdep", "kernel/locking/lockdep.c", "WARNING: %s/%d still has locks held!"),
    ("lockdep", "kernel/locking/lockdep.c", "WARNING: lock held when returning to user space!"),
    ("lockdep", "kernel/locking/lockdep.c", "WARNING: suspicious RCU usage"),
    ("lockdep", "kernel/locking/lockdep.c", "WARNING: chain_key collision"),
    ("lockdep", "kernel/locking/lockdep.c", "INFO: trying to register non-static key"),
    ("lockdep", "kernel/locking/lockdep.c", "BUG: key %px has not been registered!"),
    ("lockdep", "kernel/locking/lockdep.c", "BUG: looking up invalid subclass: "),
    ("lockdep", "kernel/locking/lockdep.c", "BUG: MAX_%s too low!"),
    ("lockdep", "kernel/locking/lockdep.c", "[ BUG: "),
    ("lockdep", "kernel/locking/lockdep.c", "[ INFO: possible "),
    ("lockdep", "kernel/locking/lockdep.c", "[ INFO: inconsistent lock state ]"),
    ("lockdep", "kernel/locking/lockdep.c", "[ INFO: suspicious RCU usage"),
    ("lockdep", "include/linux/debug_locks.h", "DEBUG_LOCKS_WARN_ON("),
    ("bug", "lib/bug.c", "kernel BUG at "),
    ("bug", "lib/bug.c", "Kernel BUG at "),
    ("bug", "include/asm-generic/bug.h", "BUG: failure at "),
    ("bug", "kernel/sched/core.c", "BUG: scheduling while atomic: "),
    ("bug", "kernel/sched/core.c", "BUG: sleeping function called from invalid context at "),
    ("bug", "lib/smp_processor_id.c", "BUG: using %s in preemptible ["),
    ("bug", "kernel/workqueue.c", "BUG: workqueue leaked "),
    ("bug", "kernel/softirq.c", "huh, entered softirq "),
    ("bug", "kernel/locking/spinlock_debug.c", "BUG: spinlock "),
    ("bug", "kernel/locking/spinlock_debug.c", "BUG: rwlock "),
    ("bug", "kernel/fork.c", "BUG: Bad rss-counter state "),
    ("bug", "kernel/fork.c", "BUG: non-zero pgtables_bytes on freeing mm: "),
    ("bug", "mm/page_alloc.c", "BUG: Bad page state in process "),
    ("bug", "mm/memory.c", "BUG: Bad page map in process "),
    ("bug", "mm/filemap.c", "BUG: Bad page cache in process "),
    ("bug", "mm/slub.c", "BUG %s (%s): "),
    ("bug", "mm/slab.c", "Slab corruption (%s): "),
    ("bug", "mm/page_poison.c", "pagealloc: memory corruption"),
    ("bug", "mm/usercopy.c", "Kernel memory %s attempt detected "),
    ("bug", "lib/list_debug.c", "list_add corruption"),
    ("bug", "lib/list_debug.c", "list_add double add: "),
    ("bug", "lib/list_debug.c", "list_del corruption"),
    ("bug", "fs/dcache.c", "BUG: Dentry "),
    ("bug", "kernel/cfi.c", "CFI failure at "),
    ("bug", "any file", "BUG: "),
    # Since 6.18 the line of WARN() has the place first.
    ("warning", "kernel/panic.c", "WARNING: CPU: %d PID: %d at "),
    ("warning", "kernel/panic.c", "WARNING: %s:%d at "),
    ("warning", "kernel/panic.c", "WARNING: at "),
    ("warning", "lib/refcount.c", "refcount_t: "),
    ("hung-task", "kernel/hung_task.c", "INFO: task %s:%d blocked for more than "),
    ("hung-task", "kernel/hung_task.c", "INFO: task %s:%d blocked in I/O wait for more than "),
    ("rcu-stall", "kernel/rcu/tree_stall.h", "INFO: %s detected stalls on CPUs/tasks:"),
    ("rcu-stall", "kernel/rcu/tree_stall.h", "INFO: %s self-detected stall on CPU"),
    ("rcu-stall", "kernel/rcu/tree_stall.h", "INFO: Stall ended before state dump start"),
    ("rcu-stall", "kernel/rcu/tree_stall.h", "%s kthread starved for %ld jiffies!"),
    ("rcu-stall", "kernel/rcu/tree_stall.h", "%s kthread timer wakeup didn't happen for "),
    ("rcu-stall", "kernel/rcu/tree_exp.h", "INFO: %s detected expedited stalls on CPUs/tasks:"),
    ("rcu-stall", "kernel/rcu/tasks.h", "INFO: %s detected stalls on tasks:"),
    ("oom", "mm/oom_kill.c", "%s invoked oom-killer: "),
    ("oom", "mm/oom_kill.c", "Out of memory: Kill"),
    ("oom", "mm/oom_kill.c", "Out of memory (oom_kill_allocating_task): Kill"),
    ("oom", "mm/oom_kill.c", "Memory cgroup out of memory: Kill"),
    ("oom", "mm/oom_kill.c", "Out of memory and no killable processes"),
    ("alloc", "mm/page_alloc.c", "%s: page allocation failure: order:%u"),
    ("alloc", "mm/page_alloc.c", "%s: page allocation stalls for "),
    ("alloc", "mm/vmalloc.c", "%s: vmalloc error: size %lu"),
    ("alloc", "mm/slub.c", "SLUB: Unable to allocate memory on "),
    ("alloc", "mm/slub.c", "SLUB: Unable to allocate memory from "),
    ("irq", "kernel/irq/spurious.c", "irq %d: nobody cared"),
    ("irq", "kernel/irq/spurious.c", "irq event %d: bogus return value "),
    # It was a WARN() until 6.5.
    ("network", "net/sched/sch_generic.c", "NETDEV WATCHDOG: %s (%s): transmit queue %u timed out"),
    ("network", "net/sched/sch_generic.c", "%s: NETDEV WATCHDOG: CPU: %d: transmit queue %u"),
    ("network", "net/core/dev.c", "waiting for %s to become free. Usage count = "),
)  # fmt: skip

#: What ``pr_fmt`` puts before a phrase.
PREFIX = r"(?:[\w/-]+(?: [\w/-]+)?: ){0,2}"
#: These say little, so they must begin the line: programs may write "NAME: BUG: " to /dev/kmsg.
BARE = ("BUG: ", "Oops: ")
_CONVERSION = re.compile(r"%0?\d*l*([sdupx])[xSB]?")
_VALUES = {"s": ".{1,200}?", "d": r"-?\d+", "u": r"\d+", "x": "[0-9a-f]+", "p": r"[0-9a-f]+"}


def pattern(phrase: str) -> str:
    """The regular expression of a phrase, to be matched at the beginning of a line."""
    out, end = "" if phrase in BARE else PREFIX, 0
    for found in _CONVERSION.finditer(phrase):
        out += re.escape(phrase[end : found.start()]) + _VALUES[found[1]]
        end = found.end()
    return out + re.escape(phrase[end:])


#: The longest literal text of each phrase, and the phrases that have it. A line without any of them
#: is done with after one search, and only the patterns of the others are ever compiled.
_HINTS: dict[str, list[int]] = {}
_RULES: dict[int, re.Pattern[str]] = {}
_ANY: list[re.Pattern[str]] = []


def _prepare() -> None:
    for i, (_, _, phrase) in enumerate(PHRASES):
        literal = max(_CONVERSION.sub("\n", phrase).split("\n"), key=len)
        _HINTS.setdefault(literal, []).append(i)
    _ANY.append(re.compile("|".join(re.escape(hint) for hint in _HINTS)))


def hinted(text: str) -> bool:
    """Whether one of PHRASES may be in a text."""
    if not _ANY:
        _prepare()
    return _ANY[0].search(text) is not None


def find(text: str) -> int | None:
    """The index of the first of PHRASES with which a line of the kernel begins; None if there is
    none.

    :param text: the line, without its time stamp.
    """
    if not hinted(text):
        return None
    for i in sorted(i for hint, indices in _HINTS.items() if hint in text for i in indices):
        if i not in _RULES:
            _RULES[i] = re.compile(pattern(PHRASES[i][2]))
        if _RULES[i].match(text):
            return i
    return None
