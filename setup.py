"""Builds the C extension; everything else is in pyproject.toml."""

from setuptools import setup

setup(cffi_modules=["cext/build.py:ffi"])
