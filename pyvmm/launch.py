"""``python -P launch.py MODULE ARGUMENT...``: runs a module, as ``python -m MODULE`` would, but
with the pyvmm to which this file belongs, and without looking into the current directory.

-P keeps both the current directory and this file's directory out of sys.path.
"""

import os
import sys


def main() -> None:
    """Run the module that the arguments name."""
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    sys.path.insert(0, root)
    import pyvmm

    assert pyvmm.__file__ is not None and pyvmm.__file__.startswith(f"{root}/")
    del sys.path[0]  # the package knows where its modules are
    from pyvmm.fd import open_standard_descriptors
    from pyvmm.programs import distrust_current_directory

    open_standard_descriptors()
    distrust_current_directory()
    import runpy

    del sys.argv[0]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
