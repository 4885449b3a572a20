"""System calls that a signal interrupts, and what the host cannot give while the guest runs."""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from pyvmm._ext import lib
from pyvmm.boot import BootState
from pyvmm.bus import Bus
from pyvmm.errors import HostError
from pyvmm.kvm.ahead import Ahead
from pyvmm.kvm.vcpu import STOP_ERROR, Vcpu
from pyvmm.kvm.vm import Vm
from pyvmm.pci import gsi_of, line_of
from pyvmm.spec.platform import IRQ_COM1, IRQ_COM2, IRQ_GED, IRQ_SCI, PIC_PCI_LINES
from pyvmm.vcpus import abnormal

Guest = Callable[[str], str]
KVM_GET_IRQCHIP = 0xC208AE62  # linux/kvm.h: _IOWR(KVMIO, 0x62, struct kvm_irqchip)

#: Interrupts the first INTERRUPTIONS calls of each of KVM's and vhost's ioctls but KVM_RUN, or of
#: KVM's request number ONLY, and notes the requests in the file SEEN.
PRELOAD = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>

int ioctl(int fd, unsigned long request, ...)
{
	static int (*next)(int, unsigned long, void *);
	static int calls[2][256];
	va_list list;
	void *arg;

	va_start(list, request);
	arg = va_arg(list, void *);
	va_end(list);
	if (!next)
		next = (int (*)(int, unsigned long, void *))dlsym(RTLD_NEXT, "ioctl");
	unsigned int type = request >> 8 & 255, number = request & 255;
	if ((type == 0xae && number != 0x80) || type == 0xaf) {
		if (!calls[type & 1][number]) {
			FILE *f = fopen(getenv("SEEN"), "a");

			fprintf(f, "%x\n", (unsigned int)request);
			fclose(f);
		}
		const char *only = getenv("ONLY");

		if (only && number != (unsigned int)atoi(only))
			return next(fd, request, arg);
		if (calls[type & 1][number]++ < atoi(getenv("INTERRUPTIONS"))) {
			errno = EINTR;
			return -1;
		}
	}
	return next(fd, request, arg);
}
"""


@pytest.fixture(scope="module")
def preload(tmp_path_factory: pytest.TempPathFactory) -> str:
    where = tmp_path_factory.mktemp("preload")
    (where / "ioctl.c").write_text(PRELOAD)
    library = str(where / "ioctl.so")
    subprocess.run(
        ["gcc", "-shared", "-fPIC", "-o", library, where / "ioctl.c", "-ldl"], check=True
    )
    return library


def interrupted(
    preload: str, seen: Path, times: int, kernel: str, append: str = "", only: int | None = None
) -> subprocess.CompletedProcess[str]:
    # The library writes a file, which a confined process may not.
    argv = [sys.executable, "-m", "pyvmm", "run", "--host", "local", "--sandbox", "off"]
    argv += ["--qmp", "none"]
    env = {"LD_PRELOAD": preload, "SEEN": str(seen), "INTERRUPTIONS": str(times)}
    if only is not None:
        env["ONLY"] = str(only & 255)
    return subprocess.run(
        [*argv, "--kernel", kernel, "--net", "emulated", "--append", append],
        env=os.environ | env,
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize("irq", ["msix", "intx"])
def test_interrupted_ioctls_are_made_again(
    preload: str, guest: Guest, tmp_path: Path, irq: str
) -> None:
    """Each of KVM's, three times: KVM_CREATE_VM returns EINTR on busy hosts without a signal."""
    done = interrupted(preload, tmp_path / "seen", 3, guest("pcinet"), f"irq={irq}")
    assert (done.returncode, done.stderr) == (0, "")
    seen = {int(line, 16) for line in (tmp_path / "seen").read_text().split()}
    assert len(seen) > 15
    wanted = ["CREATE_VM", "CREATE_VCPU", "CREATE_PIT2", "IOEVENTFD", "REINJECT_CONTROL"]
    wanted.append("IRQFD" if irq == "msix" else "IRQ_LINE")
    assert {getattr(lib, f"KVM_{name}") & 0xFFFFFFFF for name in wanted} <= seen


def test_a_call_that_is_always_interrupted_fails(
    preload: str, guest: Guest, tmp_path: Path
) -> None:
    done = interrupted(preload, tmp_path / "seen", 1000, guest("hello"))
    assert done.returncode == 104 and "Interrupted system call" in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_call_of_a_thread_that_fails_ends_the_run(
    preload: str, guest: Guest, tmp_path: Path
) -> None:
    """The main thread makes the machine meanwhile, and starts no guest."""
    request = lib.KVM_REINJECT_CONTROL
    done = interrupted(preload, tmp_path / "seen", 1000, guest("hello"), only=request)
    assert done.returncode == HostError.exit_code and not done.stdout
    assert "KVM_REINJECT_CONTROL failed: Interrupted system call" in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_vm_that_no_machine_takes_is_released() -> None:
    """Also if KVM is still at work on it; see ``nothing_left_behind``."""
    with Ahead():
        pass


# --- the VM as firmware leaves it, and memory that is not there -----------------------------------


def test_each_slot_reaches_the_8259s_by_a_line_of_its_own(vm: Vm) -> None:
    """So nobody has to count who raises a line."""
    for slot in range(1, 9):
        vm.irq_line(gsi_of(slot), 1)
        high = 0
        for number in (0, 1):
            chip = bytearray(520)
            struct.pack_into("=I", chip, 0, number)
            fcntl.ioctl(vm.fileno(), KVM_GET_IRQCHIP, chip)
            high |= chip[8 + 1] << 8 * number
        vm.irq_line(gsi_of(slot), 0)
        assert high & ~(1 << 2) == 1 << line_of(slot)  # line 2 is the cascade
    assert not {line_of(slot) for slot in range(8)} & {0, 2, IRQ_COM1, IRQ_COM2, IRQ_GED, IRQ_SCI}


def test_both_8259s_are_masked(vm: Vm) -> None:
    """Also in the VM of a machine that starts over."""
    for _ in range(2):
        for number in (0, 1):
            chip = bytearray(520)
            struct.pack_into("=I", chip, 0, number)
            fcntl.ioctl(vm.fileno(), KVM_GET_IRQCHIP, chip)
            assert chip[8 + 2] == 0xFF  # struct kvm_pic_state: last_irr, irr, imr
            level = sum(1 << line for line in PIC_PCI_LINES)
            assert chip[8 + 14] == level >> 8 * number & 0xFF  # elcr: PCI's lines are levels
        vm.recreate()


def test_memory_that_the_host_cannot_give(vm: Vm) -> None:
    """KVM_RUN fails; newer kernels say at which address (KVM_EXIT_MEMORY_FAULT)."""
    bus = Bus()
    vcpu = Vcpu(vm, 0, 1, bus)
    vcpu.set_boot_state(BootState("protected32", "machine code", 0x1000, {}, 0))
    vm.memory.write(0x1000, b"\xa1\x00\x50\x00\x00" + b"\x0f\x0b")  # mov eax, [0x5000]; ud2
    libc = ctypes.CDLL(None, use_errno=True)
    page = ctypes.c_void_p(vm.memory.host_address(0x5000, 4096))
    assert libc.mprotect(page, mmap.PAGESIZE, 0) == 0
    stop = vcpu.run()
    outcome = abnormal(vcpu, stop)
    libc.mprotect(page, mmap.PAGESIZE, mmap.PROT_READ | mmap.PROT_WRITE)
    told = "the page of guest memory at 0x5000" if vcpu.c.info_count else "KVM does not say which"
    vcpu.close()
    bus.close()
    if stop != STOP_ERROR:
        pytest.skip("this KVM takes memory that it cannot get for a device's registers")
    assert outcome.kind == "kvm-error"
    assert "Bad address (the host cannot give" in outcome.detail and told in outcome.detail
