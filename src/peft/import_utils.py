# SPDX-License-Identifier: Apache-2.0
"""Checks for optional libraries, without importing them."""

from __future__ import annotations

import re
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

import torch
from packaging.version import Version

_TRANSFORMERS = re.compile(r"is_transformers_(ge|le)_v?(\d+(?:_\d+)*)")


def __getattr__(name: str) -> bool:
    """Return a comparison with transformers' version: `is_transformers_ge_v5_4_0`, `…_le_4_53`."""
    asked = _TRANSFORMERS.fullmatch(name)
    if asked is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    present, wanted = _version("transformers"), Version(asked[2].replace("_", "."))
    return present is not None and (present >= wanted if asked[1] == "ge" else present <= wanted)


def is_bnb_available() -> bool:
    """Return True if bitsandbytes is installed."""
    return _is_installed("bitsandbytes")


def is_bnb_4bit_available() -> bool:
    """Return True if bitsandbytes is installed in a version with 4-bit layers."""
    present = _version("bitsandbytes")
    return is_bnb_available() and present is not None and present >= Version("0.39")


def is_torchao_available() -> bool:
    """Return True if torchao is installed."""
    return _is_installed("torchao")


def is_torchao_ge_v0_18_0() -> bool:
    """Return True if torchao is installed in version 0.18.0 or later."""
    present = _version("torchao")
    return is_torchao_available() and present is not None and present >= Version("0.18.0")


def is_quanto_available() -> bool:
    """Return True if quanto is installed, a part of optimum."""
    return is_optimum_available() and _is_installed("optimum.quanto")


def is_gptqmodel_available() -> bool:
    """Return True if gptqmodel is installed."""
    return _is_installed("gptqmodel")


def is_optimum_available() -> bool:
    """Return True if optimum is installed."""
    return _is_installed("optimum")


def is_aqlm_available() -> bool:
    """Return True if aqlm is installed."""
    return _is_installed("aqlm")


def is_eetq_available() -> bool:
    """Return True if eetq is installed."""
    return _is_installed("eetq")


def is_hqq_available() -> bool:
    """Return True if hqq is installed."""
    return _is_installed("hqq")


def is_inc_available() -> bool:
    """Return True if Intel's neural_compressor is installed."""
    return _is_installed("neural_compressor")


def is_te_available() -> bool:
    """Return True if transformer_engine is installed."""
    return _is_installed("transformer_engine")


def is_te_pytorch_available() -> bool:
    """Return True if transformer_engine is installed with its PyTorch modules."""
    return is_te_available() and _is_installed("transformer_engine.pytorch")


def is_diffusers_available() -> bool:
    """Return True if diffusers is installed."""
    return _is_installed("diffusers")


def is_xpu_available(check_device: bool = False) -> bool:
    """Return True if torch can use an Intel GPU.

    Args:
        check_device: Accepted for compatibility, without effect.
    """
    return torch.xpu.is_available()


def is_torch_tpu_available(check_device: bool = True) -> bool:
    """Return True if torch_xla is installed, with a device if asked.

    Args:
        check_device: Import it and require a device, too.
    """
    if not _is_installed("torch_xla") or not check_device:
        return _is_installed("torch_xla")
    try:
        import torch_xla.core.xla_model as xla

        return xla.xla_device() is not None
    except (ImportError, RuntimeError):
        return False


@cache
def _is_installed(name: str) -> bool:
    return find_spec(name) is not None


@cache
def _version(name: str) -> Version | None:
    try:
        return Version(version(name))
    except PackageNotFoundError:
        return None
