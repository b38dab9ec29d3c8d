# SPDX-License-Identifier: Apache-2.0
"""LoKr files of other programs: LyCORIS, kohya's scripts, ComfyUI, ai-toolkit, SimpleTuner,
OneTrainer, diffusers.

From a file to an adapter, each file of this folder takes a step:

    keys              "lora_unet_mid_block_proj.lokr_w1" → component, module name, tensor
    file_module       the tensors of one module name → factors, rank, scale
    reading           a file → its modules and its writer
    module_names      a module name → paths in the model (original_names: Stable Diffusion, Flux)
    fused_layers      a layer of the file that is several in the model, or the opposite
    placement         modules of the file → layers of the model, and a `LoKrConfig` for them
    loading           inspect a file, load it into a model

`writing` turns an adapter into a file. `lycoris_settings` turns LyCORIS's settings into a config.
"""

from .loading import LoKrReport, inspect_lokr_file, load_lokr_file, read_lokr_adapter
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
    "read_lokr_adapter",
    "save_lokr_file",
]
