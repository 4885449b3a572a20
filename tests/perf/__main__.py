"""``make bench``: the benchmark where KVM runs Linux, here or in the testbed."""

import os
import sys
from pathlib import Path

from pyvmm.cli.support.hostchoice import VDPA_KERNEL, VDPA_MODULES
from pyvmm.doctor import can_run_linux_locally
from pyvmm.errors import TestbedError
from pyvmm.testbed.testbed import Testbed

BENCH = Path(__file__).with_name("bench_share.py" if "--share" in sys.argv else "bench.py")


def main() -> int:
    root = str(BENCH.parents[2])
    os.environ["PYTHONPATH"] = root
    argv = [sys.executable, str(BENCH), *sys.argv[1:]]
    good, reason = can_run_linux_locally()
    if good:
        os.execv(sys.executable, argv)
    print(f"{reason}; running in the testbed", file=sys.stderr)
    vdpa = "--vdpa" in argv
    if vdpa:
        argv = ["sh", "-c", f'modprobe -a {VDPA_MODULES}; exec "$@"', "sh", *argv]
    try:
        return Testbed(kernel=VDPA_KERNEL if vdpa else None).run_attached(argv)
    except TestbedError as e:
        print(f"bench: {e}", file=sys.stderr)
        return e.exit_code


sys.exit(main())
