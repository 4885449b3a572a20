"""Debian's kernels taken apart: vmlinux from a bzImage, modules with what they depend on."""

from __future__ import annotations

import bz2
import io
import lzma
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path

import lz4.block
import zstandard

from pyvmm.errors import BuildError

LZ4_LEGACY = b"\x02\x21\x4c\x18"
LZ4_BLOCK = 8 << 20  # bytes that a block unpacks to at most


def extract_vmlinux(bzimage: bytes) -> bytes:
    """The ELF kernel that ``bzimage`` has compressed in it.

    Uses the payload fields of the boot protocol (Documentation/x86/boot.rst, 2.08).

    :raises BuildError: where it is no bzImage, or the compression is not known.
    """
    if len(bzimage) < 0x250 or bzimage[0x202:0x206] != b"HdrS":
        raise BuildError("kernel is not a bzImage", "give a Linux kernel for x86-64")
    sectors = bzimage[0x1F1] or 4
    offset, length = struct.unpack_from("<II", bzimage, 0x248)
    start = (sectors + 1) * 512 + offset
    payload = bzimage[start : start + length]
    if len(payload) != length or length < 8:
        raise BuildError("bzImage is truncated", "fetch it again")
    try:
        # The last four bytes are the unpacked size, added by the kernel's build.
        elf = decompress(payload[:-4], struct.unpack("<I", payload[-4:])[0])
    except (ValueError, zlib.error, lzma.LZMAError, OSError, EOFError) as e:
        raise BuildError(f"cannot unpack the kernel: {e}", "fetch it again") from None
    if elf[:4] != b"\x7fELF":
        raise BuildError("the bzImage's payload is no ELF file", "give a Linux kernel for x86-64")
    return elf[: elf_size(elf)]


def trim_zeros(elf: bytes) -> bytes:
    """``elf`` with each segment's p_filesz cut to its last byte that is not zero: the loader zeroes
    the rest unread.

    Debian's 6.1 has 12 MB of them, a fifth of what a boot would copy.
    """
    out = bytearray(elf)
    phoff, phsize, phnum = struct.unpack_from("<Q", elf, 32)[0], *struct.unpack_from("<2H", elf, 54)
    for at in range(phoff, phoff + phsize * phnum, phsize):
        kind = struct.unpack_from("<I", elf, at)[0]
        offset, size = (
            struct.unpack_from("<Q", elf, at + 8)[0],
            struct.unpack_from("<Q", elf, at + 32)[0],
        )
        if kind == 1:  # PT_LOAD
            struct.pack_into("<Q", out, at + 32, len(elf[offset : offset + size].rstrip(b"\0")))
    return bytes(out)


def elf_size(elf: bytes) -> int:
    """The length of the 64-bit ELF file that ``elf`` starts with; the relocations that follow are
    not part of it.
    """
    phoff, shoff = struct.unpack_from("<QQ", elf, 32)
    phsize, phnum, shsize, shnum = struct.unpack_from("<4H", elf, 54)
    ends: list[int] = [phoff + phsize * phnum, shoff + shsize * shnum]
    for i in range(phnum):
        at, _, _, filesz = struct.unpack_from("<4Q", elf, phoff + i * phsize + 8)
        ends.append(at + filesz)
    for i in range(shnum):
        kind = struct.unpack_from("<I", elf, shoff + i * shsize + 4)[0]
        at, size = struct.unpack_from("<2Q", elf, shoff + i * shsize + 24)
        ends.append(at + (0 if kind == 8 else size))  # 8: SHT_NOBITS
    return min(max(ends), len(elf))


def decompress(data: bytes, size: int = 0) -> bytes:
    """``data`` unpacked, by its magic number; ``size`` is what it unpacks to where that is known.

    :raises ValueError: for an unknown or broken format.
    """
    if data.startswith(b"\x1f\x8b"):
        stream = zlib.decompressobj(31)
        out = stream.decompress(data)
        if not stream.eof:
            raise ValueError("gzip stream is cut off")
        return out
    if data.startswith((b"\xfd7zXZ", b"\x5d\0\0")):
        return lzma.decompress(data)
    if data.startswith(b"BZh"):
        return bz2.decompress(data)
    if data.startswith(LZ4_LEGACY):
        return _lz4(data, size)
    if data.startswith(b"\x28\xb5\x2f\xfd"):
        return _zstd(data, size)
    raise ValueError(f"unknown compression, magic {data[:4].hex()}")


def _lz4(data: bytes, size: int) -> bytes:
    """The legacy frame that the kernel's build writes: 8 MiB blocks, each after its 32-bit
    length.
    """
    out = io.BytesIO()
    at = 4
    while at + 4 <= len(data) and (not size or out.tell() < size):
        length = struct.unpack_from("<I", data, at)[0]
        try:
            out.write(lz4.block.decompress(data[at + 4 : at + 4 + length], LZ4_BLOCK))
        except lz4.block.LZ4BlockError as e:
            raise ValueError(f"broken lz4 block: {e}") from e
        at += 4 + length
    return out.getvalue()


def _zstd(data: bytes, size: int) -> bytes:
    try:
        return zstandard.ZstdDecompressor().decompress(data, max_output_size=size)
    except zstandard.ZstdError as e:
        raise ValueError(f"broken zstd frame: {e}") from e


@dataclass(slots=True)
class Kernel:
    """A kernel to put into an image.

    :ivar release: its ``uname -r``.
    :ivar modules: its modules; None if it needs none.
    """

    release: str
    bzimage: bytes
    vmlinux: bytes
    modules: Modules | None


class Modules:
    """The modules of one kernel.

    :param root: its ``lib/modules/RELEASE`` directory.
    """

    def __init__(self, root: Path) -> None:
        self._root = root
        self._files: dict[str, Path] = {}
        for path in root.glob("kernel/**/*.ko*"):
            self._files[_name(path.name)] = path
        builtin = root / "modules.builtin"
        self._builtin = (
            {_name(Path(x).name) for x in builtin.read_text().split()}
            if builtin.exists()
            else set()
        )

    def closure(self, names: list[str]) -> dict[str, tuple[str, list[str], bytes]]:
        """``names`` and all that they depend on, dependencies first; without those that are built
        in.

        :return: module name -> path below the root (without the compression's suffix), names that
            it depends on, its unpacked bytes.
        :raises BuildError: for a module that this kernel does not have.
        """
        found: dict[str, tuple[str, list[str], bytes]] = {}

        def add(name: str, wanted_by: str) -> None:
            name = _name(name)
            if name in found or name in self._builtin:
                return
            if name not in self._files:
                raise BuildError(
                    f"{self._root.name} has no module {name}{wanted_by}",
                    "use a Debian cloud kernel: pyvmm image build",
                )
            path = self._files[name]
            data = path.read_bytes()
            if path.suffix != ".ko":
                data = decompress(data)
            # Without the signature that follows it: checking ten of them takes an emulated guest 60
            # ms.
            data = data[: elf_size(data)]
            needs = [_name(n) for n in modinfo(data).get("depends", "").split(",") if n]
            for need in needs:
                add(need, f", which {name} needs")
            inside = path.relative_to(self._root)
            found[name] = (
                str(inside.with_name(inside.name.partition(".ko")[0] + ".ko")),
                needs,
                data,
            )

        for name in names:
            add(name, "")
        return found


def modinfo(module: bytes) -> dict[str, str]:
    """The ``.modinfo`` section of a kernel module as a dict; of repeated keys the last."""
    from elftools.elf.elffile import ELFFile

    section = ELFFile(io.BytesIO(module)).get_section_by_name(".modinfo")
    text = section.data().decode("utf-8", "replace") if section else ""
    return dict(item.split("=", 1) for item in text.split("\0") if "=" in item)


def _name(file_name: str) -> str:
    return file_name.partition(".ko")[0].replace("-", "_")
