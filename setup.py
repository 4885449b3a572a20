"""Builds the C extension; everything else is in pyproject.toml."""

from setuptools import setup

setup(
    cffi_modules=["cext/build.py:ffi"],
    # The extension keeps to the stable ABI: one wheel for every Python from 3.11 on.
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
