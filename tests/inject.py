"""Make a thread of another process ask for a system call, as an attacker would who controls the
thread. With ptrace(2), so that the product needs no hook for tests.
"""

from __future__ import annotations

import ctypes
import os
import signal
from pathlib import Path

CONT, ATTACH, DETACH, GETREGS, SETREGS = 7, 16, 17, 12, 13
#: struct user_regs_struct of x86-64, by index.
RAX, RDX, RSI, RDI, ORIG_RAX, RIP = 10, 12, 13, 14, 15, 16
OPENAT, SOCKET, SENDMSG, EXECVE, PTRACE = 257, 41, 46, 59, 101
CLONE, ACCEPT4 = 56, 288
WALL = 0x40000000


def _ptrace(request: int, tid: int, data: object = None) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.ptrace(request, tid, None, data) < 0:
        raise OSError(ctypes.get_errno(), f"ptrace {request}")


def _blocks_sigsys(tid: int) -> bool:
    status = Path(f"/proc/{tid}/status").read_text()
    blocked = int(status.split("SigBlk:")[1].split()[0], 16)
    return bool(blocked >> signal.SIGSYS - 1 & 1)


def inject(tid: int, call: int) -> bool:
    """Have thread ``tid`` ask for a system call whose arguments are zeros. The caller may trace the
    thread's process (its parent, or root).

    :returns: False if the thread is in no system call now, in whose place to ask; or if it blocks
        SIGSYS for a moment, as the C library does around clone(2): the kernel would kill the
        process, without a handler.
    """
    # Of one thread: the caller has to stay the same.
    _ptrace(ATTACH, tid)
    _, status = os.waitpid(tid, WALL)
    while os.WIFSTOPPED(status) and (came := os.WSTOPSIG(status)) != signal.SIGSTOP:
        _ptrace(CONT, tid, came)  # a signal of the process's own, which has come first
        _, status = os.waitpid(tid, WALL)
    if not os.WIFSTOPPED(status):
        raise ProcessLookupError(f"thread {tid} has ended")
    regs = (ctypes.c_ulong * 27)()
    _ptrace(GETREGS, tid, regs)
    waits = ctypes.c_long(regs[ORIG_RAX]).value >= 0 and not _blocks_sigsys(tid)
    if waits:
        regs[RIP] -= 2  # back to the instruction `syscall`
        regs[RAX], regs[ORIG_RAX] = call, 2**64 - 1
        regs[RDI] = regs[RSI] = regs[RDX] = 0
        _ptrace(SETREGS, tid, regs)
    _ptrace(DETACH, tid)
    return waits
