# SPDX-License-Identifier: Apache-2.0
"""Names of the original implementations of Stable Diffusion (XL) and Flux for diffusers' modules.

Files of kohya's scripts and ComfyUI use them. The originals number a UNet's blocks through, and
have one layer (`qkv`) for three of diffusers.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator

# An original name, and the paths of the modules that it stands for.
Named = tuple[str, tuple[str, ...]]

_UNET = (
    ("input_blocks.0.0", "conv_in"),
    ("out.2", "conv_out"),
    ("time_embed.0", "time_embedding.linear_1"),
    ("time_embed.2", "time_embedding.linear_2"),
    ("label_emb.0.0", "add_embedding.linear_1"),
    ("label_emb.0.2", "add_embedding.linear_2"),
)
# Layers of a UNet's residual block: diffusers' name, the original's.
_RESNET = {
    "conv1": "in_layers.2",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}
# Layers of `double_blocks.<i>`, which is `transformer_blocks.<i>` in diffusers. diffusers' first
# and second version of Flux differ, so an original name may come twice.
_FLUX_DOUBLE = (
    ("img_attn.qkv", ("attn.to_q", "attn.to_k", "attn.to_v")),
    ("img_attn.qkv", ("attn.to_qkv",)),
    ("img_attn.proj", ("attn.to_out.0",)),
    ("img_mod.lin", ("norm1.linear",)),
    ("img_mlp.0", ("ff.net.0.proj",)),
    ("img_mlp.0", ("ff.linear_in",)),
    ("img_mlp.2", ("ff.net.2",)),
    ("img_mlp.2", ("ff.linear_out",)),
    ("txt_attn.qkv", ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj")),
    ("txt_attn.qkv", ("attn.to_added_qkv",)),
    ("txt_attn.proj", ("attn.to_add_out",)),
    ("txt_mod.lin", ("norm1_context.linear",)),
    ("txt_mlp.0", ("ff_context.net.0.proj",)),
    ("txt_mlp.0", ("ff_context.linear_in",)),
    ("txt_mlp.2", ("ff_context.net.2",)),
    ("txt_mlp.2", ("ff_context.linear_out",)),
)
# Layers of `single_blocks.<i>`, which is `single_transformer_blocks.<i>` in diffusers.
_FLUX_SINGLE = (
    ("linear1", ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")),
    ("linear1", ("attn.to_qkv_mlp_proj",)),
    ("linear2", ("proj_out",)),
    ("linear2", ("attn.to_out",)),
    ("modulation.lin", ("norm.linear",)),
)
_FLUX = (
    ("img_in", "x_embedder"),
    ("txt_in", "context_embedder"),
    ("final_layer.linear", "proj_out"),
    ("time_in.in_layer", "time_text_embed.timestep_embedder.linear_1"),
    ("time_in.out_layer", "time_text_embed.timestep_embedder.linear_2"),
    ("vector_in.in_layer", "time_text_embed.text_embedder.linear_1"),
    ("vector_in.out_layer", "time_text_embed.text_embedder.linear_2"),
    ("guidance_in.in_layer", "time_text_embed.guidance_embedder.linear_1"),
    ("guidance_in.out_layer", "time_text_embed.guidance_embedder.linear_2"),
    ("time_in.in_layer", "time_guidance_embed.timestep_embedder.linear_1"),
    ("time_in.out_layer", "time_guidance_embed.timestep_embedder.linear_2"),
    ("guidance_in.in_layer", "time_guidance_embed.guidance_embedder.linear_1"),
    ("guidance_in.out_layer", "time_guidance_embed.guidance_embedder.linear_2"),
    ("single_stream_modulation.lin", "single_stream_modulation.linear"),
    ("double_stream_modulation_img.lin", "double_stream_modulation_img.linear"),
    ("double_stream_modulation_txt.lin", "double_stream_modulation_txt.linear"),
)


def original_candidates(paths: Collection[str]) -> Iterator[Named]:
    """Yield every original name that could stand for modules of a model, present or not."""
    yield from _unet(paths)
    yield from _flux(paths)


def original_names(paths: Collection[str]) -> dict[str, tuple[str, ...]]:
    """Return the original names of a model's modules, with the paths that each stands for. A module
    has one name at most.

    Example:
        >>> original_names({"single_transformer_blocks.0.proj_out", "conv_in"})
        {'input_blocks.0.0': ('conv_in',), 'single_blocks.0.linear2':
        ('single_transformer_blocks.0.proj_out',)}
    """
    result: dict[str, tuple[str, ...]] = {}
    named: set[str] = set()
    for name, own in sorted(original_candidates(paths), key=lambda item: -len(item[1])):
        if set(paths).issuperset(own) and named.isdisjoint(own):
            named.update(own)
            result[name] = own
    return result


def _unet(paths: Collection[str]) -> Iterator[Named]:
    yield from ((name, (path,)) for name, path in _UNET)
    blocks = _unet_blocks(paths)
    for path in paths:
        match = re.match(r"\w+(\.\d+)?\.(resnets|attentions)\.\d+", path)
        block = match.group() if match else path
        if block in blocks:
            end = path[len(block) + 1 :]
            end = _RESNET.get(end, end)
            yield (f"{blocks[block]}.{end}" if end else blocks[block]), (path,)


def _unet_blocks(paths: Collection[str]) -> dict[str, str]:
    """Return the original names of a UNet's blocks, by diffusers' paths. The original counts a
    downsampler as a block, and has an upsampler inside the block before it.
    """
    blocks = {
        "mid_block.resnets.0": "middle_block.0",
        "mid_block.attentions.0": "middle_block.1",
        "mid_block.resnets.1": "middle_block.2",
    }
    number = 1  # input_blocks.0 is conv_in
    for i in range(_count(paths, r"down_blocks\.(\d+)\.")):
        for j in range(_count(paths, rf"down_blocks\.{i}\.resnets\.(\d+)\.")):
            blocks[f"down_blocks.{i}.resnets.{j}"] = f"input_blocks.{number}.0"
            blocks[f"down_blocks.{i}.attentions.{j}"] = f"input_blocks.{number}.1"
            number += 1
        blocks[f"down_blocks.{i}.downsamplers.0.conv"] = f"input_blocks.{number}.0.op"
        number += 1
    number = -1
    for i in range(_count(paths, r"up_blocks\.(\d+)\.")):
        for j in range(_count(paths, rf"up_blocks\.{i}\.resnets\.(\d+)\.")):
            number += 1
            blocks[f"up_blocks.{i}.resnets.{j}"] = f"output_blocks.{number}.0"
            blocks[f"up_blocks.{i}.attentions.{j}"] = f"output_blocks.{number}.1"
        attends = any(path.startswith(f"up_blocks.{i}.attentions.") for path in paths)
        position = 2 if attends else 1
        blocks[f"up_blocks.{i}.upsamplers.0.conv"] = f"output_blocks.{number}.{position}.conv"
    return blocks


def _flux(paths: Collection[str]) -> Iterator[Named]:
    for theirs, ours, layers in (
        ("double_blocks", "transformer_blocks", _FLUX_DOUBLE),
        ("single_blocks", "single_transformer_blocks", _FLUX_SINGLE),
    ):
        for i in range(_count(paths, rf"{ours}\.(\d+)\.")):
            for name, ends in layers:
                yield f"{theirs}.{i}.{name}", tuple(f"{ours}.{i}.{end}" for end in ends)
    yield from ((name, (path,)) for name, path in _FLUX)


def _count(paths: Collection[str], pattern: str) -> int:
    """Return one more than the largest number that a pattern finds in the paths."""
    return max((int(m.group(1)) + 1 for path in paths if (m := re.match(pattern, path))), default=0)
