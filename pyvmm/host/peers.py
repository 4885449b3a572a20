"""QEMU and kvmtool, with which pyvmm is compared: finds them, and makes the command that runs the
same guest on them.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from pyvmm.errors import HostError
from pyvmm.host.paths import cache_root

#: The files and directories of unpacked QEMU packages that are needed to run QEMU.
QEMU_PARTS = ("usr/bin/qemu-system-x86_64", "usr/share/qemu", "usr/share/seabios")


def qemu_root() -> str | None:
    """The directory of the newest QEMU that ``pyvmm testbed setup`` has unpacked, or None. It holds
    no shared libraries: those come with the installed QEMU.
    """
    found = sorted(Path(cache_root(), "testbed", "qemu").glob("*"), key=_version, reverse=True)
    return str(found[0]) if found else None


def _version(path: Path) -> list[int]:
    return [int(part) for part in path.name.split(".") if part.isdecimal()]


def qemu(root: str | None) -> list[str]:
    """The command that starts the QEMU unpacked at ``root``, or, if ``root`` is None, the installed
    QEMU.

    :raises HostError: no QEMU is installed.
    """
    if root:
        share = f"{root}/usr/share"
        return [
            f"{root}/usr/bin/qemu-system-x86_64",
            *("-L", f"{share}/qemu", "-L", f"{share}/seabios", "-L", "/usr/share/qemu"),
        ]
    found = shutil.which("qemu-system-x86_64")
    if found is None:
        raise HostError("QEMU is not installed here", "install qemu-system-x86")
    return [found]


def qemu_guest(
    program: list[str], *, kernel: str, initrd: str | None, cmdline: str, cpus: int, memory: str
) -> list[str]:
    """The part of a QEMU command that all machine types share. The serial console is on stdio."""
    return [
        *program,
        # Threads get names such as "CPU 0/KVM", by which a vCPU's thread can be found.
        *("-name", "guest,debug-threads=on"),
        *(
            "-nodefaults",
            "-no-user-config",
            "-display",
            "none",
            "-no-reboot",
            "-cpu",
            "host",
            "-enable-kvm",
        ),
        *("-smp", str(cpus), "-m", memory),
        *("-object", f"memory-backend-memfd,id=ram,size={memory},share=on"),
        *("-kernel", kernel, *(("-initrd", initrd) if initrd else ()), "-append", cmdline),
        *("-serial", "stdio"),
    ]


def qemu_card(tap: str, mac: str, *, vhost: bool) -> list[str]:
    """The arguments for a q35 machine with a virtio-net card on ``tap``."""
    return [
        *("-M", "q35,memory-backend=ram", "-device", f"virtio-net-pci,netdev=n,mac={mac},romfile="),
        *(
            "-netdev",
            f"tap,id=n,ifname={tap},script=no,downscript=no,vhost={'on' if vhost else 'off'}",
        ),
    ]


def kvmtool() -> list[str]:
    """The command that starts kvmtool.

    :raises HostError: kvmtool is not installed.
    """
    for name in ("lkvm", "kvmtool"):
        found = shutil.which(name)
        if found:
            return [found]
    raise HostError(
        "kvmtool is not installed here",
        "Debian has no package of it: build it, and put lkvm into the PATH",
    )


def kvmtool_guest(
    program: list[str],
    *,
    kernel: str,
    initrd: str | None,
    cmdline: str,
    cpus: int,
    memory_mib: int,
    tap: str,
    mac: str,
) -> list[str]:
    """The whole command of a kvmtool guest, with its serial console on stdio.

    :param kernel: the path of a bzImage; kvmtool loads no ELF.
    """
    return [
        *program,
        *(
            "run",
            "--kernel",
            kernel,
            *(("--initrd", initrd) if initrd else ()),
            "--params",
            cmdline,
        ),
        *("--cpus", str(cpus), "--mem", str(memory_mib), "--console", "serial"),
        *("--network", f"mode=tap,tapif={tap},guest_mac={mac}"),
    ]
