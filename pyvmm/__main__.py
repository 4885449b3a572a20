"""``python -m pyvmm``."""

import sys

try:
    from pyvmm.cli import main
except KeyboardInterrupt:
    sys.exit(130)

sys.exit(main())
