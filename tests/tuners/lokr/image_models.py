# SPDX-License-Identifier: Apache-2.0
"""Tiny image models of diffusers and their inputs, the same in every process."""

import torch


def unet(layers=1):
    import diffusers

    torch.manual_seed(1)
    return diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=layers,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=8,
        attention_head_dim=2,
        norm_num_groups=4,
    ).eval()


def unet_inputs():
    draw = torch.Generator().manual_seed(2)
    return {
        "sample": torch.randn(2, 4, 8, 8, generator=draw),
        "timestep": torch.tensor([3, 7]),
        "encoder_hidden_states": torch.randn(2, 5, 8, generator=draw),
    }


def flux():
    import diffusers

    torch.manual_seed(1)
    return diffusers.FluxTransformer2DModel(
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=8,
        pooled_projection_dim=8,
        axes_dims_rope=(4, 4, 8),
    ).eval()


def flux_inputs():
    draw = torch.Generator().manual_seed(2)
    return {
        "hidden_states": torch.randn(2, 6, 4, generator=draw),
        "encoder_hidden_states": torch.randn(2, 3, 8, generator=draw),
        "pooled_projections": torch.randn(2, 8, generator=draw),
        "timestep": torch.tensor([1.0, 2.0]),
        "img_ids": torch.zeros(6, 3),
        "txt_ids": torch.zeros(3, 3),
    }


def clip():
    import transformers

    torch.manual_seed(1)
    config = transformers.CLIPTextConfig(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=8,
    )
    return transformers.CLIPTextModel(config).eval()


def clip_inputs():
    return {"input_ids": torch.arange(3, 13).view(2, 5)}


MODELS = {"unet": (unet, unet_inputs), "flux": (flux, flux_inputs), "clip": (clip, clip_inputs)}


@torch.no_grad()
def output(model, kind):
    """A model's output for its inputs."""
    return model(**MODELS[kind][1]())[0]
