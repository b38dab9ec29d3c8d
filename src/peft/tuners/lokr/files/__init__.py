# SPDX-License-Identifier: Apache-2.0
"""LoKr files and settings of other programs: LyCORIS, kohya's scripts, ComfyUI, ai-toolkit,
SimpleTuner, OneTrainer, diffusers.
"""

from .reading import LoKrFile, LoKrReport, inspect_lokr_file, load_lokr_file
from .settings import lokr_config_from_lycoris
from .writing import LAYOUTS, save_lokr_file

__all__ = [
    "LAYOUTS",
    "LoKrFile",
    "LoKrReport",
    "inspect_lokr_file",
    "load_lokr_file",
    "lokr_config_from_lycoris",
    "save_lokr_file",
]
