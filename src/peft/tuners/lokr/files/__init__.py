# SPDX-License-Identifier: Apache-2.0
"""LoKr files of other programs: LyCORIS, kohya's scripts, ComfyUI, ai-toolkit, SimpleTuner,
OneTrainer, diffusers.

Read a file:

    keys              "lora_unet_mid_block_proj.lokr_w1" → component, module name, tensor
    file_module       the tensors of one name → factors, rank, scale
    module_names      the name → paths in the model (original_names: Stable Diffusion, Flux)
    fused_layers      one layer in the file, several in the model, and the other way round
    placement         modules of the file → layers of the model, and a `LoKrConfig` of these
    loading           inspect a file, load it into a model

`writing` takes the same road back. `lycoris_settings` turns LyCORIS's settings into a config.
"""

from .loading import LoKrReport, inspect_lokr_file, load_lokr_file
from .lycoris_settings import lokr_config_from_lycoris
from .reading import LoKrFile
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
