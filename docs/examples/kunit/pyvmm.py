"""For kunit.py's ``--qemu_config``: run the tests by pyvmm instead of QEMU (docs/kunit.md).

kunit.py runs ``qemu-system-`` and the name below, which it looks up in PATH: here, the program
beside this file.
"""

import os
from pathlib import Path

from qemu_config import QemuArchParams  # kunit.py's, beside which this module runs

os.environ["PATH"] = f"{Path(__file__).resolve().parent}:{os.environ['PATH']}"

QEMU_ARCH = QemuArchParams(
    linux_arch="x86_64",
    kconfig="""
CONFIG_PCI=y
CONFIG_SERIAL_8250=y
CONFIG_SERIAL_8250_CONSOLE=y
CONFIG_ACPI=y""",
    qemu_arch="pyvmm",
    kernel_path="arch/x86/boot/bzImage",
    kernel_command_line="console=ttyS0 kunit_shutdown=poweroff",
    extra_qemu_params=[],
)
