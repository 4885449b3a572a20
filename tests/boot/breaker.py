"""Breaks the kernel of a running guest: machine code for one of the kernel's own functions, which
the host writes into guest memory.

A kernel module (lkdtm) would do the same, but Debian's cloud kernels have none, and a module fits
one build of one kernel only. This code finds what it calls by the guest's own /proc/kallsyms, so
every kernel with CONFIG_KALLSYMS can be broken. Whoever reads /proc/version runs the code, in
process context, without locks but the file's own.
"""

from __future__ import annotations

import re
import struct
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.boot.guest import Guest

#: Linux maps its image there, as long as KASLR does not move it (pgtable_64_types.h).
IMAGE = 0xFFFF_FFFF_8000_0000
#: The function that is overwritten, and show_softirqs() and others behind it, which nobody calls.
VICTIM = "version_proc_show"

#: Not a symbol: the number of the serial port's interrupt, which has a handler.
SERIAL = "ttyS"

GFP_KERNEL = 0xCC0
NORETRY = 0x10000
HZ = 250
RAX, RCX, RDX, RDI, RSI, R8, R9 = 0xB8, 0xB9, 0xBA, 0xBF, 0xBE, 0x1B8, 0x1B9
ARGUMENTS = (RDI, RSI, RDX, RCX, R8, R9)


class Code:
    """A piece of machine code at an address, with its data behind it.

    :param at: the virtual address at which it will be.
    """

    def __init__(self, at: int, symbols: dict[str, int]) -> None:
        self._at, self._symbols = at, symbols
        self._code, self._data = bytearray(), bytearray()
        self._strings: list[tuple[int, int]] = []  # place of an address in the code, in the data

    def raw(self, text: str) -> None:
        """Append bytes, in hexadecimal."""
        self._code += bytes.fromhex(text)

    def load(self, register: int, value: int | str) -> None:
        """Move a number, or the address of a string, into a register; by a 64-bit immediate."""
        self._code += bytes((0x49 if register & 0x100 else 0x48, register & 0xFF))
        if isinstance(value, str):
            self._strings.append((len(self._code), len(self._data)))
            self._data += value.encode() + b"\0"
            value = 0
        self._code += struct.pack("<Q", value & (1 << 64) - 1)

    def symbol(self, *names: str) -> int:
        """The address of the first of ``names`` that this kernel has."""
        return self._symbols[next((n for n in names if n in self._symbols), names[0])]

    def call(self, *names: str, args: tuple[int | str | None, ...] = ()) -> None:
        """Call the first of ``names`` that this kernel has. An argument None stays as it is."""
        for register, value in zip(ARGUMENTS, args, strict=False):
            if value is not None:
                self.load(register, value)
        self.load(RAX, self.symbol(*names))
        self.raw("ff d0")

    def done(self) -> bytes:
        """The bytes; the function returns 0."""
        self.raw("31 c0 c3")
        base = self._at + len(self._code)
        for place, offset in self._strings:
            struct.pack_into("<Q", self._code, place, base + offset)
        return bytes(self._code + self._data)


def _repeat(c: Code, seconds: float, inside: str) -> None:
    """Run ``inside`` for some seconds of the guest's clock; rbx is used."""
    c.raw("53")  # push rbx
    c.call("ktime_get")
    c.load(RCX, int(seconds * 1e9))
    c.raw("48 01 c8 48 89 c3")  # rbx = rax + rcx
    begin = len(c._code)
    c.raw(inside)
    c.call("ktime_get")
    c.raw("48 39 d8")  # cmp rax, rbx
    c.raw(f"7c {(begin - len(c._code) - 2) & 0xFF:02x}")  # jl
    c.raw("5b")


def _locked_sleep(c: Code) -> None:
    c.raw("50 48 c7 04 24 00 00 00 00 48 89 e7")  # a spinlock on the stack, unlocked
    c.call("_raw_spin_lock")
    c.call("schedule_timeout_uninterruptible", args=(1,))
    c.raw("58")


def _list(c: Code) -> None:
    c.raw("48 83 ec 20 48 89 64 24 08")  # a list head on the stack; prev: itself
    c.load(RAX, 0xDEAD_0000_0000_0100)  # next: LIST_POISON1
    c.raw("48 89 04 24 48 89 e7")
    c.call("__list_del_entry_valid", "__list_del_entry_valid_or_report")
    c.raw("48 83 c4 20")


def _double_free(c: Code) -> None:
    c.raw("53")
    c.call("__kmalloc", "__kmalloc_noprof", args=(64, GFP_KERNEL))
    c.raw("48 89 c3")
    for _ in range(2):
        c.raw("48 89 df")
        c.call("kfree")
    c.raw("5b")


def _use_after_free(c: Code) -> None:
    """Until KFENCE has taken the object."""
    inner = Code(0, c._symbols)
    inner.call("__kmalloc", "__kmalloc_noprof", args=(64, GFP_KERNEL))
    inner.raw("50 48 89 c7")
    inner.call("kfree")
    inner.raw("58 8b 00")
    _repeat(c, 0.3, inner._code.hex())


def _pages(c: Code) -> None:
    """Take blocks of 4 MiB until there is none, then print that."""
    begin = len(c._code)
    c.call("__get_free_pages", "get_free_pages_noprof", args=(GFP_KERNEL | NORETRY, 10))
    c.raw(f"48 85 c0 75 {(begin - len(c._code) - 5) & 0xFF:02x}")


def _unhandled(c: Code) -> None:
    c.call("irq_to_desc", args=(c.symbol(SERIAL),))
    c.raw("48 89 c7 31 f6")
    c.call("__report_bad_irq")


def _bad_page(c: Code) -> None:
    c.load(RDI, c.symbol("vmemmap_base"))
    c.raw("48 8b 3f 48 81 c7 00 00 08 00")  # page frame 0x2000
    c.load(RSI, "nonzero mapcount")
    c.load(RAX, c.symbol("bad_page"))
    c.raw("ff d0")


def _raw(text: str) -> Callable[[Code], None]:
    return lambda c: c.raw(text)


def _load(register: int, value: int | str) -> Callable[[Code], None]:
    return lambda c: c.load(register, value)


def _call(*names: str, args: tuple[int | str | None, ...] = ()) -> Callable[[Code], None]:
    return lambda c: c.call(*names, args=args)


def _steps(*steps: Callable[[Code], None]) -> Callable[[Code], None]:
    def make(c: Code) -> None:
        for step in steps:
            step(c)

    return make


HOLE = 0xFFFF_C8FF_0000_0000  # Linux maps nothing there
NON_CANONICAL = 0xDEAD_0000_0000_0000

#: Name -> what is done.
BREAKS: dict[str, Callable[[Code], None]] = {
    "null": _raw("31 c0 89 00"),
    "wild-read": _steps(_load(RAX, HOLE), _raw("8b 00")),
    "jump-to-data": lambda c: _steps(_load(RAX, c.symbol("vmemmap_base")), _raw("ff e0"))(c),
    "non-canonical": _steps(_load(RAX, NON_CANONICAL), _raw("8b 00")),
    "divide": _raw("31 d2 31 c9 f7 f1"),
    "invalid-opcode": _raw("0f 0b"),
    "int3": _raw("cc"),
    "guard-page": _raw("50 eb fd"),
    "double-fault": _steps(_load(RAX, HOLE), _raw("48 89 c4 50")),
    "warning": _call("__warn", args=("drivers/net/breaker.c", 42, IMAGE + 0x100_0000, 9, 0, 0)),
    "spin": _raw("f3 90 eb fc"),  # until release() has changed the jump's distance
    # The guest looks every second, twice, and may stand still meanwhile.
    "uninterruptible": _call("schedule_timeout_uninterruptible", args=(12 * HZ,)),
    "locked-sleep": _locked_sleep,
    "list": _list,
    "refcount": _steps(
        _raw("50 48 89 e7"), _call("refcount_warn_saturate", args=(None, 3)), _raw("58")
    ),
    "usercopy": _call("usercopy_abort", args=("SLUB object", "breaker", 1, 0, 100)),
    "bad-page": _bad_page,
    "double-free": _double_free,
    "use-after-free": _use_after_free,
    "pages": _pages,
    "unhandled-irq": _unhandled,
    "stack-protector": _call("__stack_chk_fail"),
    "panic": _call("panic", args=("breaker: %s", "on purpose")),
}


class _Wanted(dict[str, int]):
    """Notes which symbols are asked for."""

    def __contains__(self, name: object) -> bool:
        self[str(name)] = 0
        return False

    def __missing__(self, name: str) -> int:
        return 0


def symbols(guest: Guest) -> dict[str, int]:
    """The addresses of what BREAKS calls, as far as the guest's kernel has it."""
    wanted = _Wanted({VICTIM: 0})
    for make in BREAKS.values():
        make(Code(0, wanted))
    text = guest.do(f"grep -E ' ({'|'.join(wanted)})$' /proc/kallsyms")
    found = re.findall(r"^([0-9a-f]{16}) \w (\w+)$", text, re.MULTILINE)
    irq = re.search(r" *(\d+):", guest.do("grep ttyS0 /proc/interrupts"))
    assert irq is not None
    return {name: int(address, 16) for address, name in found} | {SERIAL: int(irq[1])}


def code(name: str, where: dict[str, int]) -> bytes:
    """The machine code of BREAKS[name], for the address of VICTIM."""
    c = Code(where[VICTIM], where)
    BREAKS[name](c)
    return c.done()


def write(guest: Guest, virtual: int, data: bytes) -> None:
    """Write to the guest's kernel image, by the memfd that is the guest's memory."""
    script = (
        "for f in /proc/$1/fd/*; do case $(readlink $f) in *memfd:pyvmm-ram*) "
        "exec dd of=$f bs=1 seek=$2 conv=notrunc status=none;; esac; done; exit 1"
    )
    done = guest.host.run(
        "sh", "-c", script, "sh", str(guest.pid), str(virtual - IMAGE), input=data
    )
    assert done.status == 0, done


def release(guest: Guest, where: dict[str, int]) -> None:
    """Let a guest go on that runs BREAKS["spin"]; by one byte, which a CPU sees old or new."""
    write(guest, where[VICTIM] + 3, b"\0")
