"""Compiling for a TPU in the tests."""

import importlib.util

import pytest

# The TPU's compiler is in the test extra where there is one: x86-64 Linux.
needs_compiler = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="no TPU compiler for this system"
)
