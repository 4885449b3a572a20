"""Takes Debian's kernels apart: vmlinux from a bzImage, and modules with their dependencies."""

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
LZ4_BLOCK = 8 << 20  # the largest unpacked size of a block in bytes


def extract_vmlinux(bzimage: bytes) -> bytes:
    """Unpack the compressed ELF kernel in a bzImage. The payload fields of the boot protocol from
    2.08 on tell its position (Documentation/arch/x86/boot.rst).

    :raises BuildError: the file is no bzImage, is damaged, or is compressed in an unknown way.
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
        # The build of the kernel appends the unpacked size in four bytes.
        elf = decompress(payload[:-4], struct.unpack("<I", payload[-4:])[0])
    except (ValueError, zlib.error, lzma.LZMAError, OSError, EOFError) as e:
        raise BuildError(f"cannot unpack the kernel: {e}", "fetch it again") from None
    if elf[:4] != b"\x7fELF":
        raise BuildError("the bzImage's payload is no ELF file", "give a Linux kernel for x86-64")
    return elf[: elf_size(elf)]


def trim_zeros(elf: bytes) -> bytes:
    """Cut each segment's p_filesz so that the segment ends in the file at its last byte that is not
    zero. The loader fills the rest of the segment with zeroes without reading them.

    Debian's 6.1 has 12 MB of such zeroes, a fifth of the bytes that a boot would copy.
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
    """The length of the 64-bit ELF file at the beginning of ``elf``. Data that follows it, such as
    relocations or a signature, does not count.
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
    """Unpack ``data`` in the format of its magic number.

    :param size: the unpacked size in bytes; 0 if it is unknown.
    :raises ValueError: the format is unknown or broken.
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
    """Unpack the legacy format that the build of the kernel writes: blocks of 8 MiB, each after its
    32-bit length.
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
    decompressor = zstandard.ZstdDecompressor()
    unknown = (0, zstandard.CONTENTSIZE_UNKNOWN)
    try:
        if size or zstandard.get_frame_parameters(data).content_size not in unknown:
            return decompressor.decompress(data, max_output_size=size)
        stream = decompressor.decompressobj()
        out = stream.decompress(data)
        if not stream.eof:
            raise ValueError("zstd frame is cut off")
        return out
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

    :param root: the directory ``lib/modules/RELEASE`` of the kernel.
    """

    def __init__(self, root: Path) -> None:
        self._root = root
        self._files: dict[str, Path] = {}
        for path in root.glob("kernel/**/*.ko*"):
            self._files[module_name(path.name)] = path
        builtin = root / "modules.builtin"
        self._builtin = (
            {module_name(Path(x).name) for x in builtin.read_text().split()}
            if builtin.exists()
            else set()
        )

    def has(self, name: str) -> bool:
        """Whether the kernel has this module, built in or as a file."""
        return module_name(name) in self._builtin or module_name(name) in self._files

    def closure(self, names: list[str]) -> dict[str, tuple[str, list[str], bytes]]:
        """The modules ``names`` and all modules on which they depend, dependencies first. Modules
        that are built into the kernel are left out.

        :returns: by name, the path below the root (without the suffix of the compression), the
            names on which the module depends directly, and its unpacked bytes.
        :raises BuildError: the kernel has no such module.
        """
        found: dict[str, tuple[str, list[str], bytes]] = {}

        def add(name: str, wanted_by: str) -> None:
            name = module_name(name)
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
            # Cut off the signature: an emulated guest takes 60 ms to check ten of them.
            data = data[: elf_size(data)]
            needs = [module_name(n) for n in modinfo(data).get("depends", "").split(",") if n]
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
    """The ``.modinfo`` section of a kernel module as a dict. If a key is repeated, its last value
    counts.
    """
    return dict(modinfo_items(module))


def modinfo_items(module: bytes) -> list[tuple[str, str]]:
    """The ``.modinfo`` section of a 64-bit kernel module; empty if there is none.

    :raises ValueError: the file is no sound module.
    """
    try:
        if module[:5] != b"\x7fELF\2":
            raise ValueError("no 64-bit ELF file")
        table: int = struct.unpack_from("<Q", module, 40)[0]
        size, count, names = struct.unpack_from("<3H", module, 58)
        sections = [struct.unpack_from("<2I4Q", module, table + i * size) for i in range(count)]
        base = sections[names][4]
        for name, _, _, _, offset, length in sections:
            if module.startswith(b".modinfo\0", base + name):
                text = module[offset : offset + length].decode("utf-8", "replace")
                pairs = (item.partition("=") for item in text.split("\0") if "=" in item)
                return [(key, value) for key, _, value in pairs]
    except (struct.error, IndexError) as e:
        raise ValueError(f"no sound ELF file: {e}") from None
    return []


def module_name(file_name: str) -> str:
    """The name of a module by its file's, which may be compressed."""
    return file_name.partition(".ko")[0].replace("-", "_")
