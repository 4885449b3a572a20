"""Compiles filter expressions, such as ``tcp port 80``, by libpcap (pcap-filter(7)).

The library is loaded only if there is an expression, and never by a machine: the command that
captures compiles, and the machine gets instructions, which it checks.
"""

from __future__ import annotations

import struct

from pyvmm._ext import lib
from pyvmm.errors import HostError, UsageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

LIBRARY = "libpcap.so.0.8"
EXPRESSION_MAX = 0xFFFF - 1  # bytes; a byte before them says what they are
DLT_EN10MB = 1
NETMASK_UNKNOWN = 0xFFFFFFFF
OPTIMIZE = 1
ROW = struct.Struct("=HBBI")  # struct sock_filter (linux/filter.h)
#: Of pcap/pcap.h and pcap/bpf.h: what the library's ABI has had since version 0.8.
DECLARATIONS = """
typedef struct pcap pcap_t;
struct bpf_program { unsigned int bf_len; void *bf_insns; };
pcap_t *pcap_open_dead(int linktype, int snaplen);
int pcap_compile(pcap_t *p, struct bpf_program *fp, const char *str, int optimize,
                 unsigned int netmask);
char *pcap_geterr(pcap_t *p);
void pcap_freecode(struct bpf_program *fp);
void pcap_close(pcap_t *p);
"""


def check_expression(expression: str) -> str:
    """The expression, if a file can have it (draft-ietf-opsawg-pcapng, if_filter).

    :raises UsageError: it is too long, or no text.
    """
    try:
        size = len(expression.encode())
    except UnicodeEncodeError:
        raise UsageError("the filter's expression is no UTF-8") from None
    if size > EXPRESSION_MAX:
        raise UsageError(
            f"the filter's expression has {size} bytes", f"use at most {EXPRESSION_MAX}"
        )
    return expression


def compile_filter(expression: str, snaplen: int, option: str = "--filter") -> bytes:
    """Instructions, ``struct sock_filter`` each, for Ethernet frames.

    :param snaplen: bytes that are kept of a packet at most. :param option: what has the expression,
        for messages.
    :raises UsageError: this is no expression. :raises HostError: there is no libpcap.
    """
    from cffi import FFI

    check_expression(expression)
    if "\0" in expression:
        raise UsageError(f"{option}: the expression has a null character")
    ffi: Any = FFI()
    ffi.cdef(DECLARATIONS)
    try:
        pcap: Any = ffi.dlopen(LIBRARY)
    except OSError as e:
        raise HostError(
            f"{option} needs {LIBRARY}, which is not there", "as root: apt install libpcap0.8"
        ) from e
    handle = pcap.pcap_open_dead(DLT_EN10MB, snaplen)
    program = ffi.new("struct bpf_program *")
    try:
        if pcap.pcap_compile(handle, program, expression.encode(), OPTIMIZE, NETMASK_UNKNOWN):
            why = ffi.string(pcap.pcap_geterr(handle)).decode(errors="replace")
            raise UsageError(f"{option} {expression!r}: {why}", "see pcap-filter(7)")
        code = bytes(ffi.buffer(program.bf_insns, program.bf_len * ROW.size))
        pcap.pcap_freecode(program)
    finally:
        pcap.pcap_close(handle)
    return check(code)


def check(code: bytes) -> bytes:
    """The instructions, if ``pv_filter_run()`` can run them (cext/filter.h).

    :raises UsageError: it cannot.
    """
    if len(code) // ROW.size > lib.PV_FILTER_MAX:
        raise UsageError(
            f"the filter has {len(code) // ROW.size} instructions, and at most "
            f"{lib.PV_FILTER_MAX} can be run",
            "simplify it",
        )
    if not lib.pv_filter_check(code, len(code) // ROW.size):
        raise UsageError("the filter has instructions that pyvmm does not run", "simplify it")
    return code


def rows(code: bytes) -> list[list[int]]:
    """The instructions for JSON, as ``tcpdump -ddd`` prints them: code, jt, jf and k of each."""
    return [list(row) for row in ROW.iter_unpack(code)]


def of_rows(given: Sequence[Any]) -> bytes:
    """The instructions of ``rows``. :raises UsageError: they are none, or cannot be run."""
    code = b""
    for row in given:
        try:
            code += ROW.pack(*row)
        except (TypeError, struct.error):
            raise UsageError(
                f"a filter has rows of four numbers, but {row!r} is none", "see tcpdump -ddd"
            ) from None
    return check(code)
