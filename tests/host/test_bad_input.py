"""Bad input on the command line: one line on stderr with cause and remedy, the documented exit
code, nothing left behind.
"""

from __future__ import annotations

import os
import signal
import stat
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pyvmm.spec import linux_boot as lb
from tests.driver import PATIENCE, wait_for
from tests.host.taps import own_tap
from tests.strangers import BECOME, need_readable_checkout

ROOT = Path(__file__).parents[2]
Guest = Callable[[str], str]


def spawn(args: list[str], prefix: list[str] | None = None) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*(prefix or []), sys.executable, "-m", "pyvmm", "run", "--host", "local", *args],
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def refuse(args: list[str], code: int, text: str, prefix: list[str] | None = None) -> None:
    """Run, and expect one line with ``text`` and the exit code."""
    with spawn(args, prefix) as child:
        out, err = child.communicate(timeout=PATIENCE)
    assert (child.returncode, out) == (code, ""), err
    assert err.startswith("pyvmm: ") and err.count("\n") == 1, err
    assert text in err
    assert ";" in err, f"no remedy: {err}"


@pytest.fixture(scope="module")
def elf(guest: Guest) -> bytes:
    return Path(guest("hello")).read_bytes()


def patched(data: bytes, offset: int, value: bytes) -> bytes:
    return data[:offset] + value + data[offset + len(value) :]


def q(value: int) -> bytes:
    return struct.pack("<Q", value)


PH0, PH1 = lb.EHDR_SIZE, lb.EHDR_SIZE + lb.PHDR_SIZE
PADDR, FILESZ, MEMSZ = 24, 32, 40  # of a program header
KERNELS: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "empty": (lambda d: b"", "is empty"),
    "no kernel": (lambda d: b"hello\n" * 1000, "neither a bzImage nor an ELF"),
    "truncated": (lambda d: d[:5000], "is truncated: segment 0 ends at byte"),
    "truncated header": (lambda d: d[:30], "is truncated: the ELF header"),
    "another machine": (lambda d: patched(d, 18, b"\xb7\0"), "another machine (e_machine 183"),
    "another class": (lambda d: patched(d, 4, b"\x01"), "an ELF of another machine"),
    "overlapping": (lambda d: patched(d, PH1 + PADDR, q(0x10_0800)), "segments 0 and 1 overlap"),
    "oversized": (lambda d: patched(d, PH1 + MEMSZ, q(1 << 50)), "outside guest memory of 16 MiB"),
    "beyond memory": (
        lambda d: patched(d, PH1 + PADDR, q(0x100_0000)),
        "raise --memory to at least 17M",
    ),
    "filesz": (lambda d: patched(d, PH1 + FILESZ, q(1 << 40)), "p_filesz"),
    "entry": (lambda d: patched(d, 24, q(0x99)), "e_entry"),
    "bzImage cut": (lambda d: bytes(0x202) + b"HdrS" + bytes(10), "is truncated: the setup header"),
}


@pytest.mark.parametrize("name", KERNELS)
def test_bad_kernel(elf: bytes, tmp_path: Path, name: str) -> None:
    make, text = KERNELS[name]
    (tmp_path / "kernel").write_bytes(make(elf))
    refuse(["--kernel", str(tmp_path / "kernel"), "--memory", "16M", "--net", "none"], 105, text)


@pytest.mark.parametrize(
    ("args", "code", "text"),
    [
        (["--kernel", "/nonexistent/vmlinux"], 105, "No such file or directory"),
        (["--kernel", "/etc"], 105, "is a directory"),
        (["--initrd", "/nonexistent/initrd"], 105, "No such file or directory"),
        (["--initrd", "/dev/zero"], 105, "not a regular file"),
        (["--append", "x" * 5000], 105, "this kernel takes only 4095"),
        (["--append", "a\nb"], 105, "command line has '\\n'"),
        (["--append", "gr\u00fcn"], 105, "printable ASCII"),
        (["--memory", "0"], 2, "guest memory of 0 bytes"),
        (["--memory", "many"], 2, "'many' is no size"),
        (["--memory", "-5"], 2, "'-5' is no size"),
        (["--memory", "1000001K"], 2, "multiple of 4096"),
        (["--memory", "900000G"], 2, "use 1M to 16T"),
        (["--cpus", "0"], 2, "--cpus 0"),
        (["--cpus", "256"], 2, "use 1 to 255"),
        (["--cpus", "two"], 2, "--cpus"),
        (["--timeout", "-1"], 2, "--timeout -1"),
        (["--timeout", "soon"], 2, "--timeout"),
        (["--report", "/nonexistent/report"], 2, "--report"),
        (["--net", "teleport"], 2, "unknown mode 'teleport'"),
        (["--net", "emulated,wings=1"], 2, "unknown key 'wings'"),
        (["--net", "emulated,mac=01:00:00:00:00:00"], 2, "no unicast MAC"),
        (["--net", "emulated,mtu=5"], 2, "mtu=5"),
        (["--net", "emulated,queue-size=100"], 2, "power of two"),
        (["--net", "emulated,tap=a name"], 2, "no interface name"),
        (["--init", "systemd"], 2, "--init systemd without --root"),
        (["--root", "/etc", "--init", "systemd"], 2, "/etc has no usr/lib/systemd/systemd"),
        (["--root", "/", "--init", "/etc/passwd"], 2, "/ has no such program"),
        (["--root", "/", "--init", "init"], 2, "use systemd, or an absolute path"),
        (["--no-such-option"], 2, "--no-such-option"),
    ],
    ids=lambda value: "_".join(value)[:40] if isinstance(value, list) else "",
)
def test_bad_option(guest: Guest, args: list[str], code: int, text: str) -> None:
    kernel = [] if "--kernel" in args else ["--kernel", guest("hello")]
    net = [] if "--net" in args else ["--net", "none"]
    refuse([*kernel, "--memory", "16M", *net, *args], code, text)


def test_initrd_larger_than_memory(guest: Guest, tmp_path: Path) -> None:
    (tmp_path / "initrd").touch()
    os.truncate(tmp_path / "initrd", 64 << 20)
    args = ["--kernel", guest("hello"), "--memory", "16M", "--net", "none"]
    refuse([*args, "--initrd", str(tmp_path / "initrd")], 105, "does not fit")


def test_host_short_of_memory(guest: Guest) -> None:
    limit = ["sh", "-c", 'ulimit -v 1000000; exec "$@"', "sh"]
    refuse(
        ["--kernel", guest("hello"), "--memory", "2G", "--net", "none"],
        109,
        "lower --memory",
        limit,
    )


def as_root(*commands: str) -> list[str]:
    """Run what follows in a mount namespace where these shell commands have been run."""
    if os.geteuid():
        pytest.skip("needs root to hide a device")
    return ["unshare", "--mount", "sh", "-ec", "; ".join([*commands, 'exec "$@"']), "sh"]


def test_no_kvm(guest: Guest) -> None:
    hide = as_root(
        "mkdir -p /run/pyvmm-dev",
        "mount -t tmpfs none /run/pyvmm-dev",
        "mount --move /run/pyvmm-dev /dev",
    )
    refuse(["--kernel", guest("hello"), "--net", "none"], 102, "/dev/kvm", hide)
    Path("/run/pyvmm-dev").rmdir()


def test_wrong_kvm(guest: Guest) -> None:
    refuse(
        ["--kernel", guest("hello"), "--net", "none"],
        104,
        "/dev/kvm",
        as_root("mount --bind /dev/null /dev/kvm"),
    )


def as_nobody() -> list[str]:
    """Run what follows as nobody."""
    if os.geteuid():
        pytest.skip("needs root to become somebody else")
    need_readable_checkout()
    return BECOME


def test_forbidden_kvm(guest: Guest) -> None:
    refuse(["--kernel", guest("hello"), "--net", "none"], 103, "/dev/kvm", as_nobody())


def test_busy_tap(guest: Guest) -> None:
    if os.geteuid():
        pytest.skip("needs root to make a tap")
    from pyvmm.hostnet.tap import Tap

    name = own_tap("busy")
    tap = Tap(name)
    try:
        refuse(
            ["--kernel", guest("hello"), "--net", f"emulated,tap={name}"],
            106,
            f"tap {name} is in use",
        )
    finally:
        tap.close()


def test_interface_that_is_no_tap(guest: Guest) -> None:
    refuse(["--kernel", guest("hello"), "--net", "emulated,tap=lo"], 106, "lo exists but is no tap")


@pytest.fixture
def devices_for_all() -> Iterator[list[str]]:
    """A prefix that runs a command where everyone may open /dev/kvm and /dev/net/tun: some machines
    keep them for root.
    """
    if os.geteuid():
        yield []
        return
    with tempfile.TemporaryDirectory() as directory:
        script = ""
        for device in ("/dev/kvm", "/dev/net/tun"):
            node = Path(directory) / device.rpartition("/")[2]
            os.mknod(node, 0o666 | stat.S_IFCHR, Path(device).stat().st_rdev)
            node.chmod(0o666)
            script += f"mount --bind {node} {device} && "
        yield ["unshare", "--mount", "sh", "-c", script + 'exec "$@"', "sh"]


def test_forbidden_tap(guest: Guest, devices_for_all: list[str]) -> None:
    prefix = [*devices_for_all, *as_nobody()]
    name = own_tap("none")
    refuse(["--kernel", guest("hello"), "--net", f"emulated,tap={name}"], 107, name, prefix)


def test_killed_machine_leaves_nothing(guest: Guest) -> None:
    """SIGKILL: the tap goes with the process, since nothing else holds it."""
    if os.geteuid():
        pytest.skip("needs root to make a tap")
    name = own_tap("kill")
    hang = ["--kernel", guest("reset"), "--append", "how=hang"]
    with spawn([*hang, "--net", f"emulated,tap={name}"]) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "reset: by hang\n"
        assert Path("/sys/class/net", name).exists()
        child.kill()
    assert child.returncode == -signal.SIGKILL
    assert wait_for(lambda: not Path("/sys/class/net", name).exists())


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 129)]
)
def test_signal_ends_it_within_a_second(guest: Guest, number: signal.Signals, status: int) -> None:
    """The best of three: the machine may be busy with other things."""
    took: list[float] = []
    while len(took) < 3 and min(took, default=9.0) >= 1:
        with spawn(["--kernel", guest("reset"), "--append", "how=hang", "--cpus", "2"]) as child:
            assert child.stdout is not None
            assert child.stdout.readline() == "reset: by hang\n"
            begin = time.monotonic()
            child.send_signal(number)
            assert child.wait(PATIENCE) == status
            took.append(time.monotonic() - begin)
    assert min(took) < 1, took


def test_killed_at_any_time(guest: Guest) -> None:
    """SIGTERM from the first millisecond on: always gone, always one of two statuses."""
    for delay in range(0, 200, 20):
        with spawn(["--kernel", guest("reset"), "--append", "how=hang"]) as child:
            time.sleep(delay / 1000)
            child.terminate()
            child.wait(PATIENCE)
            # Before Python has come to our handler, the default action ends the process.
            assert child.returncode in (143, -signal.SIGTERM), child.returncode


@pytest.mark.parametrize(
    ("how", "status"),
    [("acpi", 121), ("triple", 122), ("nowhere", 123), ("panic", 120), ("poweroff", 0)],
)
def test_exit_status_of_every_end(guest: Guest, how: str, status: int) -> None:
    with spawn(["--kernel", guest("reset"), "--net", "none", "--append", f"how={how}"]) as child:
        _, err = child.communicate(timeout=PATIENCE)
    assert child.returncode == status, err
    assert (status == 0) == (not err)


def test_time_out_status(guest: Guest) -> None:
    with spawn(
        ["--kernel", guest("reset"), "--append", "how=hang", "--net", "none", "--timeout", "0.5"]
    ) as child:
        _, err = child.communicate(timeout=PATIENCE)
    assert child.returncode == 124
    assert "did not end in time" in err
