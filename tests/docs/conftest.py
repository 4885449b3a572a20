"""The blocks of the pages run where the boot tests do."""

from tests.boot.conftest import host, testbed

__all__ = ["host", "testbed"]
