"""A small AML encoder (ACPI 6.4, chapter 20). Each function returns the bytes of one term.

It knows only the terms that our DSDT needs. Names have four characters (shorter ones are padded
with ``_``); paths are written as in ASL, such as ``\\_SB.PCI0``.
"""

from __future__ import annotations

import struct
from functools import cache

from pyvmm.spec import acpi

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable


@cache  # a DSDT names each slot's device several times, and its registers for each slot
def path(text: str) -> bytes:
    """A NameString. It is absolute if it starts with a backslash."""
    root = b"\\" if text.startswith("\\") else b""
    segments = [part.ljust(4, "_").encode("ascii") for part in text.lstrip("\\").split(".")]
    if len(segments) == 1:
        return root + segments[0]
    if len(segments) == 2:
        return root + bytes([acpi.AML_DUAL_NAME]) + segments[0] + segments[1]
    return root + bytes([acpi.AML_MULTI_NAME, len(segments)]) + b"".join(segments)


def _package(op: bytes, body: bytes) -> bytes:
    """``op``, PkgLength and ``body``. PkgLength counts its own bytes as well (20.2.4)."""
    size = len(body) + 1
    if size < 0x40:
        return op + bytes([size]) + body
    size += 1
    extra = 1
    if size >= 1 << 12:
        size += 1
        extra = 2
    return op + bytes([extra << 6 | size & 0xF]) + (size >> 4).to_bytes(extra, "little") + body


def integer(value: int) -> bytes:
    """The shortest constant for a value of up to 32 bits."""
    if value in (0, 1):
        return bytes([value])
    if value < 1 << 8:
        return struct.pack("<BB", acpi.AML_BYTE, value)
    if value < 1 << 16:
        return struct.pack("<BH", acpi.AML_WORD, value)
    return struct.pack("<BI", acpi.AML_DWORD, value)


def string(text: str) -> bytes:
    """A NUL-terminated ASCII string."""
    return bytes([acpi.AML_STRING]) + text.encode("ascii") + b"\0"


def eisaid(text: str) -> bytes:
    """EisaId("PNP0A03"): three letters of five bits each and four hexadecimal digits, in big-endian
    order (19.3.4).
    """
    letters = [ord(c) - 0x40 for c in text[:3]]
    value = letters[0] << 26 | letters[1] << 21 | letters[2] << 16 | int(text[3:], 16)
    return bytes([acpi.AML_DWORD]) + value.to_bytes(4, "big")


def buffer(data: bytes) -> bytes:
    """Buffer () {...}."""
    return _package(bytes([acpi.AML_BUFFER]), integer(len(data)) + data)


def package(items: Iterable[bytes]) -> bytes:
    """Package () {...} of up to 255 items."""
    terms = list(items)
    return _package(bytes([acpi.AML_PACKAGE]), bytes([len(terms)]) + b"".join(terms))


def route(slot: int, gsi: int) -> bytes:
    """Package () {slot << 16 | 0xFFFF, 0, 0, gsi}: an entry of _PRT (6.2.13). INTA of all functions
    of the slot, 1 to 31, leads to the GSI, 2 to 255, by no link device.
    """
    return struct.pack(
        "<4BI4B",
        acpi.AML_PACKAGE,
        11,  # bytes from here on
        4,  # items
        acpi.AML_DWORD,
        slot << 16 | 0xFFFF,
        0,
        0,
        acpi.AML_BYTE,
        gsi,
    )


def name(text: str, value: bytes) -> bytes:
    """Name (text, value)."""
    return bytes([acpi.AML_NAME]) + path(text) + value


def scope(text: str, *terms: bytes) -> bytes:
    """Scope (text) {...}."""
    return _package(bytes([acpi.AML_SCOPE]), path(text) + b"".join(terms))


def device(text: str, *terms: bytes) -> bytes:
    """Device (text) {...}."""
    return _package(bytes([acpi.AML_EXT, acpi.AML_EXT_DEVICE]), path(text) + b"".join(terms))


def method(text: str, arguments: int, *terms: bytes) -> bytes:
    """Method (text, arguments, Serialized) {...}."""
    flags = bytes([arguments | acpi.METHOD_SERIALIZED])
    return _package(bytes([acpi.AML_METHOD]), path(text) + flags + b"".join(terms))


def store_argument(text: str) -> bytes:
    """Store (Arg0, text)."""
    return bytes([acpi.AML_STORE, acpi.AML_ARG0]) + path(text)


def store(source: bytes, target: bytes) -> bytes:
    """Store (source, target)."""
    return bytes([acpi.AML_STORE]) + source + target


#: Local0
LOCAL0 = bytes([acpi.AML_LOCAL0])


def notify_if_bit(bit: int, text: str, value: int) -> bytes:
    """If (Local0 & (1 << bit)) {Notify (text, value)}, for a bit of 0 to 31; all at once, because a
    DSDT has two for each slot.
    """
    notice = path(text) + integer(value)
    return struct.pack(
        f"<5BI2B{len(notice)}s",
        acpi.AML_IF,
        10 + len(notice),  # bytes from here on
        acpi.AML_AND,
        acpi.AML_LOCAL0,
        acpi.AML_DWORD,
        1 << bit,
        0,  # the result goes nowhere else
        acpi.AML_NOTIFY,
        notice,
    )


def io_fields(text: str, port: int, names: Iterable[str]) -> bytes:
    """OperationRegion (text, SystemIO, port, ...) with one field of 32 bits for each name."""
    fields = b"".join(path(name) + bytes([32]) for name in names)
    size = 4 * (len(fields) // 5)
    region = bytes([acpi.AML_EXT, acpi.AML_EXT_REGION]) + path(text)
    region += bytes([acpi.AML_SYSTEM_IO]) + integer(port) + integer(size)
    body = path(text) + bytes([acpi.AML_FIELD_DWORD]) + fields
    return region + _package(bytes([acpi.AML_EXT, acpi.AML_EXT_FIELD]), body)


def if_name(text: str, *terms: bytes) -> bytes:
    """If (text) {...}: unless the named integer is zero."""
    return _package(bytes([acpi.AML_IF]), path(text) + b"".join(terms))


def give(value: bytes) -> bytes:
    """Return (value)."""
    return bytes([acpi.AML_RETURN]) + value


def notify(text: str, value: int) -> bytes:
    """Notify (text, value)."""
    return bytes([acpi.AML_NOTIFY]) + path(text) + integer(value)


def resources(*descriptors: bytes) -> bytes:
    """Name (_CRS, ResourceTemplate () {...}). A checksum of 0 in the end tag means that it is not
    used (6.4.2.9).
    """
    return name("_CRS", buffer(b"".join(descriptors) + bytes([acpi.RES_END, 0])))


def io(port: int, count: int) -> bytes:
    """IO (Decode16, port, port, 1, count)."""
    return struct.pack("<BBHHBB", acpi.RES_IO, 1, port, port, 1, count)


def irq(line: int) -> bytes:
    """IRQNoFlags () {line}: one of the 16 ISA lines, edge-triggered and active high."""
    return struct.pack("<BH", acpi.RES_IRQ_NO_FLAGS, 1 << line)


def interrupt(gsi: int, flags: int = acpi.RES_IRQ_EDGE) -> bytes:
    """Interrupt (ResourceConsumer, ...) {gsi}.

    :param flags: RES_IRQ_*; by default Edge, ActiveHigh, Exclusive.
    """
    return struct.pack("<BHBBI", acpi.RES_INTERRUPT, 6, acpi.RES_IRQ_CONSUMER | flags, 1, gsi)


def memory32_fixed(base: int, size: int) -> bytes:
    """Memory32Fixed (ReadWrite, base, size)."""
    return struct.pack("<BHBII", acpi.RES_MEMORY32_FIXED, 9, 1, base, size)


def word_space(kind: int, flags: int, first: int, last: int) -> bytes:
    """WordBusNumber or WordIO: the window [first, last] that a bridge passes on."""
    body = struct.pack(
        "<BBBHHHHH", kind, acpi.RES_MIN_MAX_FIXED, flags, 0, first, last, 0, last - first + 1
    )
    return struct.pack("<BH", acpi.RES_WORD, len(body)) + body


def dword_memory(first: int, last: int) -> bytes:
    """DWordMemory (..., NonCacheable, ReadWrite): the memory window [first, last] that a bridge
    passes on.
    """
    body = struct.pack(
        "<BBBIIIII",
        acpi.RES_TYPE_MEMORY,
        acpi.RES_MIN_MAX_FIXED,
        acpi.RES_MEM_READ_WRITE,
        0,
        first,
        last,
        0,
        last - first + 1,
    )
    return struct.pack("<BH", acpi.RES_DWORD, len(body)) + body
