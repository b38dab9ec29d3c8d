# SPDX-License-Identifier: Apache-2.0
"""VB-LoRA on a model: the bank's owner, and the two forms of its checkpoint."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ...utils.constants import DEFAULT_TARGET_MODULES
from ...utils.error import CheckpointError
from ...utils.save_and_load import adapter_tensors
from .._build import Build, Construction
from .._combining import Combination, Combined
from .._geometry import Placement, expected_layout, geometry
from .._layer import BaseTunerLayer
from .._plan import Plan
from .._roles import Role
from .._tuner import BaseTuner
from . import combining
from .bank import compress, expand, savable_parameters
from .layer import Linear, VBLoRALayer

_INDICES, _WEIGHTS = "_topk_indices", "_topk_weights"
_ATTENTION_AND_FEED_FORWARD = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")


class VBLoRAModel(BaseTuner):
    """A model with VB-LoRA adapters; each adapter's layers share one bank `[num_vectors, vector_length]`.

    Args:
        As `BaseTuner`.

    Attributes:
        vblora_vector_bank: The banks by adapter name.

    Example:
        >>> import torch
        >>> from peft import VBLoRAConfig
        >>> config = VBLoRAConfig(r=2, num_vectors=6, vector_length=4, target_modules=["0"])
        >>> model = VBLoRAModel(torch.nn.Sequential(torch.nn.Linear(8, 8)), config, "default")
        >>> model.vblora_vector_bank["default"].shape, model.get_nb_savable_parameters()
        (torch.Size([6, 4]), (72, 0))

    Source: arXiv:2405.15179, section 3
    """

    prefix: ClassVar[str] = "vblora_"
    tuner_layer_cls = VBLoRALayer
    shared_parameter_names: ClassVar[tuple[str, ...]] = ("vblora_vector_bank",)
    saved_forms: ClassVar[Mapping[str, Mapping[str, torch.dtype]]] = {
        name: {name + _INDICES: torch.int64, name + _WEIGHTS: torch.float32} for name in VBLoRALayer.adapter_layer_names
    }
    parameter_roles: ClassVar[Mapping[str, Role]] = {
        "bank": Role(("vblora_vector_bank",), lr=1e-3, decays=False),
        "logits": Role(VBLoRALayer.adapter_layer_names, lr=1e-2, decays=False),
    }
    supported_modules: ClassVar[str] = "nn.Linear (also quantised) and Conv1D"
    combination_types: ClassVar[tuple[str, ...]] = ("cat",)
    default_target_modules: ClassVar[Mapping[str, Any]] = {
        **DEFAULT_TARGET_MODULES,
        "bart": _ATTENTION_AND_FEED_FORWARD,
        "deberta-v2": ("query_proj", "key_proj", "value_proj", "dense"),
        "mt5": ("q", "k", "v", "o", "wi_0", "wi_1", "wo"),
        "opt": _ATTENTION_AND_FEED_FORWARD,
        "t5": ("q", "k", "v", "o", "wi", "wo"),
    }

    def tuner_layer_class(self, config: Any, module: nn.Module) -> type[BaseTunerLayer] | None:  # noqa: D102
        size = geometry(module)
        return None if size is None or size.is_conv else Linear

    def tuner_layer_options(self, config: Any, path: str, build: Build) -> dict[str, Any]:  # noqa: D102
        return {"vblora_vector_bank": build.containers["vblora_vector_bank"]}

    def target_problems(self, config: Any, path: str, module: nn.Module) -> Iterator[str]:
        """Both sizes must be whole numbers of vectors."""
        size = geometry(module)
        assert size is not None
        for name in ("in_features", "out_features"):
            features = getattr(size, name)
            if features % config.vector_length:
                fitting = ", ".join(str(d) for d in range(1, features + 1) if features % d == 0)
                yield f"`{name}` {features} must be divisible by `vector_length` {config.vector_length}; choose one of {fitting}."

    def build_shared_parameters(self, config: Any, placement: Placement, initialise: bool) -> dict[str, nn.Parameter]:
        """The bank, uniform within the config's bound."""
        device, dtype = placement
        bank = nn.Parameter(torch.empty(config.num_vectors, config.vector_length, device=device, dtype=dtype))
        if initialise:
            nn.init.uniform_(bank, -config.init_vector_bank_bound, config.init_vector_bank_bound)
        return {"vblora_vector_bank": bank}

    def _init_vblora_vector_bank(self, config: Any, adapter_name: str) -> None:
        """Draw an adapter's bank anew."""
        nn.init.uniform_(self.vblora_vector_bank[adapter_name], -config.init_vector_bank_bound, config.init_vector_bank_bound)

    def _build(self, plan: Plan, construction: Construction) -> Build:
        """Say so if the layers store their weights otherwise than the config expects, and put the config right."""
        plan.config.fan_in_fan_out = expected_layout(plan.targets.values(), plan.config.fan_in_fan_out)
        return super()._build(plan, construction)

    def combine(self, request: Combination) -> Combined:  # noqa: D102
        return combining.combine(self, request)

    @classmethod
    def note_loaded(cls, model: nn.Module, adapter_name: str) -> None:  # noqa: D102
        for module in model.modules():
            if isinstance(module, VBLoRALayer):
                module.note_loaded(adapter_name)

    @classmethod
    def _export_state(cls, state: dict[str, Tensor], config: Any) -> dict[str, Tensor]:
        """Full logits, or indices and weights of the chosen vectors, as the config has it now."""
        if not config.save_only_topk_weights:
            return state
        result: dict[str, Tensor] = {}
        for key, tensor in state.items():
            if _is_logits(key):
                result[key + _INDICES], result[key + _WEIGHTS] = compress(tensor, config.topk)
            else:
                result[key] = tensor
        return result

    @classmethod
    def _import_state(cls, state: dict[str, Tensor], config: Any) -> dict[str, Tensor]:
        """Logits, rebuilt where the checkpoint has indices and weights.

        Raises:
            CheckpointError: Indices without weights, or beyond the bank.
        """
        result: dict[str, Tensor] = {}
        for key, tensor in state.items():
            if key.endswith(_INDICES):
                name = key.removesuffix(_INDICES)
                weights = state.get(name + _WEIGHTS)
                if weights is None or (*weights.shape[:-1], weights.shape[-1] + 1) != tuple(tensor.shape):
                    raise CheckpointError(f"`{key}` has no `{name + _WEIGHTS}` that goes with it; nothing was loaded.")
                if tensor.is_floating_point() or not all(0 <= int(i) < config.num_vectors for i in tensor.aminmax()):
                    raise CheckpointError(f"`{key}` points beyond the bank's {config.num_vectors} vectors; nothing was loaded.")
                result[name] = expand(tensor, weights, config.num_vectors, torch.float32)
            elif not key.endswith(_WEIGHTS):
                result[key] = tensor
        return result

    def get_nb_savable_parameters(self, adapter: str = "default") -> tuple[int, int]:
        """What saving an adapter writes, in units of float32: (bank and logits, biases and whole modules).

        Parameters of the base model that were unfrozen by hand count too, as something that needs saving.

        Raises:
            PeftValueError: There is no such adapter.
        """
        self.check_names(adapter)
        config: Any = self.peft_config[adapter]
        topk = config.topk if config.save_only_topk_weights else None
        own, other = 0.0, 0
        saved = adapter_tensors(self.model.named_parameters(), config, adapter)
        for key, tensor in saved.items():
            if _is_logits(key):
                own += savable_parameters(tensor.numel(), config.num_vectors, topk)
            elif key not in self.shared_parameter_names:
                other += tensor.numel()
        counted = {id(tensor) for tensor in saved.values()}
        others = {id(p): p for layer in self.tuner_layers() for name in layer.scaling for p in layer.adapter_parameters(name)}
        for parameter in self.model.parameters():
            if parameter.requires_grad and id(parameter) not in counted and id(parameter) not in others:
                other += parameter.numel()
        bank = next(self._shared())[adapter].numel()
        return int(own) + bank, other

    def print_savable_parameters(self) -> None:
        """Print how much saving the active adapter writes."""
        own, other = self.get_nb_savable_parameters(self.active_adapters[0])
        print(f"VB-LoRA params to-be-saved (float32-equivalent): {own:,d} || total params to-be-saved: {own + other:,d}")


def _is_logits(key: str) -> bool:
    return key.rpartition(".")[2] in VBLoRALayer.adapter_layer_names
