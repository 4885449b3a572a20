"""The blocks of a pcapng file other than the packets' (draft-ietf-opsawg-pcapng), which
``cext/capture.c`` makes.
"""

from __future__ import annotations

import struct

from pyvmm import __version__

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

#: Block types.
SHB, IDB, ISB, EPB = 0x0A0D0D0A, 1, 5, 6
BYTE_ORDER = 0x1A2B3C4D
LINKTYPE_ETHERNET = 1
OPT_COMMENT = 1
SHB_USERAPPL = 4
IF_NAME, IF_DESCRIPTION, IF_MACADDR, IF_TSRESOL, IF_FILTER, IF_HARDWARE = 2, 3, 6, 9, 11, 15
ISB_STARTTIME, ISB_ENDTIME, ISB_IFRECV, ISB_IFDROP, ISB_FILTERACCEPT = 2, 3, 4, 5, 6
NANOSECONDS = b"\x09"
HEAD = struct.Struct("=II")
SECTION = struct.Struct("=IHHq")
INTERFACE = struct.Struct("=HHI")
STATISTICS = struct.Struct("=III")
OPTION = struct.Struct("=HH")


def _options(options: list[tuple[int, bytes]]) -> bytes:
    out = b""
    for code, value in options:
        out += OPTION.pack(code, len(value)) + value + bytes(-len(value) % 4)
    return out + bytes(OPTION.size) if out else out


def _block(kind: int, body: bytes) -> bytes:
    length = HEAD.size + len(body) + 4
    return HEAD.pack(kind, length) + body + struct.pack("=I", length)


def section() -> bytes:
    """The block at the beginning of a file."""
    options = [(SHB_USERAPPL, f"pyvmm {__version__}".encode())]
    return _block(SHB, SECTION.pack(BYTE_ORDER, 1, 0, -1) + _options(options))


def interface(name: str, description: str, mac: bytes, snaplen: int, filter: str) -> bytes:
    """The block of an Ethernet interface, with times in nanoseconds.

    :param mac: empty if it is not known. :param filter: the expression; empty for none.
    """
    options = [
        (IF_NAME, name.encode()),
        (IF_DESCRIPTION, description.encode()),
        (IF_TSRESOL, NANOSECONDS),
        (IF_HARDWARE, b"virtio-net"),
    ]
    if mac:
        options.append((IF_MACADDR, mac))
    if filter:
        options.append((IF_FILTER, b"\0" + filter.encode()))
    return _block(IDB, INTERFACE.pack(LINKTYPE_ETHERNET, 0, snaplen) + _options(options))


class Statistics:
    """What happened to the packets of an interface.

    :ivar received: all that the filter has looked at; None if the kernel did not say.
    :ivar accepted: those that the filter wants. :ivar lost: those of them that are missing.
    :ivar comment: for people; empty for none.
    """

    __slots__ = ("accepted", "comment", "interface", "lost", "received")

    def __init__(
        self, interface: int, received: int | None, accepted: int, lost: int, comment: str = ""
    ) -> None:
        self.interface, self.received = interface, received
        self.accepted, self.lost, self.comment = accepted, lost, comment

    def pack(self, begin: int, end: int) -> bytes:
        """The block. :param begin, end: of the capture: CLOCK_REALTIME, nanoseconds."""
        options = [
            (code, struct.pack("=II", at >> 32, at & 0xFFFFFFFF))
            for code, at in ((ISB_STARTTIME, begin), (ISB_ENDTIME, end))
        ]
        if self.received is not None:
            options.append((ISB_IFRECV, struct.pack("=Q", self.received)))
        options.append((ISB_IFDROP, struct.pack("=Q", self.lost)))
        options.append((ISB_FILTERACCEPT, struct.pack("=Q", self.accepted)))
        if self.comment:
            options.append((OPT_COMMENT, self.comment.encode()))
        head = STATISTICS.pack(self.interface, end >> 32, end & 0xFFFFFFFF)
        return _block(ISB, head + _options(options))


def last_statistics(tail: bytes) -> list[Statistics]:
    """The blocks of statistics with which a file ends, in their order; none if it does not end
    with such a block, because the capture has not come to its end.

    :param tail: the last bytes of the file.
    """
    found: list[Statistics] = []
    end = len(tail)
    while end >= HEAD.size + STATISTICS.size + 4:
        (length,) = struct.unpack_from("=I", tail, end - 4)
        begin = end - length
        if begin < 0 or length < HEAD.size or HEAD.unpack_from(tail, begin) != (ISB, length):
            break
        found.insert(0, _parse(tail[begin + HEAD.size : end - 4]))
        end = begin
    return found


def _parse(body: bytes) -> Statistics:
    number, _, _ = STATISTICS.unpack_from(body)
    values = dict(_values(body[STATISTICS.size :]))
    counts = {
        code: struct.unpack("=Q", values[code])[0]
        for code in (ISB_IFRECV, ISB_IFDROP, ISB_FILTERACCEPT)
        if len(values.get(code, b"")) == 8
    }
    return Statistics(
        number,
        counts.get(ISB_IFRECV),
        counts.get(ISB_FILTERACCEPT, 0),
        counts.get(ISB_IFDROP, 0),
        values.get(OPT_COMMENT, b"").decode(errors="replace"),
    )


def _values(data: bytes) -> Iterator[tuple[int, bytes]]:
    at = 0
    while at + OPTION.size <= len(data):
        code, length = OPTION.unpack_from(data, at)
        if not code:
            return
        at += OPTION.size
        yield code, data[at : at + length]
        at += length + -length % 4
