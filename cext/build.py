"""Build recipe of the C extension ``pyvmm._ext`` (cffi, API mode, stable ABI).

The declarations that Python sees are the text between the markers ``/* cffi: begin */`` and ``/*
cffi: end */`` of each header, so there is no second copy that could drift. The kernel's constants
and structs are declared in ``cext/kernel.cdef`` with ``...``: the C compiler fills in the values
from the installed headers.

Environment: ``PYVMM_SANITIZE=1`` builds with ASan and UBSan.
"""

import os
import re
from pathlib import Path

from cffi import FFI

HERE = Path(__file__).resolve().parent
WARNINGS = ["-Wall", "-Wextra", "-Wshadow", "-Wvla", "-Wconversion", "-Werror"]
# What cffi generates is not ours to keep free of these.
GENERATED = [
    "-Wno-sign-conversion",
    "-Wno-conversion",
    "-Wno-unused-parameter",
    "-Wno-missing-field-initializers",
    "-Wno-shadow",
]
SANITIZE = [
    "-fsanitize=address,undefined",
    "-fno-sanitize-recover=undefined",
    "-fno-omit-frame-pointer",
]


def declarations(header: str) -> str:
    """The text of ``header`` between its cffi markers; empty where it has none."""
    parts = re.findall(r"/\* cffi: begin \*/(.*?)/\* cffi: end \*/", header, re.DOTALL)
    return "\n".join(parts)


def make_ffi() -> FFI:
    """The cffi builder: one module from all of ``cext``."""
    builder = FFI()
    headers = sorted(HERE.glob("*.h"))
    # These first: the others use their names.
    first = ("trace.h", "vring.h", "capture.h")
    headers.sort(key=lambda p: (p.name != "types.h", p.name not in first))
    builder.cdef((HERE / "kernel.cdef").read_text())
    for path in headers:
        builder.cdef(declarations(path.read_text()))
    sanitize = SANITIZE if os.environ.get("PYVMM_SANITIZE") == "1" else []
    include = "".join(f'#include "{path.name}"\n' for path in headers)
    # Our sources are one translation unit each, compiled with all warnings by `make lint` and the
    # unit build below; the generated file is exempt from the conversion warnings only.
    builder.set_source(
        "pyvmm._ext",
        (HERE / "kernel.h.in").read_text() + include,
        sources=[os.path.relpath(path, HERE.parent) for path in sorted(HERE.glob("*.c"))],
        include_dirs=["cext"],
        extra_compile_args=[
            "-std=gnu11",
            "-U_GNU_SOURCE",
            "-D_GNU_SOURCE",
            "-O2",
            "-g",
            "-fvisibility=hidden",
            *WARNINGS,
            *GENERATED,
            *sanitize,
        ],
        # A confined thread must not look up a symbol at its first use: if another thread loads a
        # library meanwhile, that is a call of futex(2).
        extra_link_args=["-pthread", "-Wl,-z,now", *sanitize],
        depends=[os.path.relpath(p, HERE.parent) for p in headers],
        py_limited_api=True,
    )
    return builder


ffi = make_ffi()

if __name__ == "__main__":
    os.chdir(HERE.parent)
    ffi.compile(verbose=True)
