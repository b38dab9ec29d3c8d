# SPDX-License-Identifier: Apache-2.0
"""The documented place of the base classes: `BaseTuner`, `BaseTunerLayer`."""

from ._holder import AdapterParameterDict
from ._layer import BaseTunerLayer
from ._tuner import BaseTuner

__all__ = ["AdapterParameterDict", "BaseTuner", "BaseTunerLayer"]
