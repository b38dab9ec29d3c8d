# SPDX-License-Identifier: Apache-2.0
"""Writes LoKr files with the real LyCORIS, and what the models give with them.

    python lycoris_worker.py FOLDER

FOLDER gets `<case>.safetensors` for each case and `outputs.pt`.
"""

import sys
import types
from pathlib import Path

import torch
from image_models import MODELS, output
from safetensors.torch import save_file

sys.modules.setdefault(
    "toml", types.ModuleType("toml")
)  # LyCORIS reads preset files with it, of which there are none here

CASES = {
    "unet": (
        "unet",
        {"linear_dim": 2, "linear_alpha": 3, "conv_dim": 1, "conv_alpha": 2, "factor": 2},
    ),
    "unet-full": (
        "unet",
        {
            "linear_dim": 10000,
            "linear_alpha": 1,
            "conv_dim": 10000,
            "conv_alpha": 1,
            "full_matrix": True,
            "factor": 2,
        },
    ),
    "unet-whole-by-rank": (
        "unet",
        {"linear_dim": 64, "linear_alpha": 1, "conv_dim": 64, "conv_alpha": 1},
    ),
    "unet-both": (
        "unet",
        {"linear_dim": 1, "linear_alpha": 1, "conv_dim": 1, "decompose_both": True},
    ),
    "unet-tucker": (
        "unet",
        {"linear_dim": 1, "linear_alpha": 1, "conv_dim": 1, "use_tucker": True},
    ),
    "unet-dora": ("unet", {"linear_dim": 1, "linear_alpha": 2, "conv_dim": 1, "dora_wd": True}),
    "unet-dora-in": (
        "unet",
        {"linear_dim": 1, "linear_alpha": 2, "conv_dim": 1, "dora_wd": True, "wd_on_output": False},
    ),
    "flux": ("flux", {"linear_dim": 3, "linear_alpha": 5, "factor": 4}),
    "flux-rs": (
        "flux",
        {
            "linear_dim": 2,
            "linear_alpha": 5,
            "rs_lora": True,
            "factor": 16,
            "unbalanced_factorization": True,
        },
    ),
    "flux-scalar": ("flux", {"linear_dim": 2, "linear_alpha": 2, "use_scalar": True}),
    "flux-defaults": ("flux", {}),
    "flux-unbalanced": (
        "flux",
        {
            "linear_dim": 4,
            "linear_alpha": 5.5,
            "decompose_both": True,
            "unbalanced_factorization": True,
        },
    ),
    "unet-defaults": ("unet", {"linear_dim": 1, "linear_alpha": 0}),
    "flux-preset": ("flux", {"linear_dim": 1, "linear_alpha": 2}),
    "kohya-unet": (
        "unet",
        {"lora_dim": 2, "alpha": 3, "conv_lora_dim": 1, "conv_alpha": 1, "factor": 2},
    ),
}


# Classes and names of modules that each model's cases adapt; and a preset with everything a preset
# can say.
TARGETS = {
    "unet": ["Transformer2DModel", "ResnetBlock2D", "Downsample2D", "Upsample2D"],
    "unet names": ["conv_in", "conv_out", "time_embedding.linear_1", "time_embedding.linear_2"],
    "flux": ["FluxTransformerBlock", "FluxSingleTransformerBlock"],
    "flux names": [],
}
PRESET = {
    "target_module": ["FluxSingleTransformerBlock"],
    "target_name": ["x_embedder"],
    "exclude_name": ["*proj_mlp"],
    "module_algo_map": {
        "FeedForward": {"factor": 2, "dim": 3},
        "AdaLayerNormZeroSingle": {"alpha": 7},
    },
    "name_algo_map": {"transformer_blocks.*.attn.to_?": {"dim": 2, "alpha": 3, "factor": 4}},
    "use_fnmatch": True,
}


def build(case, kind, options):
    """A model under LyCORIS and its network, with values."""
    from lycoris import create_lycoris, wrapper

    model = MODELS[kind][0]()
    preset = (
        PRESET
        if case.endswith("preset")
        else {"target_module": TARGETS[kind], "target_name": TARGETS[f"{kind} names"]}
    )
    if "rs_lora" in options:  # which `create_lycoris` drops
        wrapper.LycorisNetwork.apply_preset(preset)
        rest = {name: value for name, value in options.items() if not name.startswith("linear_")}
        names = {
            "lora_dim": options["linear_dim"],
            "alpha": options["linear_alpha"],
            "network_module": "lokr",
        }
        return model, wrapper.LycorisNetwork(model, warn_on_unmatched=False, **names, **rest)
    wrapper.PRESET["of the test"] = preset
    network = create_lycoris(
        model,
        1.0,
        algo="lokr",
        preset="of the test",
        bypass_mode=False,
        warn_on_unmatched=False,
        **options,
    )
    return model, network


def kohya(options):
    """A UNet and a text encoder in kohya's layout."""
    from lycoris.kohya import LycorisNetworkKohya

    unet, clip = MODELS["unet"][0](), MODELS["clip"][0]()
    LycorisNetworkKohya.apply_preset(
        {"unet_target_module": ["Transformer2DModel", "ResnetBlock2D"], "unet_target_name": []}
    )
    network = LycorisNetworkKohya(
        [clip], unet, network_module="lokr", warn_on_unmatched=False, **options
    )
    return unet, clip, network


def fill(network):
    torch.manual_seed(7)
    loras = (
        list(network.loras)
        if "loras" in vars(network) and network.loras
        else [*network.unet_loras, *network.text_encoder_loras]
    )
    for lora in loras:
        for name, parameter in lora.named_parameters():
            parameter.data = (
                torch.rand_like(parameter) * parameter.abs() + 0.5
                if name == "dora_scale"
                else torch.randn_like(parameter) * 0.4
            )
    return loras


def main():
    folder = Path(sys.argv[1])
    outputs = {}
    for case, (kind, options) in CASES.items():
        if case.startswith("kohya"):
            unet, clip, network = kohya(options)
            loras = fill(network)
            network.eval()
            for lora in loras:
                lora.apply_to()
                network.add_module(lora.lora_name, lora)
            outputs[case] = output(unet, "unet")
            outputs["kohya-clip"] = output(clip, "clip")
        else:
            model, network = build(case, kind, options)
            loras = fill(network)
            network.eval()
            network.apply_to()
            outputs[case] = output(model, kind)
        assert len(loras) > 4, case
        if case.endswith(
            "scalar"
        ):  # as versions before 2 wrote it: what is trained, each by itself
            named = {
                f"{lora.lora_name}.{name}": p.detach()
                for lora in loras
                for name, p in lora.named_parameters()
            }
            save_file(
                {**named, **{f"{lora.lora_name}.alpha": lora.alpha for lora in loras}},
                folder / "scalar-apart.safetensors",
            )
        network.save_weights(
            str(folder / f"{case}.safetensors"),
            None,
            {"ss_network_module": "lycoris.kohya"} if "kohya" in case else {},
        )
    torch.save(outputs, folder / "outputs.pt")


if __name__ == "__main__":
    main()
