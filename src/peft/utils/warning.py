# SPDX-License-Identifier: Apache-2.0
"""The documented place of `PeftWarning`."""

from .error import PeftWarning

__all__ = ["PeftWarning"]
