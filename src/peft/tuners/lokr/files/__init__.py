# SPDX-License-Identifier: Apache-2.0
"""LoKr files of other programs: LyCORIS, kohya's scripts, ComfyUI, ai-toolkit, SimpleTuner, OneTrainer, diffusers."""

from .reading import LoKrFile, LoKrReport, inspect_lokr_file, load_lokr_file
from .writing import LAYOUTS, save_lokr_file

__all__ = ["LAYOUTS", "LoKrFile", "LoKrReport", "inspect_lokr_file", "load_lokr_file", "save_lokr_file"]
