"""The C interface as Python sees it. cffi finds a wrong declaration only when it is first used, so
the tests use every declaration once.
"""

import ctypes
import os
import re
import subprocess
from pathlib import Path

import pytest

from pyvmm._ext import ffi, lib

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def cdef() -> str:
    """All declarations from which the module was built, without comments."""
    from cext.build import declarations

    text = (ROOT / "cext" / "kernel.cdef").read_text()
    for header in sorted((ROOT / "cext").glob("*.h")):
        text += declarations(header.read_text())
    return re.sub(r"/\*.*?\*/|//[^\n]*", "", text, flags=re.DOTALL)


def structs(cdef: str) -> list[str]:
    """The names of all structs that are declared with a body."""
    return re.findall(r"^struct (\w+) \{", cdef, re.MULTILINE)


def test_every_struct_has_the_compiler_s_size(cdef: str) -> None:
    names = structs(cdef)
    assert len(names) > 25
    for name in names:
        assert ffi.sizeof(f"struct {name}") > 0, name
        for _field, type_ in ffi.typeof(f"struct {name}").fields:
            assert type_.offset >= 0


def test_every_constant_and_function_is_there(cdef: str) -> None:
    constants = re.findall(r"^#define (\w+)", cdef, re.MULTILINE)
    enums = [
        m.split("=")[0].strip()
        for body in re.findall(r"enum \w+ \{(.*?)\}", cdef, re.DOTALL)
        for m in body.split(",")
    ]
    functions = re.findall(r"^(?:[\w ]+[ *])(\w+)\(", cdef, re.MULTILINE)
    names = constants + [e for e in enums if e] + functions
    assert len(constants) > 80 and len(enums) > 30 and len(functions) > 40
    assert {"pv_bus_add", "pv_vcpu_run", "pv_net_worker_start", "unshare"} <= set(functions)
    for name in names:
        getattr(lib, name)
    known = {n for n in dir(lib) if not n.startswith("__")}
    assert set(names) == known  # the patterns above have missed nothing


def test_flexible_structs_can_be_made() -> None:
    for name in ("kvm_cpuid2", "kvm_msrs", "kvm_irq_routing"):
        short, long = (ffi.new(f"struct {name} *", {"entries": n}) for n in (1, 3))
        assert len(ffi.buffer(long)) == len(ffi.buffer(short)) + 2 * ffi.sizeof(short.entries[0])


KERNEL = [
    "kvm_userspace_memory_region",
    "kvm_regs",
    "kvm_sregs",
    "kvm_irqfd",
    "kvm_ioeventfd",
    "kvm_irq_level",
    "kvm_irq_routing_entry",
    "kvm_cpuid_entry2",
    "kvm_msr_entry",
    "kvm_pit_config",
    "kvm_stats_desc",
]


def test_kernel_structs_and_requests_against_the_headers(tmp_path: Path) -> None:
    """A separate run of the compiler, which knows nothing of cffi, has the truth."""
    requests = [
        n for n in dir(lib) if n.startswith("KVM_") and not n.startswith(("KVM_CAP", "KVM_EXIT"))
    ]
    lines = ["#include <stdio.h>", "#include <linux/kvm.h>", "int main(void) {"]
    lines += [f'printf("{n} %zu\\n", sizeof(struct {n}));' for n in KERNEL]
    lines += [f'printf("{n} %llu\\n", (unsigned long long)({n}));' for n in requests]
    (tmp_path / "k.c").write_text("\n".join([*lines, "return 0; }"]))
    subprocess.run(["gcc", "-o", tmp_path / "k", tmp_path / "k.c"], check=True)
    out = subprocess.run([tmp_path / "k"], check=True, capture_output=True, text=True).stdout
    kernel = {name: int(value) for name, value in (line.split() for line in out.splitlines())}
    assert len(requests) > 30
    ours = {n: ffi.sizeof(f"struct {n}") for n in KERNEL} | {n: getattr(lib, n) for n in requests}
    assert {n: (v, kernel[n]) for n, v in ours.items() if v != kernel[n]} == {}


def test_the_module_is_abi3_and_hides_its_insides() -> None:
    import pyvmm._ext

    path = pyvmm._ext.__file__  # type: ignore[attr-defined]  # nothing is known of _ext
    assert ".abi3." in os.path.basename(path)  # noqa: PTH119
    so = ctypes.CDLL(path)
    assert not hasattr(so, "pv_bus_find")
