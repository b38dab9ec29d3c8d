# SPDX-License-Identifier: Apache-2.0
"""How writers of LoKr files name tensors: `<component>_<module path with _>.<tensor>` or
`<component>.<module path>.<tensor>`.
"""

from __future__ import annotations

from typing import NamedTuple

from ..kronecker import KroneckerFactors

FACTORS = tuple(f"lokr_{name}" for name in KroneckerFactors._fields)
# Of one value each: the scale times the rank, and what some versions of LyCORIS train beside the
# factors.
NUMBERS = ("alpha", "scalar")
TENSORS = (*FACTORS, *NUMBERS, "dora_scale")

# What stands before a module's path with `_` for dots: the part of a pipeline that it is in. Longer
# ones first.
_FLAT = (
    "lora_prior_unet",
    "lora_transformer",
    "lycoris_unet",
    "lora_unet",
    "lora_te1",
    "lora_te2",
    "lora_te3",
    "lora_te",
    "lycoris",
)
# The same before a path with dots.
_DOTTED = (
    "unet.base_model.model",
    "base_model.model",
    "model.diffusion_model",
    "diffusion_model",
    "transformer",
    "unet",
    "text_encoders.clip_l.transformer",
    "text_encoders.clip_g.transformer",
    "text_encoders.t5xxl.transformer",
    "text_encoder_3",
    "text_encoder_2",
    "text_encoder",
    *_FLAT,
)


class Key(NamedTuple):
    """A key, taken apart.

    Attributes:
        component: What its writer put before the module's path, which tells the parts of a pipeline
            apart; empty for nothing.
        name: The module's path, with dots or with `_` in their place.
        flat: Which of the two.
        tensor: One of `TENSORS`.
    """

    component: str
    name: str
    flat: bool
    tensor: str


def split_key(key: str) -> Key | None:
    """Take a key apart; None for one that is of no LoKr module.

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
    for component in _DOTTED:
        if stem.startswith(f"{component}."):
            return Key(component, stem[len(component) + 1 :], False, tensor)
    for component in _FLAT:
        if "." not in stem and stem.startswith(f"{component}_"):
            return Key(component, stem[len(component) + 1 :], True, tensor)
    return Key("", stem, False, tensor)


def flattened(path: str) -> str:
    """A module's path as flat layouts write it, which does not tell all paths apart."""
    return path.replace(".", "_")


def join_key(component: str, path: str, flat: bool, tensor: str) -> str:
    """The key of a module's tensor, the inverse of `split_key` on paths.

    Example:
        >>> join_key("lycoris", "layers.0.to_q", True, "alpha"), join_key("", "to_q", False, "alpha")
        ('lycoris_layers_0_to_q.alpha', 'to_q.alpha')
    """
    if not component:
        return f"{path}.{tensor}"
    return f"{component}_{flattened(path)}.{tensor}" if flat else f"{component}.{path}.{tensor}"
