# SPDX-License-Identifier: Apache-2.0
"""`LoraModel`: a model with LoRA adapters."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor, nn

from ...base.errors import PeftNotSupportedError, PeftWarning, warn
from ...base.placeholders import placeholders
from ...checkpoint.format import CheckpointFormat, FusedPart, ModuleShape, Shapes
from ...config import PeftConfig
from ...core.base_layer import embedding_geometry, expected_layout, geometry, innermost
from ...core.combining import Combination, Combined, outer_path
from ...core.injection import Build, Construction
from ...core.layer import BaseTunerLayer
from ...core.method_info import Role
from ...core.parameter_layer import ParameterLayer
from ...core.parameter_targets import ParameterTarget
from ...core.plan import Plan
from ...core.replication import Undo, replicate
from ...core.tuner import BaseTuner
from ...integrations.quantization import quantizer
from . import combining, starting, tied
from .activation import CALL_ARGUMENTS, Activation
from .base import Start
from .bnb import Linear4bit, Linear8bitLt
from .config import LoraConfig
from .conversion import convert_to_lora
from .expert_stacks import stack_experts, stack_settings
from .factors import Factors
from .layer import (
    Conv1d,
    Conv2d,
    Conv3d,
    Embedding,
    Linear,
    LoraLayer,
    MultiheadAttention,
    ParamWrapper,
)
from .multihead_attention import OutProjection
from .starts.files import with_start, without_start
from .starts.kinds import is_in_file
from .torchao import TorchaoLoraLinear

_MAGNITUDE = "lora_magnitude_vector"
_QUANTIZED: Mapping[str | None, type[Linear]] = {
    "bnb 4bit": Linear4bit,
    "bnb 8bit": Linear8bitLt,
    "torchao": TorchaoLoraLinear,
}


if not TYPE_CHECKING:  # names of the interface that are elsewhere here, or not provided
    __getattr__ = placeholders(__name__)


class LoraFormat(CheckpointFormat[LoraConfig]):
    """Conversion of LoRA's tensors between a model and a checkpoint.

    DoRA's norms are parameters `weight` of modules in the model; the key in a checkpoint is that of
    the module. An adapter with a random start is saved with the start; loading removes it.
    """

    inner_names: ClassVar[Mapping[str, str]] = {_MAGNITUDE: "weight"}
    token_dims: ClassVar[Mapping[str, int]] = {"lora_embedding_A": 1, "lora_B.weight": 0}
    other_names: ClassVar[Mapping[str, str]] = {
        "lora_down.weight": "lora_A.weight",
        "lora_up.weight": "lora_B.weight",
        "lora.down.weight": "lora_A.weight",
        "lora.up.weight": "lora_B.weight",
    }

    def module_shape(self, shapes: Shapes) -> ModuleShape | None:
        """Return the size from `A [r, in, *kernel]` and `B [out, r / groups, …]`."""
        if table := shapes.get("lora_embedding_A"):
            out = shapes.get("lora_embedding_B", (0,))[0]
            return ModuleShape(out, table[1], table[0], is_table=True) if out else None
        A, B = shapes.get("lora_A.weight", ()), shapes.get("lora_B.weight", ())
        if len(A) < 2 or len(B) < 2 or not B[1]:
            return None
        return ModuleShape(B[0], A[1], A[0], A[2:], A[0] // B[1])

    expert_tensors: ClassVar[tuple[str, ...]] = ("lora_A.weight", "lora_B.weight")

    def stack_experts(  # noqa: D102
        self, config: LoraConfig, parts: Sequence[FusedPart], shape: tuple[int, ...] | None
    ) -> tuple[dict[str, Tensor], Mapping[str, float]]:
        return stack_experts(config, parts, shape)

    def stack_settings(  # noqa: D102
        self, config: LoraConfig, paths: Mapping[int, str]
    ) -> Mapping[str, float]:
        return stack_settings(config, paths)

    def fit_to_stacks(self, config: LoraConfig) -> None:  # noqa: D102
        if config.lora_dropout:
            warn(
                f"`lora_dropout`={config.lora_dropout!r} becomes 0: experts are parameters in this "
                "version of transformers, and adapters of parameters have no dropout."
            )
            config.lora_dropout = 0.0

    def export_state(self, state: dict[str, Tensor], config: LoraConfig) -> dict[str, Tensor]:
        """Return tensors by the keys of a checkpoint."""
        end = f"{_MAGNITUDE}.weight"
        if quantized := [key for key in state if key.endswith("lora_A.zero_point")]:
            raise PeftNotSupportedError(
                f"`{quantized[0].removesuffix('.zero_point')}` is quantized, by `quantize_dynamic` "
                "for example, and a checkpoint has factors of full precision; save the adapter "
                "before you quantize the model."
            )
        return {
            key.removesuffix(".weight") if key.endswith(end) else key: tensor
            for key, tensor in state.items()
        }

    def import_state(  # noqa: D102
        self, state: dict[str, Tensor], config: LoraConfig, names: Collection[str]
    ) -> dict[str, Tensor]:
        if is_in_file(config.init_lora_weights):
            state = without_start(config, state)
        if config.ensure_weight_tying:
            state = tied.without_followers(state, names)
        return {
            f"{key}.weight" if key.endswith(_MAGNITUDE) else key: tensor
            for key, tensor in state.items()
        }


class LoraModel(BaseTuner[LoraConfig]):
    """A model with LoRA adapters: `W + s·B·A` in every adapted layer.

    Example:
        >>> import torch
        >>> from peft import LoraConfig
        >>> base = torch.nn.Sequential(torch.nn.Linear(4, 6))
        >>> model = LoraModel(base, LoraConfig(r=2, target_modules=["0"]), "default")
        >>> model.model[0].lora_A["default"].weight.shape, model.model[0].scaling
        (torch.Size([2, 4]), {'default': 4.0})

    Source: arXiv:2106.09685, section 4.1
    """

    prefix: ClassVar[str] = "lora_"
    tuner_layer_cls = LoraLayer
    checkpoint_format = LoraFormat()
    parameter_roles: ClassVar[Mapping[str, Role]] = {
        "A": Role(("lora_A",)),
        "B": Role(("lora_B",)),
        "embedding": Role(("lora_embedding_A", "lora_embedding_B")),
        "magnitude": Role((_MAGNITUDE,), decays=False),
    }
    supported_modules: ClassVar[str] = (
        "nn.Linear (also quantized), Conv1D, nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d and "
        "nn.MultiheadAttention"
    )

    parameter_layer_cls = ParamWrapper
    combination_types: ClassVar[tuple[str, ...]] = combining.KINDS
    adapter_call_arguments: ClassVar[tuple[str, ...]] = CALL_ARGUMENTS

    def tuner_layer_class(  # noqa: D102
        self, config: LoraConfig, module: nn.Module
    ) -> type[BaseTunerLayer] | None:
        size = geometry(module)
        if size is None:
            return Embedding if embedding_geometry(module) else None
        if size.is_conv:
            return (Conv1d, Conv2d, Conv3d)[len(size.kernel_size) - 1]
        return _QUANTIZED.get(quantizer(innermost(module)), Linear)

    def tuner_layer_options(
        self, config: LoraConfig, path: str, build: Build[LoraConfig]
    ) -> dict[str, object]:
        """Return rank and alpha for the module at `path`, and the start if a file has it."""
        starts = build.found if isinstance(build.found, Mapping) else {}
        return {
            "start": starts.get(path),
            "r": config.rank_at(path),
            "lora_alpha": config.alpha_at(path),
        }

    def target_problems(self, config: LoraConfig, path: str, module: nn.Module) -> Iterator[str]:
        """Yield ranks that do not fit, and options that the kind of layer does not have."""
        size, lookup = geometry(module), embedding_geometry(module)
        if config.alora_invocation_tokens and size is not None and size.is_conv:
            yield (
                "`alora_invocation_tokens` is for layers that see tokens one by one, not for "
                "convolutions."
            )
        r = config.rank_at(path)
        if config.use_dora and isinstance(module, BaseTunerLayer):
            yield "`use_dora`=True is for layers that no other method adapts."
        if lookup is not None:
            if config.lora_bias:
                yield "`lora_bias`=True is not supported for embeddings."
            if getattr(module, "max_norm", None) is not None:
                yield (
                    "an embedding with `max_norm` rewrites its rows when they are looked up; an "
                    "adapter would not be rescaled."
                )
        elif size is not None and r % size.groups:
            yield (
                f"`r`={r} must be divisible by the convolution's groups, {size.groups}; choose "
                "another rank or target."
            )
        if size is not None:
            yield from starting.problems(config, size, r, config.alpha_at(path))
        if lookup is None and config.init_lora_weights == "orthogonal" and r % 2:
            yield f"Orthogonal initialization requires the LoRA rank to be even, got {r} instead."

    def prepare_model(self, config: LoraConfig) -> Undo:
        """Repeat the model's layers, if the config wants it."""
        return replicate(self.model, config.layer_replication)

    def complete(self, config: LoraConfig) -> Mapping[str, Factors]:
        """Return the start in the adapter's file, by layer; check that the model has one stream of
        tokens, if the adapter is an activated one.
        """
        root_config = getattr(self.model, "config", None)
        if config.alora_invocation_tokens and getattr(root_config, "is_encoder_decoder", False):
            raise PeftNotSupportedError(
                "`alora_invocation_tokens` is for models that continue their input; in an encoder "
                "and a decoder an invocation has no place that means the same to both."
            )
        return self.saved_start(config)

    def saved_start(self, config: LoraConfig) -> Mapping[str, Factors]:  # noqa: D102
        return starting.saved(self, config)

    def adopt_start(self, adapter_name: str, start: Mapping[str, Factors]) -> None:  # noqa: D102
        starting.replace_starts(dict(self.named_tuner_layers()), adapter_name, start)

    def attach_adapter(self, build: Build[LoraConfig]) -> None:
        """Put the weights that the adapter quantized into the model, and make the model's calls
        tell where an activated adapter is active.
        """
        starting.put(self.model, build)
        tied.put(self.model, build)
        invocation = build.config.alora_invocation_tokens
        if invocation:
            layer = next(self.tuner_layers())
            Activation.attach(self.model, build.adapter_name, invocation, layer)

    def detach_adapter(self, adapter_name: str) -> None:  # noqa: D102
        Activation.detach(self.model, adapter_name)

    def detach_adapters(self) -> None:
        """Give the model its own methods back."""
        Activation.detach(self.model)

    def parameter_layer_class(self, target: ParameterTarget) -> type[ParameterLayer]:  # noqa: D102
        if isinstance(target.module, nn.MultiheadAttention) and target.name == "in_proj_weight":
            return MultiheadAttention
        return OutProjection if target.part_of else ParamWrapper

    def parameter_problems(self, config: LoraConfig, target: ParameterTarget) -> Iterator[str]:
        """Yield the options that are for layers, whose input and output an adapter sees."""
        if target.part_of and config.use_dora:
            yield "MultiheadAttention does not support DoRA (yet), please set use_dora to False."
        unfit = {
            "lora_dropout": bool(config.lora_dropout) and not target.part_of,
            "lora_bias": config.lora_bias,
            "use_dora": config.use_dora and not target.part_of,
            "fan_in_fan_out": config.fan_in_fan_out and not target.part_of,
            "alora_invocation_tokens": bool(config.alora_invocation_tokens),
            "init_lora_weights": config.init_lora_weights not in (True, False, "gaussian"),
        }
        kind = "MultiheadAttention" if target.part_of else "ParamWrapper"
        for name, is_set in unfit.items():
            if is_set:
                yield (
                    f"lora.{kind} does not work with `{name}`={getattr(config, name)!r}, which is "
                    "for layers that are called; leave the default."
                )

    def adjust_config(self, plan: Plan[LoraConfig], construction: Construction) -> None:
        """Set `fan_in_fan_out` to the layout of the layers' weights, and warn of missing biases.

        Raises:
            PeftValueError: The layers lack what the adapter starts from.
        """
        starting.check(plan, construction)
        tied.check(plan)
        if plan.config.lora_bias:
            plain = {
                type(base).__name__
                for base in map(innermost, plan.targets.values())
                if base._parameters.get("bias") is None
            }
            for kind in sorted(plain):
                warn(
                    f"`lora_bias=True` was passed but the targeted layer of type {kind} has no "
                    "bias. It can't be merged.",
                    PeftWarning,
                )
        plan.config.fan_in_fan_out = expected_layout(
            plan.targets.values(), plan.config.fan_in_fan_out
        )

    def without_start(
        self, model: nn.Module, adapter_name: str
    ) -> tuple[PeftConfig, dict[str, Tensor]]:
        """Return a plain adapter of twice the rank and scaling 1, `[B, B₀]·[A, -A₀]`."""
        config = self.peft_config[adapter_name]
        if config.quantizes_weight:
            raise PeftNotSupportedError(
                f"{adapter_name} quantized the base weight, which no LoRA adapter undoes; leave "
                "`path_initial_model_for_weight_conversion` out. Readers quantize the original "
                "weight again."
            )
        # Clients set `init_lora_weights` to True while they save what the adapter started from.
        if not self._starts(adapter_name):
            return super().without_start(model, adapter_name)
        plain, state = convert_to_lora(model, None, adapter_name)
        return replace(
            plain, lora_dropout=config.lora_dropout, inference_mode=config.inference_mode
        ), state

    @classmethod
    def decomposes(cls, config: LoraConfig) -> bool:  # noqa: D102
        return config.use_dora

    @classmethod
    def conversion_options(cls, config: LoraConfig, **options: object) -> Mapping[str, object]:
        """Refuse activated adapters, and options of other methods."""
        if config.alora_invocation_tokens:
            raise PeftNotSupportedError(
                "An adapter with `alora_invocation_tokens` can't be converted: "
                "a plain LoRA acts on all tokens."
            )
        return super().conversion_options(config, **options)

    def combine(self, request: Combination, layers: Mapping[str, LoraLayer]) -> Combined:
        """Combine adapters into a new one."""
        return combining.combine(self.peft_config, layers, request)

    def file_contents(
        self, adapter_name: str, config: LoraConfig, state: dict[str, Tensor]
    ) -> tuple[LoraConfig, dict[str, Tensor]]:
        """Return config and tensors, with a start that readers can't compute."""
        starts = self._starts(adapter_name)
        state = tied.with_followers(self.model, adapter_name, state)
        if is_in_file(config.init_lora_weights):
            return with_start(config, state, starts)
        if starts and not self.peft_config[adapter_name].starts_from_weight:
            warn(
                f"Adapter {adapter_name} is saved as a plain one, as its `init_lora_weights`="
                f"{config.init_lora_weights!r} says now, but it starts from a part of the base "
                "weight: it fits a base model without that part, which `unload` does not return "
                "here. Leave `init_lora_weights` as it was, or save it with "
                "`path_initial_model_for_weight_conversion`."
            )
        return config, state

    def _starts(self, adapter_name: str) -> dict[str, Start]:
        """Return what an adapter's layers started from, by path."""
        return {
            outer_path(path): layer.lora_start[adapter_name]
            for path, layer in self.named_tuner_layers()
            if isinstance(layer, LoraLayer) and adapter_name in layer.lora_start
        }
