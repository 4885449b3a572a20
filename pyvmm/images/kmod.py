"""The indexes of kmod (``modules.dep.bin`` and others), which ``modprobe`` of a distribution reads
instead of the texts; so does the kernel when it loads a module by itself.

The format is that of kmod's libkmod/libkmod-index.c, version 2.1: a trie of nodes. All numbers have
32 bits, big endian.
"""

from __future__ import annotations

import re
import struct

from pyvmm.errors import ImageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

MAGIC, VERSION = 0xB007F457, 0x00020001
#: In the upper bits of a node's offset: which parts the node has.
PREFIX, VALUES, CHILDREN = 1 << 31, 1 << 30, 1 << 29
#: Nodes from the root to a leaf; modules of Linux need less than a third. Modules may be hostile.
DEPTH_MAX = 200


def index(entries: Iterable[tuple[str, str]]) -> bytes:
    """An index of pairs of a key and its value. Keys may come several times; their values are found
    in this order. Keys have ASCII only, and other pairs are left out.

    :raises ImageError: the trie would be too deep.
    """
    out = bytearray(struct.pack(">III", MAGIC, VERSION, 0))
    pairs = [(key.encode(), n, value) for n, (key, value) in enumerate(entries) if key.isascii()]
    struct.pack_into(">I", out, 8, _node(sorted(pairs), 0, out, 0))
    return bytes(out)


def pattern(alias: str) -> str:
    """An alias as a key: modprobe takes "-" for "_", but not within brackets."""
    parts = re.split(r"(\[[^]]*\])", alias)
    return "".join(p if p.startswith("[") else p.replace("-", "_") for p in parts)


def _node(pairs: list[tuple[bytes, int, str]], depth: int, out: bytearray, above: int) -> int:
    """Write a node behind its children.

    :param pairs: sorted; keys that agree up to ``depth``. :param above: nodes above this one.
    :returns: the node's offset, with its flags.
    """
    if above >= DEPTH_MAX:
        module = pairs[0][2].partition(":")[0]
        raise ImageError(
            f"module {module!r}: more than {DEPTH_MAX} names or aliases begin with each other",
            "leave this module out",
        )
    end = depth
    first, last = (pairs[0][0], pairs[-1][0]) if pairs else (b"", b"")
    while end < min(len(first), len(last)) and first[end] == last[end]:
        end += 1
    values = [(n, value) for key, n, value in pairs if len(key) == end]
    below: dict[int, list[tuple[bytes, int, str]]] = {}
    for pair in pairs:
        if len(pair[0]) > end:
            below.setdefault(pair[0][end], []).append(pair)
    children = {byte: _node(some, end + 1, out, above + 1) for byte, some in below.items()}
    flags, start = 0, len(out)
    if end > depth:
        flags |= PREFIX
        out += first[depth:end] + b"\0"
    if children:
        flags |= CHILDREN
        lowest, highest = min(children), max(children)
        out += bytes((lowest, highest))
        for byte in range(lowest, highest + 1):
            out += struct.pack(">I", children.get(byte, 0))
    if values:
        flags |= VALUES
        out += struct.pack(">I", len(values))
        for n, value in values:
            out += struct.pack(">I", n) + value.encode(errors="surrogateescape") + b"\0"
    return start | flags
