# SPDX-License-Identifier: Apache-2.0
"""Rules by which transformers renames an adapter's checkpoint keys into its model's parameters."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import torch

from ..base.constants import MODEL_ROOT, ROOT
from ..base.containers import StateDict
from ..base.errors import PeftRuntimeError
from ..base.expressions import fullmatch
from ..base.registry import PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING, lookup
from .format import FusedPart
from .fused_modules import stacks_rows
from .protocols import AdapterConfig, tuner_class

if TYPE_CHECKING:
    from transformers.core_model_loading import WeightTransform


def build_peft_weight_mapping(
    weight_conversions: Sequence[WeightTransform] | None,
    adapter_name: str,
    peft_config: AdapterConfig | None = None,
) -> list[object]:
    """Return the rules for an adapter's checkpoint, followed by those of the model.

    The rules remove the prefix of `PeftModel` from a key and add the adapter's name:
    `base_model.model.model.layers.0.q.lokr_w1` is `model.layers.0.q.lokr_w1.default` in the model.
    Tensors that all layers share are at the model's root.

    Args:
        weight_conversions: The model's own rules, for checkpoints of its earlier versions.
        adapter_name: The adapter.
        peft_config: Its config; None makes rules for all methods.

    Returns:
        `WeightRenaming`s, `WeightConverter`s for other storage formats, and `weight_conversions`;
        an empty list if `weight_conversions` is empty.

    Raises:
        PeftValueError: The config's method is not implemented.

    Example:
        >>> build_peft_weight_mapping(None, "default")
        []
    """
    if not weight_conversions:
        return []
    from transformers.core_model_loading import WeightRenaming

    methods = list(PEFT_TYPE_TO_TUNER_MAPPING) if peft_config is None else [peft_config.peft_type]
    tuners = [lookup(PEFT_TYPE_TO_TUNER_MAPPING, method) for method in methods]
    shared = [name for tuner in tuners for name in tuner.shared_parameter_names]
    formats = [tuner.checkpoint_format for tuner in tuners]
    nested = {name: inner for form in formats for name, inner in form.inner_names.items()}
    prefixes = sorted({lookup(PEFT_TYPE_TO_PREFIX_MAPPING, method) for method in methods})
    # A method's prefix may be part of another's.
    boundary = "" if len(prefixes) == 1 else r"(?<!\w)"
    return [
        WeightRenaming(f"{MODEL_ROOT}model.", "model."),
        WeightRenaming(MODEL_ROOT, ""),
        *(WeightRenaming(f"{ROOT}{name}", name) for name in shared),
        *(
            WeightRenaming(rf"({boundary}{prefix}[^\.]*)", rf"\1.{adapter_name}")
            for prefix in prefixes
        ),
        *(
            WeightRenaming(rf"({name}\.{adapter_name})$", rf"\1.{parameter}")
            for name, parameter in nested.items()
        ),
        *([] if peft_config is None else _converters(adapter_name, peft_config)),
        *(
            []
            if peft_config is None
            else _stack_converters(weight_conversions, adapter_name, peft_config)
        ),
        *weight_conversions,
    ]


def _converters(adapter_name: str, config: AdapterConfig) -> list[object]:
    """Return rules for tensors that a checkpoint has in another storage format."""
    from transformers.core_model_loading import ConversionOps, WeightConverter

    checkpoint_format = tuner_class(config).checkpoint_format

    class Import(ConversionOps):
        """Conversion of tensors in a checkpoint into a tensor of the adapter."""

        def __init__(self, name: str, parts: Mapping[str, torch.dtype]) -> None:
            self.name, self.parts = name, parts

        def convert(self, input_dict: StateDict, *args: object, **kwargs: object) -> StateDict:
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
            # The loader reads them in the dtype of the tensor that they are converted to.
            state = {
                part: (t[0] if isinstance(t, list) else t).to(self.parts[part])
                for part, t in saved.items()
            }
            converted = checkpoint_format.import_state(state, config, (self.name,))
            return {f"{self.name}.{adapter_name}": converted[self.name]}

    return [
        WeightConverter(
            [f"{part}.{adapter_name}" for part in parts],
            f"{name}.{adapter_name}",
            [Import(name, parts)],
        )
        for name, parts in checkpoint_format.parts.items()
    ]


def _stack_converters(
    rules: Sequence[WeightTransform], adapter_name: str, config: AdapterConfig
) -> list[object]:
    """Return rules that make the adapters of single experts, which earlier versions of a model had
    as layers, one of a stack.
    """
    from transformers.core_model_loading import ConversionOps, WeightConverter

    layout = tuner_class(config).checkpoint_format

    class Stack(ConversionOps):
        """Conversion of the adapters of all experts into that of a stack."""

        supports_many_to_many = True

        def __init__(self, layers: Sequence[str]) -> None:
            self.layers = layers  # former paths, with `*` for the expert

        def convert(
            self,
            input_dict: StateDict,
            source_patterns: list[str],
            target_patterns: list[str],
            **kwargs: object,
        ) -> StateDict:
            found: dict[tuple[int, int], dict[str, torch.Tensor]] = {}
            for i, pattern in enumerate(source_patterns):
                part, end = divmod(i, len(layout.expert_tensors))
                for expert, tensor in enumerate(input_dict.get(pattern, ())):
                    own = found.setdefault((part, expert), {})
                    own[layout.expert_tensors[end]] = tensor
            parts = [
                FusedPart(self.layers[part].replace("*", str(expert)), part, expert, own)
                for (part, expert), own in found.items()
            ]
            tensors, _ = layout.stack_experts(config, parts, None)
            return dict(zip(target_patterns, tensors.values(), strict=True))

    converters: list[object] = []
    fused = [rule for rule in rules if layout.expert_tensors and stacks_rows(rule)]
    for rule, around in zip(fused, _numbers_around(fused, config), strict=True):
        layers = [
            source.replace("\\", "").removesuffix(".weight") for source in rule.source_patterns
        ]
        module = rule.target_patterns[0].replace("\\", "").rpartition(".")[0]
        ends = [_in_model(end, adapter_name) for end in layout.expert_tensors]
        converters.append(
            WeightConverter(
                [f"{layer}.{end}" for layer in layers for end in ends],
                [f"{module}{'.base_layer' * around}.{end}" for end in ends],
                [Stack(layers)],
            )
        )
    return converters


def _in_model(end: str, adapter_name: str) -> str:
    """Return the end of a checkpoint's key with the adapter's name: `lora_A.default.weight`."""
    container, _, name = end.partition(".")
    return f"{container}.{adapter_name}" + (f".{name}" if name else "")


def _numbers_around(rules: Sequence[WeightTransform], config: AdapterConfig) -> Iterator[int]:
    """Yield, for each stack of a module, how many later ones of the module a config targets too."""
    owners = [rule.target_patterns[0].rpartition(".")[0] for rule in rules]
    targeted = [
        any(
            _names(config, source.replace("\\", "").replace("*", "0").removesuffix(".weight"))
            for source in rule.source_patterns
        )
        for rule in rules
    ]
    for i, owner in enumerate(owners):
        later = range(i + 1, len(rules))
        yield sum(targeted[j] for j in later if owners[j] == owner)


def _names(config: AdapterConfig, end: str) -> bool:
    """Return whether a config's targets name a module whose path has this end. The model is not
    known here: a regular expression is tried on a usual path, and else read for the last name.
    """
    targets = getattr(config, "target_modules", None) or ()
    if isinstance(targets, str):
        last = re.escape(end.rpartition(".")[2])
        is_usual = fullmatch(targets, f"model.layers.0.{end.removeprefix('.')}")
        return is_usual or re.search(rf"\b{last}\b", targets) is not None
    return any(f".{end}".endswith(f".{name}") for name in targets)
