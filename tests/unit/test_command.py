"""A guest's command reaches the guest with all of its arguments, or is refused before the guest
starts.
"""

from __future__ import annotations

import base64
import re
from contextlib import closing
from pathlib import Path

import pytest

from pyvmm.assembly import (
    COMMAND_FILE,
    COMMAND_WORD_MAX,
    Description,
    cmdline,
    extra_archive,
)
from pyvmm.boot import ARCHIVE_ALIGN, load
from pyvmm.devices.guest_frames import ARGUMENT_MAX, COMMAND_MAX
from pyvmm.errors import ImageError, UsageError
from pyvmm.images.cpio import Archive
from pyvmm.memory import GuestMemory
from tests.unit.test_boot import PVH_NOTE, make_elf

ROOT = Path(__file__).resolve().parents[2]
INIT = ROOT / "guest" / "init.c"


def description(*command: str) -> Description:
    return Description("kernel", command=command)


def command_archive(want: Description) -> Archive:
    archive, notes = extra_archive(want)
    assert archive is not None and not notes
    return archive


def unpacked(archive: bytes) -> dict[str, bytes]:
    """The files of a newc archive, by a reader of our own."""
    files: dict[str, bytes] = {}
    at = 0
    while True:
        fields = [int(archive[at + 6 + 8 * i : at + 14 + 8 * i], 16) for i in range(13)]
        size, length = fields[6], fields[11]
        name = archive[at + 110 : at + 109 + length].decode()
        if name == "TRAILER!!!":
            return files
        at += -(-(110 + length) // 4) * 4
        files[name] = archive[at : at + size]
        at += -(-size // 4) * 4


def test_a_short_command_is_a_word_of_the_command_line() -> None:
    want = description("sh", "-c", "echo $#", "", "a b", "\udcff")
    assert extra_archive(want) == (None, [])
    (word,) = re.findall(r"pyvmm\.cmd=(\S+)", cmdline(want, []))
    raw = base64.urlsafe_b64decode(word + "=" * (-len(word) % 4))
    assert raw == b"sh\0-c\0echo $#\0\0a b\0\xff\0"


@pytest.mark.parametrize(
    "command", [["x"] * (COMMAND_WORD_MAX // 2 + 1), ["x" * (ARGUMENT_MAX - 1)], ["y"] * 200_000]
)
def test_a_long_command_is_a_file_behind_the_initrd(command: list[str]) -> None:
    want = description(*command)
    assert "pyvmm.cmd" not in cmdline(want, [])
    raw = b"".join(arg.encode() + b"\0" for arg in command)
    assert unpacked(command_archive(want).pack()) == {"etc": b"", COMMAND_FILE.strip("/"): raw}


@pytest.mark.parametrize(
    ("command", "cause"),
    [
        (["x" * ARGUMENT_MAX], "argument of 131072 bytes"),
        (["x" * 1000] * (COMMAND_MAX // 1000), "more than Linux can start"),
        ([""] * (COMMAND_MAX // 8), "more than Linux can start"),
        (["a\0b"], "has a NUL"),
    ],
)
def test_a_command_that_cannot_arrive_is_refused(command: list[str], cause: str) -> None:
    with pytest.raises(UsageError, match=cause):
        description(*command)


def test_init_has_no_limit_of_its_own() -> None:
    """Nothing is cut in the guest: its buffers grow. The limits of the guest port are the host's
    (``test_images.test_port_header_matches_platform``).
    """
    text = INIT.read_text()
    assert set(re.findall(r"#define\s+(MAX_\w+|\w+_MAX|\w+_SIZE)", text)) == {
        "PAGE_SIZE",
        "CHANNEL_SIZE",
    }
    assert f'#define COMMAND_FILE "{COMMAND_FILE.removeprefix("/etc/")}"' in text
    assert not re.search(r"(?i)\b(is|are) (cut|left out|dropped)\b", text.split("--- the agent")[0])


@pytest.mark.parametrize("size", [0, 1, 511, 512, 5000])
def test_an_archive_goes_behind_the_initrd(tmp_path: Path, size: int) -> None:
    kernel, initrd = tmp_path / "k", tmp_path / "i"
    kernel.write_bytes(make_elf([(0x100_0000, b"\x90" * 64, 64)], notes=PVH_NOTE))
    initrd.write_bytes(b"I" * size)
    archive = command_archive(description("x" * 5000))
    with closing(GuestMemory(64 << 20)) as memory:
        boot = load(memory, str(kernel), initrd=str(initrd) if size else None, archive=archive)
        assert boot.kind == "ELF by PVH note"
        info = memory.read(boot.regs["rbx"], 40)
        assert int.from_bytes(info[12:16], "little") == 1  # nr_modules, start_info.h
        entry = memory.read(int.from_bytes(info[16:24], "little"), 16)
        address, total = (int.from_bytes(entry[i : i + 8], "little") for i in (0, 8))
        offset = -(-size // ARCHIVE_ALIGN) * ARCHIVE_ALIGN
        assert total == offset + archive.size
        assert memory.read(address, size) == b"I" * size
        assert memory.read(address + size, offset - size) == bytes(offset - size)
        assert memory.read(address + offset, archive.size) == archive.pack()


def test_an_archive_needs_room(tmp_path: Path) -> None:
    """Linux would leave out what does not fit. The message gives the memory that suffices."""
    kernel = tmp_path / "k"
    kernel.write_bytes(make_elf([(0x100_0000, b"\x90" * 64, 64)], notes=PVH_NOTE))
    archive = Archive()
    archive.file("/a", bytes(20 << 20))
    with (
        closing(GuestMemory(64 << 20)) as memory,
        pytest.raises(ImageError, match=r"--memory (\d+)M") as caught,
    ):
        load(memory, str(kernel), archive=archive)
    enough = re.search(r"--memory (\d+)M", str(caught.value))
    assert enough
    with closing(GuestMemory(int(enough[1]) << 20)) as memory:
        load(memory, str(kernel), archive=archive)


def test_several_initrds_in_order(tmp_path: Path) -> None:
    kernel, one, two = tmp_path / "k", tmp_path / "1", tmp_path / "2"
    kernel.write_bytes(make_elf([(0x100_0000, b"\x90" * 64, 64)], notes=PVH_NOTE))
    one.write_bytes(b"1" * 700)
    two.write_bytes(b"2" * 30)
    with closing(GuestMemory(64 << 20)) as memory:
        boot = load(memory, str(kernel), initrd=[str(one), str(two)])
        module = int.from_bytes(memory.read(boot.regs["rbx"] + 16, 8), "little")
        address, size = (int.from_bytes(memory.read(module + i, 8), "little") for i in (0, 8))
        assert memory.read(address, size) == b"1" * 700 + bytes(324) + b"2" * 30


def test_a_flat_binary_takes_no_archive(tmp_path: Path) -> None:
    kernel = tmp_path / "k"
    kernel.write_bytes(b"\x90" * 64)
    with closing(GuestMemory(4 << 20)) as memory, pytest.raises(UsageError, match="flat binary"):
        load(memory, str(kernel), load_address=0x10_0000, archive=Archive())
