# SPDX-License-Identifier: Apache-2.0
"""The documented place of `ParamWrapper`, LoRA's layer for parameters."""

from .lora.param_wrapper import ParamWrapper

__all__ = ["ParamWrapper"]
