"""Guest images: the builder's parts, one real build, and our init in that image under plain
emulation (QEMU's TCG, q35).
"""

from __future__ import annotations

import base64
import bz2
import gzip
import json
import lzma
import random
import re
import shutil
import struct
import subprocess
import zlib
from pathlib import Path

import lz4.block
import pytest
import zstandard

from pyvmm import images
from pyvmm.cli import main
from pyvmm.errors import BuildError, ImageError
from pyvmm.host.paths import cache_root
from pyvmm.images import Image, kernel
from pyvmm.images.build import build
from pyvmm.images.cpio import Archive
from pyvmm.images.elf import libraries
from pyvmm.images.kernel import Modules, extract_vmlinux
from pyvmm.images.sources import INIT
from pyvmm.images.tiny import check_config
from pyvmm.spec import platform

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

HEADER = INIT.parent / "pyvmm_port.h"

# --- guest/ ---------------------------------------------------------------------------------------


def test_port_header_matches_platform() -> None:
    text = HEADER.read_text()
    names = r"(?:(?:PORT_)?GUEST|GONE|REQUEST|INPUT)_\w+"
    stated = {
        n: int(v, 0) for n, v in re.findall(rf"^#define\s+({names})\s+(\w+)", text, re.MULTILINE)
    }
    magic, count = stated.pop("GUEST_MAGIC"), stated.pop("PORT_GUEST_COUNT")
    ours = {n: v for n, v in vars(platform).items() if re.match(names, n)}
    assert stated == ours
    assert f"PORT_ACPI_SLEEP_CONTROL {platform.PORT_ACPI_SLEEP_CONTROL:#x}" in text
    power_off = re.search(r"ACPI_POWER_OFF\s+(\w+)", text)
    assert power_off and int(power_off[1], 0) == 1 << 5 | platform.ACPI_S5_TYPE << 2
    assert magic.to_bytes(4, "little") == b"PVMM"
    assert platform.PORT_GUEST_CONTROL + count == platform.PORT_GUEST_INPUT + 4


def test_init_compiles_without_warnings(tmp_path: Path) -> None:
    flags = ["-Wall", "-Wextra", "-Wshadow", "-Wvla", "-Wconversion", "-Werror"]
    command = ["gcc", "-std=gnu11", "-O1", *flags, "-c", "-o", str(tmp_path / "o"), str(INIT)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_directories_that_init_makes(tmp_path: Path) -> None:
    """As for ``--share DIR:PATH``, with paths that name a directory more than once."""
    program = f'''#define main init_main
    #include "{INIT}"
    #undef main
    int main(int argc, char **argv)
    {{
        for (int i = 1; i < argc; i++)
            printf("%s\\n", strerror(make_directories(argv[i])));
        return 0;
    }}
    '''
    command = ["gcc", "-std=gnu11", "-w", "-x", "c", "-", "-o", str(tmp_path / "program")]
    subprocess.run(command, input=program, text=True, check=True)
    (tmp_path / "file").touch()
    paths = ["new/below", "new", "a/b/", "c//d", "e/./f", "g/h/.", "i/j/../k", "file", "file/x"]
    command = [str(tmp_path / "program"), "/", *(f"{tmp_path}/{path}" for path in paths)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    good, bad = done.stdout.splitlines()[:-2], done.stdout.splitlines()[-2:]
    assert good == ["Success"] * 8 and bad == ["Not a directory"] * 2, done.stdout
    assert all((tmp_path / path).is_dir() for path in paths[:-2])


# --- cpio -----------------------------------------------------------------------------------------


def sample() -> Archive:
    archive = Archive()
    archive.file("/etc/b", b"hello\n")
    archive.symlink("/bin/sh", "busybox")
    archive.device("/dev/console", 5, 1)
    archive.file("/init", b"#!", 0o755)
    return archive


def test_cpio_is_what_cpio_reads(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(sample().pack())
    with (tmp_path / "a").open("rb") as f:
        command = ["cpio", "-itv", "--numeric-uid-gid", "--quiet"]
        env = {"TZ": "UTC", "PATH": "/usr/bin:/bin"}
        done = subprocess.run(command, stdin=f, capture_output=True, text=True, check=True, env=env)
    lines = [line.split() for line in done.stdout.splitlines()]
    assert [(line[0], line[-1]) for line in lines] == [
        ("drwxr-xr-x", "bin"),
        ("lrwxrwxrwx", "busybox"),
        ("drwxr-xr-x", "dev"),
        ("crw-------", "dev/console"),
        ("drwxr-xr-x", "etc"),
        ("-rw-r--r--", "etc/b"),
        ("-rwxr-xr-x", "init"),
    ]
    assert all(line[2:4] == ["0", "0"] and "1970" in line for line in lines)


def test_cpio_does_not_depend_on_order() -> None:
    other = Archive()
    other.file("/init", b"#!", 0o755)
    other.device("/dev/console", 5, 1)
    other.symlink("/bin/sh", "busybox")
    other.file("/etc/b", b"other")
    other.file("/etc/b", b"hello\n")
    assert other.pack() == sample().pack()


# --- kernels and modules --------------------------------------------------------------------------


def lz4_legacy(data: bytes) -> bytes:
    """As the kernel's build packs: `lz4 -l`."""
    out = kernel.LZ4_LEGACY
    for at in range(0, len(data), kernel.LZ4_BLOCK):
        block = lz4.block.compress(data[at : at + kernel.LZ4_BLOCK], store_size=False)
        out += struct.pack("<I", len(block)) + block
    return out


def lzma_alone(data: bytes) -> bytes:
    return lzma.compress(data, lzma.FORMAT_ALONE)


PACKERS = (gzip.compress, bz2.compress, lzma.compress, lzma_alone, lz4_legacy, zstandard.compress)


def bzimage(payload: bytes, size: int) -> bytes:
    """The parts of a bzImage that matter for its payload: one setup sector, and the payload 64
    bytes into the protected-mode code.
    """
    head = bytearray(1024)
    head[0x1F1] = 1
    head[0x202:0x206] = b"HdrS"
    struct.pack_into("<II", head, 0x248, 64, len(payload) + 4)
    return bytes(head) + bytes(64) + payload + struct.pack("<I", size) + b"trailing"


def test_trimmed_segments_load_the_same() -> None:
    elf = bytearray(Path("/bin/true").read_bytes())
    phoff, phnum = struct.unpack_from("<Q", elf, 32)[0], struct.unpack_from("<H", elf, 56)[0]
    loads = [
        at
        for at in range(phoff, phoff + 56 * phnum, 56)
        if struct.unpack_from("<I", elf, at)[0] == 1
    ]
    offset, size = (
        struct.unpack_from("<Q", elf, loads[0] + 8)[0],
        struct.unpack_from("<Q", elf, loads[0] + 32)[0],
    )
    elf[offset + size - 100 : offset + size] = bytes(99) + b"\1"
    assert kernel.trim_zeros(bytes(elf))[loads[0] + 32 :][:8] == size.to_bytes(8, "little")
    elf[offset + size - 100 : offset + size] = b"\1" + bytes(99)
    trimmed = kernel.trim_zeros(bytes(elf))
    assert struct.unpack_from("<Q", trimmed, loads[0] + 32)[0] == size - 99
    assert len(trimmed) == len(elf)


@pytest.mark.parametrize("pack", PACKERS)
def test_vmlinux_comes_out_without_its_relocations(pack: object) -> None:
    assert callable(pack)
    elf = Path("/bin/true").read_bytes()
    data = elf + bytes(range(256)) * 8
    assert extract_vmlinux(bzimage(pack(data), len(data))) == elf


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x7fELF" + bytes(1000),
        bzimage(b"\x1f\x8b" + bytes(100), 100),
        bzimage(lz4_legacy(b"x" * 1000)[:-2], 1000),
        bzimage(zstandard.compress(b"x" * 1000)[:-2], 1000),
        bzimage(gzip.compress(b"no ELF file"), 11),
        bzimage(b"unknown compression", 100),
        bzimage(gzip.compress(bytes(5000)), 5000)[:-40],
    ],
)
def test_extract_refuses_what_is_broken(data: bytes) -> None:
    with pytest.raises(BuildError):
        extract_vmlinux(data)


@pytest.mark.parametrize("pack", PACKERS)
def test_modules_come_out_whole_without_their_size(pack: object) -> None:
    assert callable(pack)
    data = random.Random(1).randbytes(1 << 20) + bytes(9 << 20)  # lz4: more than one block
    assert kernel.decompress(pack(data)) == data
    with pytest.raises((ValueError, lzma.LZMAError, EOFError, zlib.error)):
        kernel.decompress(pack(data)[: 1 << 19])


def make_module(root: Path, path: str, depends: str) -> bytes:
    """A kernel module with nothing but .modinfo, followed by a signature."""
    name = Path(path).name.partition(".")[0]
    source = (
        '.section .modinfo,"a"\n.asciz "license=GPL"\n'
        f'.asciz "depends={depends}"\n.asciz "name={name}"\n'
    )
    out = root / "o"
    subprocess.run(
        ["gcc", "-c", "-x", "assembler", "-o", str(out), "-"], input=source.encode(), check=True
    )
    data = out.read_bytes()
    out.unlink()
    signed = data + b"signature~Module signature appended~\n"
    file = root / "kernel" / path
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(lzma.compress(signed) if path.endswith(".xz") else signed)
    return data


def test_modules_come_in_order_of_dependency(tmp_path: Path) -> None:
    a = make_module(tmp_path, "net/a-net.ko", "b_ring,c")
    make_module(tmp_path, "b-ring.ko.xz", "c")
    make_module(tmp_path, "x/c.ko", "built-in")
    make_module(tmp_path, "broken.ko", "absent")
    (tmp_path / "modules.builtin").write_text("kernel/drivers/built-in.ko\n")
    modules = Modules(tmp_path)
    found = modules.closure(["a_net", "built_in"])
    assert list(found) == ["c", "b_ring", "a_net"]
    assert [entry[0] for entry in found.values()] == [
        "kernel/x/c.ko",
        "kernel/b-ring.ko",
        "kernel/net/a-net.ko",
    ]
    assert found["a_net"][2] == a
    with pytest.raises(BuildError, match=r"no module absent, which broken needs"):
        modules.closure(["broken"])


def test_libraries_are_found_through_libraries(tmp_path: Path) -> None:
    lib = tmp_path / "lib"
    lib.mkdir()

    def cc(*args: str) -> None:
        subprocess.run(
            ["gcc", "-Wl,--no-as-needed", "-x", "c", *args], cwd=lib, input=b"", check=True
        )

    cc("-shared", "-o", "libtwo.so", "-")
    cc("-shared", "-o", "libone.so", "-", "-L.", "-ltwo")
    (lib / "main.c").write_text("int main(void) { return 0; }")
    command = ["gcc", "-Wl,--no-as-needed,-rpath-link,.", "-o", "prog", "main.c", "-L.", "-lone"]
    subprocess.run(command, cwd=lib, check=True)
    found = libraries(lib / "prog", [tmp_path, Path("/")])
    assert {Path(p).name for p in found} >= {
        "libone.so",
        "libtwo.so",
        "libc.so.6",
        "ld-linux-x86-64.so.2",
    }
    assert "/lib64/ld-linux-x86-64.so.2" in found
    (lib / "libtwo.so").unlink()
    with pytest.raises(BuildError, match=r"libtwo\.so, which libone\.so needs"):
        libraries(lib / "prog", [tmp_path, Path("/")])


def test_tiny_config_is_checked() -> None:
    wanted = "# a comment\nCONFIG_A=y\n# CONFIG_B is not set\n"
    check_config(wanted, "CONFIG_A=y\n# CONFIG_B is not set\n")
    check_config(wanted, "CONFIG_A=y\n")
    with pytest.raises(BuildError, match="CONFIG_A=y"):
        check_config(wanted, "# CONFIG_A is not set\n")
    with pytest.raises(BuildError, match="CONFIG_B"):
        check_config(wanted, "CONFIG_A=y\nCONFIG_B=m\n")


# --- finding and building -------------------------------------------------------------------------


def test_find_without_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(ImageError, match=r"pyvmm image build$"):
        images.find()
    with pytest.raises(ImageError, match=r"pyvmm image build --tiny"):
        images.find("tiny")
    with pytest.raises(ImageError, match=r"there is no image '\.\./x'"):
        images.find("../x")
    assert images.built() == []
    assert main(["image", "list"]) == 0


@pytest.mark.parametrize(
    "options",
    [
        ["--tiny", "--from-host"],
        ["--tiny", "--kernel-version", "6.12"],
        ["--kernel-version", "newest"],
    ],
)
def test_contradicting_options(options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    try:
        status = main(["image", "build", *options])
    except SystemExit as e:
        status = int(e.code or 0)
    assert status == 2
    assert capsys.readouterr().err.strip()


def test_unwritable_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "pyvmm").write_text("a file where a directory should be")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(BuildError, match="XDG_CACHE_HOME"):
        build()


@pytest.fixture(scope="module")
def default_image(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Image]:
    """The default image, built in a cache of the test's own. Packages come from the user's cache if
    it has them.
    """
    home = tmp_path_factory.mktemp("cache")
    debs = Path(cache_root()) / "debs"
    if debs.is_dir():
        shutil.copytree(
            debs, home / "pyvmm" / "debs", ignore=shutil.ignore_patterns("linux-source*")
        )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(home))
        image, fresh = build()
        assert fresh
        yield image


def test_same_inputs_same_bytes(
    default_image: Image, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    again, fresh = build()
    assert not fresh
    assert again.directory == default_image.directory
    before = {f: Path(default_image.directory, f).read_bytes() for f in images.FILES}
    with Path(default_image.initrd).open("r+b") as f:
        f.truncate(1000)
    third, fresh = build(output=tmp_path / "copy")
    assert fresh  # a damaged image counts as none
    for directory in (Path(third.directory), tmp_path / "copy"):
        assert {f: (directory / f).read_bytes() for f in images.FILES} == before
    assert main(["image", "list", "--json"]) == 0
    (entry,) = json.loads(capsys.readouterr().out)
    assert entry["name"] == "default"
    names = {i["name"].removesuffix("t64") for i in entry["inputs"]}
    assert {"iperf3", "libssl3"} <= names
    big = Path(third.bzimage)
    big.rename(tmp_path / "away")  # as in a testbed into which the image has travelled
    assert main(["image", "list"]) == 0
    listed = capsys.readouterr().out
    assert "vmlinux" in listed and "initrd" in listed and "bzImage" not in listed
    (tmp_path / "away").rename(big)


def test_init_in_a_guest(default_image: Image) -> None:
    """Our init on the machine of another VMM. It has no guest port, so output and status go to the
    console.
    """
    qemu = shutil.which("qemu-system-x86_64")
    if qemu is None:
        pytest.skip("qemu-system-x86_64 is not installed")
    script = (
        "printf '<%s>' \"$@\"; echo; hostname; echo peer $PYVMM_PEER;"
        "ip -o addr; ip route; ip -6 route; cat /sys/class/net/eth0/mtu;"
        "rmmod virtio_net && modprobe virtio_net && ls -1 /sys/class/net;"
        "iperf3 -v | head -1; ethtool --version;"
        "touch /tmp/a /run/a; ls -l /proc/self/fd/0; dmesg | grep -c Linux; lspci;"
        "echo u | nc.openbsd -u -w 1 ::1 9 && echo nc;"
        "(sleep 100 &); exit 7"
    )
    argv = ["sh", "-c", script, "x", "a b", "", 'q"$', "\u00e9\n", ""]
    raw = b"".join(arg.encode() + b"\0" for arg in argv)
    append = (
        "console=ttyS0 panic=-1 mitigations=off tsc=reliable pyvmm.hostname=h "
        "pyvmm.net=52:54:00:00:00:01,10.0.2.15/24,fd00::15/64,gw=10.0.2.2,mtu=1400 "
        f"{images.CMDLINE} "
        f"pyvmm.cmd={base64.urlsafe_b64encode(raw).decode().rstrip('=')}"
    )
    command = [
        qemu,
        "-nodefaults",
        "-no-user-config",
        "-display",
        "none",
        "-no-reboot",
        "-M",
        "q35",
        "-m",
        "256",
    ]
    command += [
        "-accel",
        "tcg",
        "-cpu",
        "EPYC,-x2apic",
        "-serial",
        "stdio",
        "-kernel",
        default_image.kernel,
    ]
    command += ["-initrd", default_image.initrd, "-append", append, "-netdev", "user,id=n"]
    command += ["-device", "virtio-net-pci,netdev=n,mac=52:54:00:00:00:01,romfile="]
    done = subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, timeout=120, check=False
    )
    out = done.stdout.decode(errors="replace").replace("\r", "")
    for text in (
        '<a b><><q"$><\u00e9\n><>\n',
        "\nh\npeer 10.0.2.2\n",
        "inet 127.0.0.1/8",
        "inet 10.0.2.15/24 brd 10.0.2.255 scope global eth0",
        "inet6 fd00::15/64",
        "\n1400\n",
        "default via 10.0.2.2 dev eth0",
        "\neth0\nlo\n",
        "\niperf 3.",
        "\nethtool version",
        "-> /dev/null",
        " Class 0200: 1af4:1000\n",
        "\nnc\n",
        "\npyvmm-init: status 7\n",
        "reboot: Power down",
    ):
        assert text in out, out
    assert done.returncode == 0
