"""``make bench``: the benchmark where KVM runs Linux, here or in the testbed."""

import os
import sys
from pathlib import Path

from pyvmm.doctor import can_run_linux_locally
from pyvmm.testbed.testbed import Testbed

BENCH = Path(__file__).with_name("bench.py")


def main() -> int:
    root = str(BENCH.parents[2])
    os.environ["PYTHONPATH"] = root
    argv = [sys.executable, str(BENCH), *sys.argv[1:]]
    good, reason = can_run_linux_locally()
    if good:
        os.execv(sys.executable, argv)
    print(f"{reason}; running in the testbed", file=sys.stderr)
    return Testbed().run_attached(argv)


sys.exit(main())
