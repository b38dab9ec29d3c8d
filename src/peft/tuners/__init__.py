# SPDX-License-Identifier: Apache-2.0
"""The methods. Each lives in a folder of its own; the line here that imports it also registers it and exports its names."""

from .lokr import LoKrConfig, LoKrModel
from .poly import PolyConfig, PolyModel
from .vblora import VBLoRAConfig, VBLoRAModel

__all__ = ["LoKrConfig", "LoKrModel", "PolyConfig", "PolyModel", "VBLoRAConfig", "VBLoRAModel"]
