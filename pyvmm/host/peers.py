"""QEMU and kvmtool, with which pyvmm is compared: the command that runs the same guest on them."""

from __future__ import annotations

from pyvmm.errors import HostError
from pyvmm.programs import which


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
        found = which(name)
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
