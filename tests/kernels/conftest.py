# SPDX-License-Identifier: Apache-2.0
"""Kernels on the CPU: Triton interprets those that are imported here, where the rest of the session runs without kernels."""

import importlib.util
import os
from unittest import mock

import pytest

from peft.tuners import _kernels

KERNELS = ("peft.tuners.kernels", "peft.tuners.poly.kernels", "peft.tuners.poly.mixing_kernels", "peft.tuners.vblora.kernels")

if importlib.util.find_spec("triton") is None:  # it is not built for every system
    collect_ignore_glob = ["test_interpreted*.py"]
else:
    with mock.patch.dict(os.environ, TRITON_INTERPRET="1"), mock.patch.object(_kernels, "INTERPRETED", True):
        for name in KERNELS:
            importlib.import_module(name)


@pytest.fixture(scope="module")
def interpreter():
    """Have kernels run on the CPU, and forget afterwards that they did."""
    with (
        mock.patch.dict(os.environ, TRITON_INTERPRET="1"),
        mock.patch.object(_kernels, "INTERPRETED", True),
        mock.patch.dict(_kernels._TRIED, clear=True),
    ):
        _kernels.has_triton.cache_clear()
        yield
    _kernels.has_triton.cache_clear()
