"""IP addresses with their prefix lengths, as users write them."""

from __future__ import annotations

from _socket import AF_INET, AF_INET6, inet_pton  # see ``rights``

from pyvmm.errors import UsageError


def parse_address(text: str) -> tuple[int, bytes, int]:
    """Parse ``192.168.1.1/24`` or ``fd00::1/64``.

    :returns: the family (AF_INET or AF_INET6), the packed address, and the prefix length. Without
        a prefix length in ``text``, it is the length for a single host.
    :raises UsageError: ``text`` is not an address.
    """
    host, slash, length = text.partition("/")
    family, bits = (AF_INET6, 128) if ":" in host else (AF_INET, 32)
    # int() alone would take "1_0", " 7" and other scripts' digits.
    good = length.isascii() and length.isdecimal() and len(length) < 4 if slash else True
    try:
        packed = inet_pton(family, host)
    except (OSError, ValueError):
        good = False
    prefix = int(length or bits) if good else -1
    if not 0 <= prefix <= bits:
        raise UsageError(f"{text!r} is no address", "write 192.168.1.1/24 or fd00::1/64")
    return family, packed, prefix
