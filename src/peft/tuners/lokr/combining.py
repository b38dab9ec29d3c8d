# SPDX-License-Identifier: Apache-2.0
"""Combine LoKr adapters: in each layer, the Kronecker product nearest to their weighted sum."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch.nn.functional as F

from ...base.errors import PeftValueError
from ...base.progress import track
from ...core.combining import Combination, Combined, check_same
from .config import LoKrConfig, layer_options, shapes_by_rule
from .layer import LoKrLayer
from .lowrank import nearest_product

# Fields that decide how the sizes of a layer are split.
_SPLIT = (
    "decompose_factor", "conv_factor", "factor_pattern", "unbalanced_factorization",
    "full_matrix", "kronecker_layout",
)  # fmt: skip


def combine(
    configs: Mapping[str, LoKrConfig], layers: Mapping[str, LoKrLayer], request: Combination
) -> Combined:
    """Return the combination; `W2` is full or has the rank `svd_rank`, by the config's rule."""
    check_same(configs, request, *_SPLIT)
    _check_products(configs, request)
    r = request.svd_rank or max(
        layer.r[name]
        for layer in layers.values()
        for name in request.adapters
        if name in layer.scaling
    )
    # The result has the scale 1 and a full W1 in every layer, and no Tucker form.
    config = replace(
        configs[request.adapters[0]],
        r=r,
        alpha=r,
        conv_r=None,
        conv_alpha=None,
        use_scalar=False,
        decompose_both=False,
        use_effective_conv2d=False,
        rank_pattern={},
        alpha_pattern={},
        use_rslora=False,
    )
    result = Combined(config)
    for path, layer in track(layers.items(), "Combining"):
        factor = layer_options(config, path, layer.geometry).factor
        shapes = shapes_by_rule(config, layer.geometry, r, factor)
        present = [(name, weight) for name, weight in request.terms() if name in layer.scaling]
        # A full `W2` of the result may have the order of elements of Hugging Face PEFT.
        flat = len(shapes.get("w2", ())) == 3 and config.kronecker_layout == "flat"
        if any(layer.flat_layout[name] != flat for name, _ in present):
            raise PeftValueError(
                f"`{path}`: adapters of `kronecker_layout` 'flat' can be combined only if `W2` is "
                "full in all of them and in the result; choose a larger `svd_rank`."
            )
        terms = [
            (weight * float(layer.scale(name)), layer.factors(name)) for name, weight in present
        ]
        nearest = nearest_product(terms, None if "w2" in shapes else r, layer.geometry.kernel_size)
        result.errors[path] = nearest.error
        result.tensors[f"{path}.lokr_w1"] = nearest.W1
        if "w2" in shapes:
            result.tensors[f"{path}.lokr_w2"] = (nearest.W2_a @ nearest.W2_b).view(shapes["w2"])
        else:
            # `W2` has fewer singular values than `r` if a side is smaller.
            missing = r - nearest.W2_a.shape[1]
            result.tensors[f"{path}.lokr_w2_a"] = F.pad(nearest.W2_a, (0, missing))
            result.tensors[f"{path}.lokr_w2_b"] = F.pad(nearest.W2_b, (0, 0, 0, missing))
    return result


def _check_products(configs: Mapping[str, LoKrConfig], request: Combination) -> None:
    """Check that each adapter's delta is one Kronecker product in every layer, split by a rule."""
    for name in request.adapters:
        for field in ("weight_decompose", "tensor_shapes", "row_offsets"):
            if getattr(configs[name], field):
                raise PeftValueError(
                    f"Adapter {name} has `{field}`; such adapters can't be combined. Convert them "
                    "to LoRA first."
                )
