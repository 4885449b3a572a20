"""Ways to start a guest, what the ledger says against KVM's own count, and a tap of the user's."""

from __future__ import annotations

import signal
import struct
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from pyvmm.images import find
from tests.boot.guest import Guest, Run, exits_by_device, pings, run_all

if TYPE_CHECKING:
    from tests.boot.guest import Host

pytestmark = pytest.mark.usefixtures("nothing_left")

#: A note's header: size of the name, size of the description, type XEN_ELFNOTE_PHYS32_ENTRY
#: (include/xen/interface/elfnote.h).
PVH_NOTE = [struct.pack("<III4s", 4, size, 18, b"Xen") for size in (4, 8)]


def test_kernel_formats(host: Host, tmp_path: Path) -> None:
    """The same kernel as bzImage, by its PVH note, and by its 64-bit entry; every exit that came to
    us is one that KVM counted.
    """
    image = find("default")
    vmlinux = Path(image.kernel).read_bytes()
    note = next(n for n in PVH_NOTE if n in vmlinux)
    assert vmlinux.count(note) == 1
    plain = tmp_path / "vmlinux"
    plain.write_bytes(vmlinux.replace(note, note[:8] + struct.pack("<I", 0x7F) + note[12:]))
    kernels = {
        "bzImage": image.bzimage,
        "Linux ELF by PVH note": image.kernel,
        "Linux ELF by 64-bit entry": str(plain),
    }
    runs = run_all(
        host,
        {
            kind: [
                "--kernel",
                kernel,
                "--initrd",
                image.initrd,
                "--append",
                "quiet",
                "--",
                "sh",
                "-c",
                "echo up",
            ]
            for kind, kernel in kernels.items()
        },
    )
    for kind, run in runs.items():
        assert (run.status, run.out) == (0, "up\n"), run
        report = run.report
        assert report["boot"]["kind"].startswith(kind.split(" by ")[0]), report["boot"]
        assert ("PVH" in report["boot"]["kind"]) == ("PVH" in kind)
        kvm = report["kvm"]["vcpus"][0]
        reasons = report["exits"]["by_reason"]
        assert 0 < reasons["io"] <= kvm["io_exits"]
        assert 0 < reasons["mmio"] <= kvm["mmio_exits"]
        assert report["exits"]["kvm_run_returns"] < kvm["exits"]
        assert exits_by_device(report, "serial0") > 0


@pytest.mark.parametrize("mode", ["emulated", "vhost-net"])
def test_a_tap_of_the_users_and_sigkill(host: Host, mode: str) -> None:
    """It can be used again at once after pyvmm was killed, and is at the end what it was before."""
    look = (
        "ip -o -d link show dev boot0 | grep -oE 'mtu [0-9]+|ether [0-9a-f:]+|tun type.*vnet_hdr'; "
        "ip -o -4 addr show dev boot0"
    )
    args = ("--net", f"{mode},tap=boot0,guest=192.168.170.2/24")
    host.sh(
        "ip tuntap add dev boot0 mode tap vnet_hdr; ip addr add 192.168.170.1/24 dev boot0; "
        "ip link set boot0 up"
    )
    try:
        before = host.sh(look)
        with Guest(host, *args) as guest:
            guest.do(pings("192.168.170.1"))
            host.sh(f"kill -{int(signal.SIGKILL)} {guest.pid}")
            assert guest.wait() == 128 + signal.SIGKILL
        with Guest(host, *args) as guest:
            guest.do(pings("192.168.170.1"))
            guest.leave()
            assert guest.report["nets"][0]["tap"] == "boot0"
        assert host.sh(look) == before
    finally:
        host.sh("ip link del boot0")


@pytest.mark.parametrize("file", [False, True])
def test_huge_pages_by_advice(host: Host, file: bool) -> None:
    """The testbed gives shared memory huge pages where they are asked for, as we do for a guest's;
    also for what is read from a file, such as the kernel.
    """
    code = f"""
import tempfile
from pyvmm.memory import GuestMemory
memory = GuestMemory(64 << 20)
for at in range(0, memory.size, 2 << 20):
    memory.write(at, b"x") if not {file} else None
with tempfile.TemporaryFile() as f:
    f.truncate(memory.size)
    assert not {file} or memory.read_file(0, f.fileno(), 0, memory.size) == memory.size
lines = [line for line in open("/proc/self/smaps") if line.startswith("ShmemPmdMapped")]
print(sum(int(line.split()[1]) for line in lines))
"""
    run = host.run(sys.executable, "-c", code)
    assert run.status == 0, run
    assert int(run.stdout) == 64 << 10, run


def test_cpu(host: Host) -> None:
    """Linux sees the CPU that --cpu describes, and does without kvm-clock."""
    look = (
        "grep -m 3 -e ^vendor -e ^address -e '^flags.* sse4_2' /proc/cpuinfo;"
        " dmesg | grep -c -i kvm-clock"
    )
    cpu = "host,vendor=AuthenticAMD,phys-bits=36,-sse4_2,kvm=off"
    with Run(host, "--net", "none", "--cpu", cpu, "--", "sh", "-c", look) as run:
        run.wait()
    width = "address sizes\t: 36 bits physical, 48 bits virtual"
    assert run.out.splitlines() == ["vendor_id\t: AuthenticAMD", width, "0"], repr(run)
