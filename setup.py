"""Builds the C extension, fills ``pyvmm/share`` of the package, and adds man pages and completions
of shells to the wheel; everything else is in pyproject.toml.
"""

import sys
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

sys.path.insert(0, str(Path(__file__).parent))

from pyvmm.images import sources
from tools.site import man

#: Where shells look for completions, below an installation's prefix -> the file.
COMPLETIONS = {
    "share/bash-completion/completions": "tools/completions/pyvmm",
    "share/zsh/site-functions": "tools/completions/_pyvmm",
    "share/fish/vendor_completions.d": "tools/completions/pyvmm.fish",
}


class BuildWithShare(build_py):
    """Also packs what guest images are made of, the man pages and the completions."""

    def run(self) -> None:
        """Build the modules, then the directory."""
        super().run()
        if not self.editable_mode:
            sources.fill(Path(self.build_lib, "pyvmm", "share"))
            pages = man.write(Path(self.build_lib).parent / "man")
            self.distribution.data_files = [
                ("share/man/man1", [str(page) for page in pages]),
                *((where, [file]) for where, file in COMPLETIONS.items()),
            ]

    def get_outputs(self, include_bytecode: bool = True) -> list[str]:
        """All files, those of the directory among them."""
        share = Path(self.build_lib, "pyvmm", "share")
        more = [str(path) for path in sorted(share.rglob("*")) if path.is_file()]
        return [*super().get_outputs(include_bytecode), *more]


setup(
    cffi_modules=["cext/build.py:ffi"],
    cmdclass={"build_py": BuildWithShare},
    # The extension keeps to the stable ABI: one wheel for every Python from 3.11 on.
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
