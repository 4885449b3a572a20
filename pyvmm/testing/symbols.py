"""Finds the names of addresses in the symbol table of an ELF."""

from __future__ import annotations

import struct
from bisect import bisect_right

STT_NOTYPE, STT_FUNC = 0, 2
SYM64 = "<IBBHQQ"  # st_name, st_info, st_other, st_shndx, st_value, st_size
SYM32 = "<IIIBBH"  # st_name, st_value, st_size, st_info, st_other, st_shndx
SHN_LORESERVE = 0xFF00  # indices from here on are special, and their values are no addresses
REACH = 0x10000  # the most bytes of a symbol without a size (assembly), up to the next symbol


class Symbols:
    """The functions of an ELF. A stripped ELF, or another file, has none.

    :ivar problem: why there are none, if the file is damaged; else empty.
    """

    def __init__(self, path: str) -> None:
        #: Address, whether it is a function, size, offset of the name.
        self._found: list[tuple[int, bool, int, int]] = []
        self._strings = b""
        self.problem = ""
        try:
            self._read(path)
        except OSError as e:
            self.problem = f"{path}: {e.strerror}"
        except Exception as e:  # pyelftools fails on a file that only begins like an ELF
            self.problem = f"{path}: no symbols: {e}"

    def _read(self, path: str) -> None:
        with open(path, "rb") as f:
            if f.read(4) != b"\x7fELF":
                self.problem = f"{path} is no ELF"
                return
            f.seek(0)
            from elftools.elf.elffile import ELFFile
            from elftools.elf.sections import SymbolTableSection

            file = ELFFile(f)
            table = file.get_section_by_name(".symtab")
            if not isinstance(table, SymbolTableSection):
                self.problem = f"{path} has no symbols"
                return
            # The iterator of pyelftools would take seconds for the hundred thousand symbols of a
            # vmlinux.
            data, self._strings = table.data(), table.stringtable.data()
            wide = file.elfclass == 64
        kinds = (STT_NOTYPE, STT_FUNC)
        form = SYM64 if wide else SYM32
        rows = struct.iter_unpack(form, data[: len(data) - len(data) % struct.calcsize(form)])
        for row in rows:
            if wide:
                name, info, _, section, value, size = row
            else:
                name, value, size, info, _, section = row
            if 0 < section < SHN_LORESERVE and name and info & 15 in kinds:
                self._found.append((value, info & 15 == STT_FUNC, size, name))
        self._found.sort()  # at one address, a function comes last and is found before a label

    def name(self, address: int) -> str:
        """``function+0x12``; empty if no known function contains the address."""
        at = bisect_right(self._found, (address, True, 1 << 64, 0)) - 1
        if at < 0:
            return ""
        value, _, size, name = self._found[at]
        offset = address - value
        if offset >= (size or REACH) and offset:
            return ""
        text = self._strings[name : self._strings.find(b"\0", name)].decode(errors="replace")
        return f"{text}+{offset:#x}" if offset else text
