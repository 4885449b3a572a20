"""The testbed with an Intel processor, as far as it needs no Bochs: what travels, what comes back,
the disk, and the names of both testbeds.
"""

from __future__ import annotations

import gzip
import os
import stat
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from pyvmm.errors import TestbedError
from pyvmm.host import bochs
from pyvmm.images.cpio import Archive, Entry, HostFile, Listing
from pyvmm.testbed import assets, disk, layers, travel
from pyvmm.testbed.intel import MODELS, Intel
from pyvmm.testbed.supervisor import printable
from pyvmm.testbed.testbed import Result, Testbed
from tests.intel.test_intel import BRANDS

# --- what comes back ------------------------------------------------------------------------------


REGULAR = 0o104777


def packed(*members: tuple[str, int], data: bytes = b"new") -> bytes:
    """What L1 sends: names and modes of files with the same content."""
    archive = Archive()
    for name, mode in members:
        archive.entries[name.lstrip("/")] = Entry(mode, data)
    return gzip.compress(archive.pack())


def test_files_come_back(tmp_path: Path) -> None:
    out = tmp_path / "out"
    (out / "sub").mkdir(parents=True)
    (out / "old").write_text("old")
    (out / "link").symlink_to("/etc/passwd")
    names = ("link", "old", "sub/deep/new")
    sent = packed(*((f"{out}/{name}", REGULAR) for name in names))
    assert travel.unpack(sent, [str(out)]) == [str(out / name) for name in names]
    for name in names:
        path = out / name
        assert path.read_text() == "new" and not path.is_symlink()
        assert path.stat().st_mode & 0o7000 == 0, "no set-user-ID bit"
    assert travel.unpack(b"", [str(out)]) == []


def test_an_untrusted_l1_writes_nowhere_else(tmp_path: Path) -> None:
    out, other = tmp_path / "out", tmp_path / "other"
    out.mkdir()
    other.mkdir()
    (out / "way").symlink_to(other)
    for name, mode in (
        (f"{other}/x", REGULAR),
        (f"{out}/../other/x", REGULAR),
        (f"{tmp_path}/outside", REGULAR),
        (str(out), REGULAR),
        (f"{out}/way/x", REGULAR),
        (f"{out}/hole", stat.S_IFLNK | 0o777),
        (f"{out}/directory", stat.S_IFDIR | 0o777),
        (f"{out}/pipe", stat.S_IFIFO | 0o777),
    ):
        with pytest.raises(TestbedError, match="L1 sends"):
            travel.unpack(packed((name, mode)), [str(out)])
    # Also a link that comes behind the file whose path leads over it.
    late = packed((f"{out}/a/x", REGULAR), (f"{out}/b/../a", stat.S_IFLNK | 0o777))
    with pytest.raises(TestbedError, match="L1 sends"):
        travel.unpack(late, [str(out)])
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["other", "out", "way"]


@pytest.mark.parametrize(
    "data",
    [b"x", gzip.compress(b"no archive" * 200), packed(("a", REGULAR))[:-20]],
    ids=["no gzip", "no archive", "cut"],  # the bytes have the time in them
)
def test_a_damaged_archive_is_told(data: bytes, tmp_path: Path) -> None:
    with pytest.raises(TestbedError):
        travel.unpack(data, [str(tmp_path)])


def test_too_much_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(travel, "MOST", 5)
    with pytest.raises(TestbedError, match="more than"):
        travel.unpack(packed((f"{tmp_path}/a", REGULAR)), [str(tmp_path)])


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Sequence[str]], Result]:
    """Runs the scripts of L1 here, by its busybox."""
    monkeypatch.setattr(travel, "MARK", str(tmp_path / "mark"))
    applets = tmp_path / "applets"
    applets.mkdir()
    for name in ("sh", "touch", "find", "sleep", "cpio", "gzip", "cat", "rm"):
        (applets / name).symlink_to(assets.busybox())

    def call(argv: Sequence[str]) -> Result:
        done = subprocess.run(
            [str(applets / argv[0]), *argv[1:]], env={"PATH": str(applets)}, capture_output=True
        )
        return Result(done.returncode, done.stdout, done.stderr)

    return call


def test_only_what_a_command_has_changed(
    tmp_path: Path, run: Callable[[Sequence[str]], Result]
) -> None:
    """Files of the same second before the mark stay, and those behind the mark come back."""
    out = tmp_path / "out"
    out.mkdir()
    (out / "before").write_text("as it was")
    before = (out / "before").stat()
    travel.departure(run, "7")
    (out / "by the command").write_text("result")
    (out / "by the command").chmod(0o640)
    missing = str(tmp_path / "nowhere")
    assert travel.arrival(run, "7", [str(out), missing]) == [str(out / "by the command")]
    assert not list(tmp_path.glob("mark*"))
    assert (out / "before").stat().st_ino == before.st_ino


def test_a_mark_that_cannot_be_made_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: Callable[[Sequence[str]], Result]
) -> None:
    monkeypatch.setattr(travel, "MARK", str(tmp_path / "nowhere/mark"))
    with pytest.raises(TestbedError, match="cannot note the time"):
        travel.departure(run, "7")


def test_all_names_of_a_hard_link_come_back(
    tmp_path: Path, run: Callable[[Sequence[str]], Result]
) -> None:
    """busybox packs the content with one of them."""
    out = tmp_path / "out"
    out.mkdir()
    travel.departure(run, "7")
    (out / "a").write_text("content")
    for name in ("b", "c"):
        (out / name).hardlink_to(out / "a")
    (out / "empty").touch()
    (out / "nothing").hardlink_to(out / "empty")
    assert len(travel.arrival(run, "7", [str(out)])) == 5
    assert {p.name: p.read_text() for p in out.iterdir()} == {
        **dict.fromkeys("abc", "content"),
        **dict.fromkeys(("empty", "nothing"), ""),
    }


def test_names_of_a_hard_link_are_not_without_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A small archive would fill this machine's disk."""
    source = tmp_path / "source"
    source.write_bytes(bytes(100_000))
    for i in range(9):
        (tmp_path / f"link{i}").hardlink_to(source)
    archive = Archive()
    for i in range(10):
        entry = Entry(REGULAR, source=HostFile(str(source)))
        archive.entries[f"{tmp_path}/out/{i}".lstrip("/")] = entry
    layers.write(archive, str(tmp_path / "archive"))
    monkeypatch.setattr(travel, "MOST", 500_000)
    with pytest.raises(TestbedError, match="more than"):
        travel.unpack(gzip.compress((tmp_path / "archive").read_bytes()), [str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


# --- what travels ---------------------------------------------------------------------------------


def test_pyvmm_travels_as_source_and_bytecode() -> None:
    entries = layers._pyvmm().entries
    package = str(Path(layers.__file__).parents[1])[1:]
    source = entries[f"{package}/launch.py"].source
    assert source is not None and source.path == f"/{package}/launch.py"
    tag = sys.implementation.cache_tag
    bytecode = entries[f"{package}/__pycache__/launch.{tag}.pyc"].data
    assert struct.unpack_from("<I", bytecode, 4)[0] == 1, "by hash, and not compared (PEP 552)"
    assert f"{package}/_ext.abi3.so" in entries and f"{package}/_ext.c" not in entries


def test_layers_do_not_replace_the_links_of_a_merged_usr(tmp_path: Path) -> None:
    """A directory /lib in a later archive would take the place of the link."""
    for make in (layers._pyvmm, layers._python):
        entries = make().entries
        assert not [p for p in entries if p.partition("/")[0] in layers.MERGED and "/" in p]
    assert layers._place("/bin/sh") == "/usr/bin/sh" and layers._place("/binary/x") == "/binary/x"
    assert entries["lib64"].data == b"usr/lib64"
    assert "usr/lib64/ld-linux-x86-64.so.2" in entries
    names = {path.rpartition("/")[2] for path in entries}
    assert {"busybox", "os.pyc", "pytest", "_cffi_backend.cpython-311-x86_64-linux-gnu.so"} & names
    assert "os.py" not in names
    module = next(p for p in entries if p.endswith("/elftools/elf/elffile.pyc"))
    assert entries[module].data


def test_the_same_inputs_give_the_same_layers(tmp_path: Path) -> None:
    """Another process, with another seed for hashes, makes the same bytes."""
    code = (
        "import hashlib, sys; from pyvmm.testbed import layers\n"
        "layers.write(layers._pyvmm(), sys.argv[1])\n"
        "print(hashlib.sha256(open(sys.argv[1], 'rb').read()).hexdigest())"
    )
    said = {
        subprocess.run(
            [sys.executable, "-c", code, str(tmp_path / "layer")],
            env={**os.environ, "PYTHONHASHSEED": seed},
            cwd=Path(__file__).parents[2],
            capture_output=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(said) == 1


def test_a_written_archive_is_what_linux_unpacks(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"x" * 5000)
    archive = Archive()
    archive.host_file("/a/file", HostFile(str(file)))
    archive.file("/b", b"inline")
    layers.write(archive, str(tmp_path / "out"))
    assert (tmp_path / "out").stat().st_size == archive.size
    listing = Listing()
    listing.add(str(tmp_path / "out"))
    assert listing.read("a/file") == b"x" * 5000 and listing.read("b") == b"inline"
    file.write_bytes(b"shorter")
    with pytest.raises(TestbedError, match="has changed"):
        layers.write(archive, str(tmp_path / "out"))
    file.unlink()
    with pytest.raises(TestbedError, match="No such file"):
        layers.write(archive, str(tmp_path / "out"))


def test_the_key_of_a_layer_has_all_that_goes_into_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layers, "_python_inputs", list)
    program = tmp_path / "ping"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    monkeypatch.setattr(layers, "PROGRAMS", ("ping",))
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    keys = [layers._python_key()]
    program.write_text("#!/bin/sh\necho another version\n")
    keys.append(layers._python_key())
    for name, value in (
        ("PROGRAMS", ("ping", "ip")),
        ("PACKAGES", ("cffi",)),
        ("UNUSED", frozenset("a")),
        ("MERGED", ("bin",)),
    ):
        monkeypatch.setattr(layers, name, value)
        keys.append(layers._python_key())
    assert len({repr(key) for key in keys}) == len(keys)
    stamped = "\n".join(map(str, keys[0]))
    for path in (sys.executable, assets.busybox(), "/lib64/ld-linux-x86-64.so.2"):
        assert f"{os.path.realpath(path)} " in stamped
    assert "libc.so.6 " in stamped


@pytest.mark.parametrize("name", ["python", "a b", "it's $HOME `x`", "l" * 120 + "/" + "o" * 200])
def test_scripts_find_their_interpreter(tmp_path: Path, name: str) -> None:
    interpreter = tmp_path / name
    interpreter.parent.mkdir(exist_ok=True)
    interpreter.symlink_to(sys.executable)
    script = tmp_path / "script"
    script.write_text(f"{layers._first(str(interpreter))}import sys\nprint(sys.argv[1:])\n")
    script.chmod(0o755)
    done = subprocess.run([script, "one", "two words"], capture_output=True, text=True)
    assert done.stdout == "['one', 'two words']\n", done


def test_init_finds_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the name of its directory is."""
    monkeypatch.setattr(sys, "executable", "/opt/it's mine/$python")
    monkeypatch.setattr(layers, "Modules", lambda path: NoModules())
    entry = layers._system(assets.Kernel("6.1", "", "")).entries["init"]
    last = entry.data.decode().splitlines()[-1].partition("-I")[0].replace("exec ", "echo ")
    said = subprocess.run(["sh", "-c", last], capture_output=True, text=True).stdout
    assert said == "/opt/it's mine/$python\n"


class NoModules:
    def closure(self, names: list[str]) -> dict[str, Any]:
        return {}


# --- the disk -------------------------------------------------------------------------------------

KERNEL_AT, ENTRY_AT = 0x1000000, 0x1000040


def kernel(note: bool = True) -> bytes:
    """An ELF file with one segment of 1000 bytes, and the note that names the entry point."""
    content = b"K" * 1000
    notes = struct.pack("<3I", 4, 5, 1) + b"GNU\0" + b"12345".ljust(8, b"\0")
    notes += struct.pack("<3I", 4, 4, disk.XEN_ELFNOTE_PHYS32_ENTRY if note else 1) + b"Xen\0"
    notes += struct.pack("<I", ENTRY_AT)
    at = 64 + 2 * 56
    head = b"\x7fELF\2\1\1".ljust(16, b"\0") + struct.pack(
        "<2HI3QI6H", 2, 62, 1, 0, 64, 0, 0, 64, 56, 2, 64, 0, 0
    )
    segments = struct.pack(
        "<2I6Q", 1, 7, at, KERNEL_AT, KERNEL_AT, len(content), 5 << 20, 4096
    ) + struct.pack("<2I6Q", 4, 4, at + len(content), 0, 0, len(notes), len(notes), 4)
    return head + segments + content + notes


def test_the_disk_has_what_the_loader_is_told(tmp_path: Path) -> None:
    first, second = tmp_path / "1", tmp_path / "2"
    first.write_bytes(b"A" * 1024)
    second.write_bytes(b"B" * 512)
    out = tmp_path / "disk"
    boot = disk.loader()
    assert len(boot) == disk.LOADER and boot[510:512] == b"\x55\xaa"
    cylinders = disk.write(str(out), boot, kernel(), [str(first), str(second)], "quiet", 1 << 30)
    data = out.read_bytes()
    assert len(data) == cylinders * 16 * 63 * 512
    initrd, size = struct.unpack_from("<2Q", data, disk.MODULE)
    assert (initrd, size) == (KERNEL_AT + (6 << 20), 1536), "behind the kernel's bss"
    assert struct.unpack_from("<I", data, disk.ENTRY)[0] == ENTRY_AT
    assert data[disk.CMDLINE :].split(b"\0")[0] == b"quiet"
    pieces = list(struct.iter_unpack("<3I", data[disk.PIECES : disk.PIECES + 36]))
    assert pieces == [(16, 2, KERNEL_AT), (18, 3, initrd), (0, 0, 0)]
    assert data[16 * 512 :][:1024] == b"K" * 1000 + bytes(24)
    assert data[18 * 512 :][:1536] == b"A" * 1024 + b"B" * 512


def test_a_disk_that_cannot_be_is_refused(tmp_path: Path) -> None:
    archive = tmp_path / "archive"
    archive.write_bytes(bytes(512))
    for elf, cmdline, memory, why in (
        (kernel(note=False), "", 1 << 30, "no PVH note"),
        (kernel(), "x" * 2000, 1 << 30, "too small"),
        (kernel(), "", 64 << 20, "--memory"),
    ):
        with pytest.raises(TestbedError, match=why):
            disk.write(str(tmp_path / "disk"), disk.loader(), elf, [str(archive)], cmdline, memory)
    assert not (tmp_path / "disk").exists()


# --- the machine ----------------------------------------------------------------------------------

OPTIONS: dict[str, Any] = {
    "cpus": 0, "memory": 0, "kernel": None, "kvm": [], "writable": [], "add": [],
    "directories": [], "vdpa_card": False,
}  # fmt: skip


@pytest.fixture
def there(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if everything were set up."""
    monkeypatch.setattr(Intel, "missing", staticmethod(list))
    monkeypatch.setattr(bochs, "find", lambda: bochs.Bochs("/somewhere/3.0"))
    have = [assets.Kernel(v, "", "") for v in ("6.12.9-cloud-amd64", "6.1.0-9-cloud-amd64")]
    monkeypatch.setattr(assets, "kernels", lambda: have)


@pytest.mark.usefixtures("there")
def test_the_model_is_one_under_which_the_kernel_works() -> None:
    assert Intel(OPTIONS, print).emulator() == "Bochs 3.0, corei7_haswell_4770"
    assert Intel({**OPTIONS, "kernel": "6.12"}, print).model == "broadwell_ult"
    assert set(BRANDS) == set(MODELS.values())  # the test in L1 has the processor's name


@pytest.mark.usefixtures("there")
def test_the_remedy_for_a_lacking_kernel_is_for_this_processor() -> None:
    with pytest.raises(TestbedError) as e:
        Intel({**OPTIONS, "kernel": "5.10"}, print)
    assert e.value.hint == "run: pyvmm testbed setup --cpu intel --kernel-version 5.10"


@pytest.mark.usefixtures("there")
def test_what_bochs_cannot_do_is_refused() -> None:
    for more in ({"cpus": 2}, {"vdpa_card": True}, {"memory": 4 << 30}):
        with pytest.raises(TestbedError, match=r"one vCPU|2 GiB"):
            Intel({**OPTIONS, **more}, print)


@pytest.mark.usefixtures("there")
def test_a_panic_ends_l1() -> None:
    l1 = Intel(OPTIONS, print)
    assert l1.trouble(b"[ 0.1] all is well\n") == ""
    said = b"[ 0.1] x\n[ 1.0] Kernel panic - not syncing: No init found.\r\n[ 1.0] more\r\n"
    assert l1.trouble(said) == "", "the call trace is still to come"
    said += b"[ 1.0] ---[ end Kernel panic - not syncing: No init found. ]---"
    assert l1.trouble(said) == "Kernel panic - not syncing: No init found."


@pytest.mark.usefixtures("there")
def test_its_silence_is_measured_in_processor_time() -> None:
    l1 = Intel(OPTIONS, print)
    busy = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    idle = subprocess.Popen(["sleep", "1000"])
    try:
        for process, name in ((busy, "Bochs"), (idle, "Bochs")):
            l1.processes = {process: name}
            start, until = l1.clock(), time.monotonic() + 60
            if process is idle:
                time.sleep(0.5)
                assert l1.clock() - start < 0.25, "a twentieth"
            while process is busy and l1.clock() - start < 0.5:
                assert time.monotonic() < until
                time.sleep(0.05)
        busy.kill()
        busy.wait()
        l1.processes = {busy: "Bochs"}
        assert l1.clock() > 0, "also when it has ended"
    finally:
        for process in (busy, idle):
            process.kill()
            process.wait()


def test_what_is_missing_has_a_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bochs, "find", lambda: None)
    monkeypatch.setattr(assets, "kernels", list)
    monkeypatch.setenv("PATH", "/nowhere")
    lacks = dict(Intel.missing())
    assert lacks["Bochs"] == "run: pyvmm testbed setup --cpu intel"
    assert "apt-get" in lacks["gcc"]
    assert not Testbed.is_set_up("intel")


def test_a_terminals_commands_are_no_words() -> None:
    screen = b"\x1b[2J\x1b[1;1H\x1b(BBochs is exiting\x1b[0m\r\nno such file\x1b[24;1H\x07"
    assert printable(screen).split("\n")[-3:] == ["Bochs is exiting", "", "no such file"] or (
        "Bochs is exiting" in printable(screen) and "\x1b" not in printable(screen)
    )


def test_testbeds_of_both_processors_go_by_one_name() -> None:
    amd, intel = Testbed("both"), Testbed("both", cpu="intel")
    assert amd.dir != intel.dir and amd.name == intel.name
    assert len(f"{Testbed('x' * 32, cpu='intel').dir}/socket") < 108
    with pytest.raises(TestbedError, match="use amd or intel"):
        Testbed(cpu="via")
