# SPDX-License-Identifier: Apache-2.0
"""Warnings of the package, at their documented place."""

from ..base.errors import PeftWarning

__all__ = ["PeftWarning"]
