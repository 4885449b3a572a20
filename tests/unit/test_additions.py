"""What `--add` and `--modules` pack: other programs read our archive and find what was on the host;
what cannot be packed is refused or told.
"""

from __future__ import annotations

import gzip
import lzma
import os
import re
import shutil
import socket
import stat
import subprocess
from contextlib import closing
from pathlib import Path

import pytest
import zstandard

from pyvmm.boot.release import release
from pyvmm.errors import ImageError, UsageError
from pyvmm.images.additions import Additions
from pyvmm.images.cpio import FILE_MAX, Archive, HostFile, Listing
from pyvmm.memory import GuestMemory
from tests.unit.test_boot import make_bzimage

#: A name with every byte that a name can have.
EVERY_BYTE = os.fsdecode(bytes(b for b in range(1, 256) if b != ord("/")))
READERS = [["cpio", "--quiet", "-id", "--no-absolute-filenames"], ["bsdtar", "-xf", "-"]]


def additions(
    *add: str | Path, modules: Path | None = None, initrd: Path | None = None, kernel: str = ""
) -> Additions:
    return Additions(
        [str(a) for a in add],
        str(modules) if modules else None,
        [str(initrd)] if initrd else [],
        lambda: kernel,
    )


def packed(archive: Archive) -> bytes:
    """The archive as the guest's memory holds it."""
    with closing(GuestMemory(32 << 20)) as memory:
        archive.load(memory, 0x1000)
        assert memory.read(0x1000 + archive.size, 4096) == bytes(4096)
        return memory.read(0x1000, archive.size)


def tree(top: Path) -> dict[bytes, tuple[object, ...]]:
    """Type, mode and content of everything below ``top``, and which files are one."""
    out: dict[bytes, tuple[object, ...]] = {}
    inodes: dict[int, int] = {}
    for path in sorted(top.rglob("*"), key=os.fsencode):
        status = path.lstat()
        content: object = None
        if stat.S_ISREG(status.st_mode):
            number = inodes.setdefault(status.st_ino, len(inodes))
            content = number, status.st_nlink, path.read_bytes()
        elif stat.S_ISLNK(status.st_mode):
            content = str(path.readlink())
        out[os.fsencode(path.relative_to(top))] = oct(status.st_mode), content
    return out


@pytest.fixture
def rich(tmp_path: Path) -> Path:
    """A directory with everything that an archive can hold."""
    top = tmp_path / "rich"
    (top / "empty").mkdir(parents=True)
    (top / "private").mkdir(0o700)
    (top / "sub").mkdir()
    (top / "TRAILER!!!").write_text("not the end")
    (top / EVERY_BYTE).write_bytes(b"every byte")
    (top / "none").touch()
    (top / "big").write_bytes(os.urandom(3_000_001))
    (top / "sub/one").write_bytes(b"one inode")
    os.link(top / "sub/one", top / "a-second-name")
    os.link(top / "sub/one", top / "zz")
    (top / "tool").write_bytes(b"#!/bin/sh\n")
    (top / "tool").chmod(0o4750)
    (top / "link").symlink_to("sub/one")
    (top / "dangling").symlink_to(os.fsdecode(b"/no/\xff\xfe"))
    os.mkfifo(top / "fifo", 0o600)
    return top


@pytest.mark.parametrize("reader", READERS, ids=lambda reader: reader[0])
def test_other_programs_read_our_archive(rich: Path, tmp_path: Path, reader: list[str]) -> None:
    if shutil.which(reader[0]) is None:
        pytest.skip(f"{reader[0]} is not installed")
    data = packed(additions(f"{rich}:/").archive)
    assert len(data) % 512 == 0
    out = tmp_path / "out"
    out.mkdir()
    subprocess.run(reader, input=data, cwd=out, check=True, umask=0)
    assert tree(out) == tree(rich)


def test_the_same_files_give_the_same_bytes(rich: Path, tmp_path: Path) -> None:
    first = packed(additions(rich).archive)
    again = tmp_path / "again"
    again.mkdir()
    for name in sorted(os.listdir(rich), reverse=True):  # noqa: PTH208
        if name not in ("a-second-name", "zz", "sub"):
            os.rename(rich / name, again / name)  # noqa: PTH104 - another order in the directory
            os.rename(again / name, rich / name)  # noqa: PTH104
    os.utime(rich / "big", (1, 1))
    assert packed(additions(rich).archive) == first


def test_where_things_land(tmp_path: Path) -> None:
    program, data, directory = tmp_path / "program", tmp_path / "data.txt", tmp_path / "dir"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    data.touch()
    directory.mkdir()
    (directory / "x").touch()
    made = additions(
        program, data, f"{directory}/", f"{data}:/etc/other", f"{program}:/opt/", f"{directory}:/d"
    )
    files = [p for p in made.archive.paths() if stat.S_ISREG(made.archive.entries[p[1:]].mode)]
    assert files == [
        "/d/x", "/etc/other", "/opt/program", "/root/data.txt", "/root/dir/x",
        "/usr/local/bin/program",
    ]  # fmt: skip


def test_what_is_missing_or_twice_is_refused(tmp_path: Path) -> None:
    one, two, directory = tmp_path / "one", tmp_path / "two", tmp_path / "dir"
    one.touch()
    two.touch()
    directory.mkdir()
    with pytest.raises(ImageError, match=r"nothing'.*No such file.*name a file"):
        additions(tmp_path / "nothing")
    with pytest.raises(ImageError, match="absolute path: one:/there"):
        additions("one:there")
    with pytest.raises(UsageError, match=r"--add ':/x'"):
        additions(":/x")
    for other in (f"{two}:/x", f"{directory}:/x", f"{two}:/x/y"):
        with pytest.raises(UsageError, match="two additions are for /x in the guest"):
            additions(f"{one}:/x", other)
    with pytest.raises(UsageError, match="two additions are for /x in the guest"):
        additions(f"{directory}:/x", f"{one}:/x")
    additions(f"{directory}:/x", f"{one}:/x/1", f"{directory}:/x")  # directories are merged
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(ImageError, match="neither a file nor a directory"):
        additions(tmp_path / "fifo")
    large = tmp_path / "large"
    large.touch()
    os.truncate(large, FILE_MAX + 1)
    with pytest.raises(ImageError, match="less than 4 GiB"):
        additions(large)


def test_what_may_not_be_read_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "secret").touch()
    monkeypatch.setattr(os, "access", lambda *_, **__: False)  # root may read everything
    with pytest.raises(ImageError, match=r"secret' cannot be packed .* may not be read"):
        additions(tmp_path)


def test_sockets_and_devices_are_told(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as s:
        s.bind(str(tmp_path / "s"))
        made = additions(f"{tmp_path}:/d")
    assert made.archive.paths() == ["/d"]
    assert re.search(r"sockets and devices are not packed .*/s$", made.notes[0])


def test_a_change_while_packing_is_told(tmp_path: Path) -> None:
    file = tmp_path / "log"
    for change in (
        lambda: file.write_text("longer"),
        lambda: file.write_text("b"),
        lambda: file.write_text(""),
        file.unlink,
        lambda: (tmp_path / "other").rename(file),
    ):
        (tmp_path / "other").write_text("b")
        file.write_text("a")
        os.utime(file, (1, 1))
        made = additions(file)
        change()
        with pytest.raises(ImageError, match=r"log' (has changed|cannot be packed)"):
            packed(made.archive)


# --- what programs need ---------------------------------------------------------------------------


def test_libraries_come_along(tmp_path: Path) -> None:
    """From where the program's own rules find them on the host to where its loader looks in the
    guest.
    """
    (tmp_path / "lib").mkdir()
    compile(tmp_path / "lib/libown.so", "int own(void) { return 7; }", "-shared", "-fPIC")
    program = tmp_path / "uses"
    compile(
        program,
        "int own(void); int main(void) { return own(); }",
        f"-L{tmp_path}/lib",
        "-lown",
        "-Wl,-rpath,$ORIGIN/lib",
    )
    made = additions(program)
    assert not made.notes
    paths = made.archive.paths()
    assert "/lib64/ld-linux-x86-64.so.2" in paths
    libc = next(p for p in paths if p.endswith("/libc.so.6"))
    assert libc.replace("libc.so.6", "libown.so") in paths
    os.unlink(tmp_path / "lib/libown.so")  # noqa: PTH108
    (note,) = additions(program).notes
    assert note.startswith("uses cannot run in the guest: this machine has no libown.so; add it")


def compile(out: Path, source: str, *options: str) -> None:
    command = ["gcc", "-x", "c", "-", "-o", str(out), *options]
    if "-L" in " ".join(options):  # libraries come after what uses them
        command = ["gcc", "-x", "c", "-", "-x", "none", "-o", str(out), *options]
    subprocess.run(command, input=source.encode(), check=True)


def test_a_tree_with_its_own_loader_is_complete(tmp_path: Path) -> None:
    root = tmp_path / "root"
    (root / "bin").mkdir(parents=True)
    (root / "usr/lib64").mkdir(parents=True)
    (root / "lib64").symlink_to("usr/lib64")
    (root / "usr/lib64/ld-linux-x86-64.so.2").touch()
    shutil.copy("/bin/ls", root / "bin/ls")
    made = additions(f"{root}:/")
    assert not [p for p in made.archive.paths() if "libc" in p]


def test_scripts_without_their_interpreter_are_told(tmp_path: Path) -> None:
    for name, line in (("a", "/bin/zsh -e"), ("b", "/bin/zsh"), ("c", "/usr/bin/env fish")):
        (tmp_path / name).write_text(f"#!{line}\n")
        (tmp_path / name).chmod(0o755)
    beneath = Archive()
    beneath.file("/usr/bin/env", b"", 0o755)
    initrd = tmp_path / "initrd"
    initrd.write_bytes(beneath.pack())
    notes = additions(tmp_path / "a", tmp_path / "b", tmp_path / "c", initrd=initrd).notes
    assert [note.partition(";")[0] for note in notes] == [
        "a, b cannot run: the guest has no /bin/zsh",
        "c cannot run: the guest has no fish",
    ]
    beneath.file("/bin/zsh", b"", 0o755)
    beneath.file("/usr/bin/fish", b"", 0o755)
    initrd.write_bytes(beneath.pack())
    assert not additions(tmp_path / "a", tmp_path / "c", initrd=initrd).notes


def test_links_of_the_initrd_stay(tmp_path: Path) -> None:
    """A directory in the place of a link to a directory would hide what is behind the link."""
    beneath = Archive()
    beneath.directory("/usr/lib")
    beneath.symlink("/lib", "usr/lib")
    beneath.file("/etc/modules", b"")
    initrd = tmp_path / "initrd"
    initrd.write_bytes(beneath.pack())
    (tmp_path / "d").mkdir()
    (tmp_path / "d/f").touch()
    made = additions(f"{tmp_path}/d:/lib", f"{tmp_path}/d/f:/lib/x/g", initrd=initrd)
    assert made.archive.paths() == [
        "/usr", "/usr/lib", "/usr/lib/f", "/usr/lib/x", "/usr/lib/x/g"
    ]  # fmt: skip


def test_a_compressed_initrd_cannot_be_listed(tmp_path: Path) -> None:
    initrd = tmp_path / "initrd"
    one, two = Archive(), Archive()
    one.file("/a", b"a")
    two.file("/b", b"b")
    initrd.write_bytes(one.pack() + bytes(512) + gzip.compress(two.pack()))
    listing = Listing()
    listing.add(str(initrd))
    assert listing.read("a") == b"a" and not listing.complete
    initrd.write_bytes(one.pack() + bytes(512) + two.pack())
    listing = Listing()
    listing.add(str(initrd))
    assert listing.read("b") == b"b" and listing.complete


@pytest.mark.parametrize("length", [b"-0000070", b"+0000001", b"0x000001", b" 0000001"])
def test_an_archive_with_a_length_that_is_none(tmp_path: Path, length: bytes) -> None:
    """Each field has eight hexadecimal digits; a sign would lead back to the same header."""
    archive = Archive()
    archive.file("/a", b"a")
    raw = bytearray(archive.pack())
    (at,) = (i for i in range(len(raw)) if raw[i : i + 6] == b"070701" and raw[i + 110] == ord("a"))
    raw[at + 54 : at + 62] = length
    initrd = tmp_path / "initrd"
    initrd.write_bytes(raw)
    listing = Listing()
    listing.add(str(initrd))
    assert not listing.complete


# --- modules --------------------------------------------------------------------------------------

MODULE = """
__attribute__((section(".modinfo"), used)) static const char info[] =
    "alias=pci:v0000{n}*\\0depends={depends}\\0name={name}";
"""


@pytest.fixture
def built(tmp_path: Path) -> Path:
    """A build tree: c needs b, b needs a, and e-f is alone."""
    top = tmp_path / "linux"
    (top / "include/config").mkdir(parents=True)
    (top / "include/config/kernel.release").write_text("9.9.9-x\n")
    (top / "drivers").mkdir()
    needs = {"a": "", "b": "a", "c": "b", "e-f": ""}
    for n, (name, depends) in enumerate(needs.items()):
        source = MODULE.format(name=name, depends=depends, n=n)
        compile(top / f"drivers/{name}.ko", source, "-c")
    (top / "modules.order").write_text("".join(f"drivers/{name}.o\n" for name in needs))
    (top / "modules.builtin").write_text("kernel/fs/ext4.ko\n")
    return top


def dep(made: Additions) -> dict[str, list[str]]:
    text = made.archive.entries["lib/modules/9.9.9-x/modules.dep"].data.decode()
    lines = (line.partition(":") for line in text.splitlines())
    return {
        Path(path).name: [Path(need).name for need in needs.split()] for path, _, needs in lines
    }


def wanted(root: Path, name: str) -> list[str]:
    """What kmod's modprobe would load in a guest, in this order."""
    modprobe = shutil.which("modprobe", path="/usr/sbin:/sbin")
    assert modprobe is not None
    command = [modprobe, "-d", str(root), "-S", "9.9.9-x", "--show-depends", name]
    out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return [line.split()[1] for line in out.splitlines() if line.startswith("insmod ")]


def test_modules_of_a_build_tree(built: Path, tmp_path: Path) -> None:
    """modules.dep is made, and init gets its list: with what is needed, without what is built
    in.
    """
    beneath = Archive()
    beneath.file("/etc/modules", b"kernel/x/c.ko\nkernel/x/ext4.ko\nkernel/y/e_f.ko\n")
    initrd = tmp_path / "initrd"
    initrd.write_bytes(beneath.pack())
    made = additions(modules=built, initrd=initrd, kernel="9.9.9-x")
    assert not made.notes
    assert dep(made) == {"a.ko": [], "b.ko": ["a.ko"], "c.ko": ["b.ko", "a.ko"], "e-f.ko": []}
    aliases = made.archive.entries["lib/modules/9.9.9-x/modules.alias"].data.decode()
    assert "alias pci:v00003* e_f\n" in aliases
    assert made.archive.entries["etc/modules"].data.decode().split() == [
        "kernel/drivers/a.ko", "kernel/drivers/b.ko", "kernel/drivers/c.ko",
        "kernel/drivers/e-f.ko",
    ]  # fmt: skip
    # The other modules of the initrd can be loaded as before, and ours may need them.
    beneath.file("/lib/modules/9.9.9-x/modules.dep", b"k/b.ko: k/z.ko\nk/z.ko:\n")
    initrd.write_bytes(beneath.pack())
    (built / "modules.order").write_text("drivers/c.o\n")
    made = additions(modules=built, initrd=initrd)
    assert dep(made) == {"b.ko": ["z.ko"], "z.ko": [], "c.ko": ["b.ko", "z.ko"]}
    (built / "modules.order").write_text("drivers/b.o\n")
    (built / "drivers/b.ko").unlink()
    with pytest.raises(ImageError, match=r"lacks drivers/b\.ko; .* after `make modules`"):
        additions(modules=built)


BASE = "lib/modules/9.9.9-x"


def install(built: Path, top: Path, with_dep: bool) -> dict[str, bytes]:
    """Install the modules of a build tree, compressed; gives them as they were."""
    root = top / BASE
    (root / "kernel").mkdir(parents=True)
    (root / "build").symlink_to(built)
    plain = {name: (built / f"drivers/{name}.ko").read_bytes() for name in ("a", "b", "c", "e-f")}
    (root / "kernel/a.ko.xz").write_bytes(lzma.compress(plain["a"]))
    (root / "kernel/b.ko.zst").write_bytes(zstandard.ZstdCompressor().compress(plain["b"]))
    (root / "kernel/c.ko.gz").write_bytes(gzip.compress(plain["c"]))
    (root / "kernel/e-f.ko").write_bytes(plain["e-f"])
    (root / "modules.dep.bin").touch()
    (root / "modules.softdep").write_text("softdep e-f pre: other\n")
    if with_dep:
        (root / "modules.dep").write_text(
            "kernel/a.ko.xz:\nkernel/b.ko.zst: kernel/a.ko.xz\n"
            "kernel/c.ko.gz: kernel/b.ko.zst kernel/a.ko.xz\nkernel/e-f.ko:\n"
        )
    return plain


def guest_of(made: Additions, top: Path) -> Path:
    """Unpack the modules and what modprobe reads, as the guest has them."""
    for entry, content in made.archive.entries.items():
        if "/modules." in entry or entry.endswith(".ko"):
            (top / entry).parent.mkdir(parents=True, exist_ok=True)
            (top / entry).write_bytes(content.data or b"")
    return top


@pytest.mark.parametrize("below", ["", "lib/modules", BASE])
@pytest.mark.parametrize("with_dep", [True, False])
def test_installed_and_compressed_modules(
    built: Path, tmp_path: Path, below: str, with_dep: bool
) -> None:
    plain = install(built, tmp_path / "out", with_dep)
    made = additions(modules=tmp_path / "out" / below)
    assert dep(made) == {"a.ko": [], "b.ko": ["a.ko"], "c.ko": ["b.ko", "a.ko"], "e-f.ko": []}
    entries = made.archive.entries
    assert {n: entries[f"{BASE}/kernel/{n}.ko"].data for n in ("a", "b", "c")} == {
        n: plain[n] for n in ("a", "b", "c")
    }
    assert f"{BASE}/modules.softdep" in entries
    (tmp_path / "out" / BASE / "kernel/a.ko.xz").write_bytes(b"\xfd7zXZ broken")
    with pytest.raises(ImageError, match=r"a\.ko\.xz' cannot be packed"):
        additions(modules=tmp_path / "out" / below)


@pytest.mark.skipif(
    shutil.which("modprobe", path="/usr/sbin:/sbin") is None,
    reason="needs modprobe: apt install kmod",
)
@pytest.mark.parametrize("with_dep", [True, False])
def test_what_modprobe_makes_of_our_indexes(built: Path, tmp_path: Path, with_dep: bool) -> None:
    install(built, tmp_path / "out", with_dep)
    if with_dep:
        aliases = "# Aliases\nalias pci:v00003* e_f\nalias x-[a-b] a\n"
        (tmp_path / "out" / BASE / "modules.alias").write_text(aliases)
    guest = guest_of(additions(modules=tmp_path / "out"), tmp_path / "guest")
    kernel = f"{guest}/{BASE}/kernel"
    assert wanted(guest, "c") == [f"{kernel}/{n}.ko" for n in "abc"]
    assert wanted(guest, "pci:v00003x") == [f"{kernel}/e-f.ko"]


def test_indexes_that_are_there_without_modules_dep(built: Path, tmp_path: Path) -> None:
    """They are those of other modules, and are made again; with modules.dep they stay."""
    root = tmp_path / "out" / BASE
    install(built, tmp_path / "out", with_dep=False)
    for name in ("modules.alias", "modules.alias.bin"):
        (root / name).write_text("old")
    entries = additions(modules=root).archive.entries
    assert b"alias pci:v00003* e_f\n" in (entries[f"{BASE}/modules.alias"].data or b"")
    assert (entries[f"{BASE}/modules.alias.bin"].data or b"").startswith(b"\xb0\x07\xf4\x57")
    (root / "modules.dep").write_text("kernel/a.ko.xz:\n")
    entries = additions(modules=root).archive.entries
    for name in ("modules.alias", "modules.alias.bin"):
        source = entries[f"{BASE}/{name}"].source
        assert isinstance(source, HostFile) and source.path == str(root / name)
    (root / "modules.alias.bin").unlink()
    entries = additions(modules=root).archive.entries
    assert (entries[f"{BASE}/modules.alias.bin"].data or b"").startswith(b"\xb0\x07\xf4\x57")


@pytest.mark.parametrize("with_dep", [True, False])
def test_of_two_modules_with_one_name_the_last(built: Path, tmp_path: Path, with_dep: bool) -> None:
    """There is one of them in the text and in the index, which is the one that init loads."""
    root = tmp_path / "out" / BASE
    install(built, tmp_path / "out", with_dep)
    (root / "updates").mkdir()
    compile(root / "updates/b.ko", MODULE.format(name="b", depends="e-f", n=9), "-c")
    if with_dep:
        with (root / "modules.dep").open("a") as file:
            file.write("updates/b.ko: kernel/e-f.ko\n")
    beneath = Archive()
    beneath.file("/etc/modules", b"kernel/x/b.ko\n")
    initrd = tmp_path / "initrd"
    initrd.write_bytes(beneath.pack())
    entries = (made := additions(modules=root, initrd=initrd)).archive.entries
    text = (entries[f"{BASE}/modules.dep"].data or b"").decode()
    assert [line for line in text.splitlines() if "/b.ko:" in line] == [
        "updates/b.ko: kernel/e-f.ko"
    ]
    assert dep(made)["b.ko"] == ["e-f.ko"]
    assert (entries[f"{BASE}/modules.dep.bin"].data or b"").count(b"/b.ko:") == 1
    assert (entries["etc/modules"].data or b"").split() == [b"kernel/e-f.ko", b"updates/b.ko"]
    if not with_dep:
        aliases = (entries[f"{BASE}/modules.alias"].data or b"").decode()
        assert "alias pci:v00009* b\n" in aliases and "alias pci:v00001* b\n" not in aliases


def test_a_module_with_aliases_that_begin_with_each_other(built: Path) -> None:
    source = 'const char info[] __attribute__((section(".modinfo"), used)) ='
    source += "".join(f'"alias={"a" * n}\\0"' for n in range(1, 1501))
    compile(built / "drivers/a.ko", f"{source};", "-c")
    with pytest.raises(ImageError, match=r"^module 'a': more than 200 names or aliases") as told:
        additions(modules=built)
    assert "\n" not in str(told.value)


def test_the_modules_must_fit_the_kernel(built: Path, tmp_path: Path) -> None:
    (note,) = additions(modules=built, kernel="9.9.8").notes
    assert "are for 9.9.9-x, but the kernel is 9.9.8: modprobe will not find them" in note
    for version in ("1.0", "2.0"):
        (tmp_path / f"m/lib/modules/{version}/kernel").mkdir(parents=True)
        shutil.copy(built / "drivers/a.ko", tmp_path / f"m/lib/modules/{version}/kernel/")
    made = additions(modules=tmp_path / "m", kernel="2.0")
    assert "/lib/modules/2.0/kernel/a.ko" in made.archive.paths()
    with pytest.raises(ImageError, match=r"no modules for 3\.0: only 1\.0, 2\.0"):
        additions(modules=tmp_path / "m", kernel="3.0")
    with pytest.raises(ImageError, match="has no kernel modules; name the INSTALL_MOD_PATH"):
        additions(modules=built / "drivers")
    with pytest.raises(ImageError, match="cannot be read: No such file"):
        additions(modules=tmp_path / "nothing")


def test_the_release_of_a_kernel(tmp_path: Path) -> None:
    image = bytearray(make_bzimage())
    text = b"6.1.0-rc1+ (me@here) #1\0"
    image[0x20E:0x210] = (0x100).to_bytes(2, "little")
    image[0x300 : 0x300 + len(text)] = text
    kernel = tmp_path / "k"
    kernel.write_bytes(image)
    assert release(str(kernel)) == "6.1.0-rc1+"
    kernel.write_bytes(b"\x7fELF Linux version %s\0 Linux version 6.12.1 (gcc)")
    assert release(str(kernel)) == "6.12.1"
    assert release(str(tmp_path)) == "" and release(str(tmp_path / "none")) == ""


def test_a_host_file_keeps_its_mode(tmp_path: Path) -> None:
    file = tmp_path / "f"
    file.touch(0o640)
    assert HostFile(str(file)).mode == 0o640
