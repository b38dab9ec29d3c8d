# SPDX-License-Identifier: Apache-2.0
"""LoHa is not provided; client libraries import the name of its layer class."""

from .layer import LoHaLayer

__all__ = ["LoHaLayer"]
