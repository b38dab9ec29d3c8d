# SPDX-License-Identifier: Apache-2.0
"""How transformers finds an adapter's tensors when it loads a checkpoint into a model of its own.

It reads weights by rules that rename the keys of a checkpoint, one after another, into names of the
model's parameters.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ..base.errors import PeftRuntimeError
from ..base.registry import PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING, lookup
from .state_dict import MODEL_ROOT, ROOT


def build_peft_weight_mapping(
    weight_conversions: Sequence[Any] | None, adapter_name: str, peft_config: Any = None
) -> list[Any]:
    """Rules for an adapter's checkpoint, followed by those of the model.

    A key loses what stands for the `PeftModel` in it and gains the adapter's name:
    `base_model.model.model.layers.0.q.lokr_w1` is `model.layers.0.q.lokr_w1.default` in the model.
    What all layers of an adapter share is at the model's root.

    Args:
        weight_conversions: The model's own rules, for checkpoints of its earlier versions.
        adapter_name: The adapter.
        peft_config: Its config; None makes rules for every method.

    Returns:
        `WeightRenaming`s, `WeightConverter`s for what is saved in another form, and
        `weight_conversions`; empty if that is.

    Raises:
        PeftValueError: The config's method is not provided.

    Example:
        >>> build_peft_weight_mapping(None, "default")
        []
    """
    if not weight_conversions:
        return []
    from transformers.core_model_loading import WeightRenaming

    methods = list(PEFT_TYPE_TO_TUNER_MAPPING) if peft_config is None else [peft_config.peft_type]
    shared = [
        name
        for method in methods
        for name in lookup(PEFT_TYPE_TO_TUNER_MAPPING, method).shared_parameter_names
    ]
    bare = {
        name: p
        for method in methods
        for name, p in lookup(PEFT_TYPE_TO_TUNER_MAPPING, method).saved_bare.items()
    }
    prefixes = sorted({lookup(PEFT_TYPE_TO_PREFIX_MAPPING, method) for method in methods})
    alone = "" if len(prefixes) == 1 else r"(?<!\w)"  # one method's prefix may be inside another's
    return [
        WeightRenaming(f"{MODEL_ROOT}model.", "model."),
        WeightRenaming(MODEL_ROOT, ""),
        *(WeightRenaming(f"{ROOT}{name}", name) for name in shared),
        *(
            WeightRenaming(rf"({alone}{prefix}[^\.]*)", rf"\1.{adapter_name}")
            for prefix in prefixes
        ),
        *(
            WeightRenaming(rf"({name}\.{adapter_name})$", rf"\1.{parameter}")
            for name, parameter in bare.items()
        ),
        *([] if peft_config is None else _converters(adapter_name, peft_config)),
        *weight_conversions,
    ]


def _converters(adapter_name: str, config: Any) -> list[Any]:
    """Rules for tensors that are saved in another form than the model has them."""
    from transformers.core_model_loading import ConversionOps, WeightConverter

    tuner = lookup(PEFT_TYPE_TO_TUNER_MAPPING, config.peft_type)

    class Import(ConversionOps):
        """One of an adapter's tensors, made from those that a checkpoint has for it."""

        def __init__(self, name: str, parts: Mapping[str, torch.dtype]) -> None:
            self.name, self.parts = name, parts

        def convert(self, input_dict: dict[str, Any], *args: Any, **kwargs: Any) -> dict[str, Any]:
            if not config.inference_mode:
                raise PeftRuntimeError(
                    f"The checkpoint has `{self.name}` in a form that can't be trained; load it "
                    "for inference."
                )
            saved = {
                part: input_dict[f"{part}.{adapter_name}"]
                for part in self.parts
                if f"{part}.{adapter_name}" in input_dict
            }
            # They were read in the dtype of the tensor they are for.
            state = {
                part: (t[0] if isinstance(t, list) else t).to(self.parts[part])
                for part, t in saved.items()
            }
            return {f"{self.name}.{adapter_name}": tuner._import_state(state, config)[self.name]}

    return [
        WeightConverter(
            [f"{part}.{adapter_name}" for part in parts],
            f"{name}.{adapter_name}",
            [Import(name, parts)],
        )
        for name, parts in tuner.saved_forms.items()
    ]
