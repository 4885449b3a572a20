#!/usr/bin/env python3
"""Runs `pyvmm run` for the kernel's selftests/hid/vmtest.sh (docs/kselftest.md).

The script calls boot2container's vm2c.py, which it looks for in its output directory. This program
takes the same options. Its guest has the root of the host instead of a container's.
"""

import argparse
import os
import sys

#: The commands of `vmtest.sh -s` and of `vmtest.sh -- bash`: a shell on the console.
SHELLS = {"/bin/sh", "/bin/bash", "bash"}


def main(words: list[str]) -> int:
    """Become `pyvmm run`, so that its status is the script's."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--command", required=True)
    parser.add_argument("--kernel", required=True)
    parser.add_argument("--workdir", required=True, help="where the guest writes its results")
    parser.add_argument("--image", help="a container's image, which is not used")
    args = parser.parse_args(words)
    # The command's directory is shared as well: with --root alone, what is in /tmp is not there.
    here, workdir = os.path.realpath("."), os.path.realpath(args.workdir)
    shares = [here] if os.path.commonpath([here, workdir]) == here else [here, workdir]
    argv = ["pyvmm", "run", "--kernel", args.kernel, "--root", "/"]
    argv += ["--net", "none", *(f"--share={directory}:rw" for directory in shares)]
    first, _, last = args.command.rpartition(";")
    if last.strip() in SHELLS:
        hint = f"; begin with: {first}" if first.strip() else ""
        print(f"vm2c.py: the shell is on the console{hint}", file=sys.stderr)
    else:
        argv += ["--", "bash", "-c", args.command]
    try:
        os.execvp(argv[0], argv)
    except OSError as e:
        problem = f"cannot run pyvmm: {e.strerror}; put its .venv/bin into PATH"
        print(f"vm2c.py: {problem}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
