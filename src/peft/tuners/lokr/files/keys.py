# SPDX-License-Identifier: Apache-2.0
"""Keys of LoKr files: `<component>_<module path with _>.<tensor>` or
`<component>.<module path>.<tensor>`.
"""

from __future__ import annotations

from typing import NamedTuple

from ..shapes import FACTOR_NAMES

# Tensors of one value: `alpha` is the scale times the rank; some versions of LyCORIS train a
# `scalar` beside the factors.
NUMBERS = ("alpha", "scalar")
TENSORS = (*(f"lokr_{name}" for name in FACTOR_NAMES), *NUMBERS, "dora_scale")

# Components of a pipeline, before paths with `_` for dots. A longer one comes before its prefix.
_FLAT_COMPONENTS = (
    "lora_prior_unet", "lora_transformer", "lycoris_unet", "lora_unet", "lora_te1", "lora_te2",
    "lora_te3", "lora_te", "lycoris",
)  # fmt: skip
# The same, before paths with dots.
_DOTTED_COMPONENTS = (
    "unet.base_model.model", "base_model.model", "model.diffusion_model", "diffusion_model",
    "transformer", "unet", "text_encoders.clip_l.transformer", "text_encoders.clip_g.transformer",
    "text_encoders.t5xxl.transformer", "text_encoder_3", "text_encoder_2", "text_encoder",
    *_FLAT_COMPONENTS,
)  # fmt: skip


class Key(NamedTuple):
    """A key in its parts.

    Attributes:
        component: Prefix that tells the models of a pipeline apart ("lora_unet", "lora_te1");
            empty if there is none.
        name: The module's path, with dots or with `_` for dots.
        flat: True if `name` has `_` for dots.
        tensor: One of `TENSORS`.
    """

    component: str
    name: str
    flat: bool
    tensor: str


def split_key(key: str) -> Key | None:
    """Split a key into its parts; None if it belongs to no LoKr module.

    Example:
        >>> split_key("lora_unet_mid_block_attentions_0_proj_in.lokr_w1")
        Key(component='lora_unet', name='mid_block_attentions_0_proj_in', flat=True,
        tensor='lokr_w1')
        >>> split_key("diffusion_model.blocks.0.attn.qkv.alpha").name
        'blocks.0.attn.qkv'
    """
    stem, _, tensor = key.rpartition(".")
    if tensor not in TENSORS or not stem:
        return None
    return Key(*split_stem(stem), tensor)


def split_stem(stem: str) -> tuple[str, str, bool]:
    """Split a key of any method, without the tensor's name, into the component, the module's path,
    and True if the path has `_` for dots.
    """
    for component in _DOTTED_COMPONENTS:
        if stem.startswith(f"{component}."):
            return component, stem[len(component) + 1 :], False
    for component in _FLAT_COMPONENTS:
        if "." not in stem and stem.startswith(f"{component}_"):
            return component, stem[len(component) + 1 :], True
    return "", stem, False


def flattened(path: str) -> str:
    """Return a path with `_` for dots. Two paths may become one: `a.b_c` and `a_b.c`."""
    return path.replace(".", "_")


def join_key(component: str, path: str, flat: bool, tensor: str) -> str:
    """Return the key of a module's tensor; the inverse of `split_key` for paths.

    Example:
        >>> join_key("lycoris", "layers.0.to_q", flat=True, tensor="alpha")
        'lycoris_layers_0_to_q.alpha'
    """
    if not component:
        return f"{path}.{tensor}"
    return f"{component}_{flattened(path)}.{tensor}" if flat else f"{component}.{path}.{tensor}"
