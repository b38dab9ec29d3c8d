# SPDX-License-Identifier: Apache-2.0
"""Kernels on the CPU: Triton interprets those that are imported here, where the rest of the session
runs without kernels.
"""

import importlib.util
import os
from unittest import mock

import pytest

from peft.ops import dispatch, triton_support

KERNELS = (
    "peft.ops.mixed_precision_triton",
    "peft.tuners.poly.gating_triton",
    "peft.tuners.poly.mixing_triton",
    "peft.tuners.vblora.bank_triton",
)

if importlib.util.find_spec("triton") is None:  # it is not built for every system
    collect_ignore_glob = ["test_interpreted*.py"]
else:
    with (
        mock.patch.dict(os.environ, TRITON_INTERPRET="1"),
        mock.patch.object(dispatch, "INTERPRETED", True),
    ):
        for name in KERNELS:
            importlib.import_module(name)


@pytest.fixture(scope="module")
def interpreter():
    """Have kernels run on the CPU, and forget afterwards that they did."""
    with (
        mock.patch.dict(os.environ, TRITON_INTERPRET="1"),
        mock.patch.object(dispatch, "INTERPRETED", True),
        mock.patch.dict(triton_support._TRIED, clear=True),
    ):
        triton_support.has_triton.cache_clear()
        yield
    triton_support.has_triton.cache_clear()
