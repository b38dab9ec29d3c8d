# SPDX-License-Identifier: Apache-2.0
"""VB-LoRA on a model: the banks, own and shared, and the storage format of each adapter."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from ...base.constants import DEFAULT_TARGET_MODULES
from ...base.containers import modules_of, named_tensors, walk
from ...base.errors import CheckpointError, warn
from ...base.geometry import Placement
from ...checkpoint.checks import warn_of_values
from ...checkpoint.keys import adapter_tensors, in_view
from ...core.adapter_choice import adapter_meant
from ...core.base_layer import expected_layout, geometry
from ...core.combining import Combination, Combined
from ...core.injection import Build, Construction
from ...core.layer import BaseTunerLayer
from ...core.method_info import Role
from ...core.model_methods import forwarded, methods_of
from ...core.parameter_targets import ParameterTarget
from ...core.plan import Plan
from ...core.tuner import BaseTuner
from . import combining
from .config import VBLoRAConfig
from .layer import TRAINING_REMEDY, Linear, VBLoRALayer
from .param_wrapper import ParamWrapper
from .shared_bank import FoundBank, find_bank
from .storage import BANK, GATE, StorageFormat, VBLoRAFormat

_SHARED = "vblora_shared_banks"
_ATTENTION_AND_FEED_FORWARD = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")


class Preparation(NamedTuple):
    """Shared bank (None for an own bank) and storage format of an adapter that is being made."""

    bank: FoundBank | None
    storage_format: StorageFormat = StorageFormat.LOGITS


class VBLoRAModel(BaseTuner[VBLoRAConfig]):
    """A model with VB-LoRA adapters; all layers of an adapter share one bank
    `[num_vectors, vector_length]`.

    Attributes:
        vblora_vector_bank: Own banks of adapters by adapter name.

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
    parameter_layer_cls = ParamWrapper
    shared_parameter_names: ClassVar[tuple[str, ...]] = (BANK, _SHARED)
    checkpoint_format = VBLoRAFormat()
    parameter_roles: ClassVar[Mapping[str, Role]] = {
        "bank": Role((BANK, _SHARED), lr=1e-3, decays=False),
        "logits": Role(VBLoRALayer.container_names[:-1], lr=1e-2, decays=False),
        "gate": Role((GATE,), decays=False),
    }
    supported_modules: ClassVar[str] = (
        "nn.Linear (also quantized), Conv1D and nn.MultiheadAttention"
    )
    combination_types: ClassVar[tuple[str, ...]] = ("cat",)
    default_target_modules: ClassVar[Mapping[str, str | tuple[str, ...]]] = {
        **DEFAULT_TARGET_MODULES,
        "bart": _ATTENTION_AND_FEED_FORWARD,
        "deberta-v2": ("query_proj", "key_proj", "value_proj", "dense"),
        "mt5": ("q", "k", "v", "o", "wi_0", "wi_1", "wo"),
        "opt": _ATTENTION_AND_FEED_FORWARD,
        "t5": ("q", "k", "v", "o", "wi", "wo"),
    }

    def tuner_layer_class(  # noqa: D102
        self, config: VBLoRAConfig, module: nn.Module
    ) -> type[BaseTunerLayer] | None:
        size = geometry(module)
        return None if size is None or size.is_conv else Linear

    def tuner_layer_options(  # noqa: D102
        self, config: VBLoRAConfig, path: str, build: Build[VBLoRAConfig]
    ) -> dict[str, object]:
        containers = {name: build.containers[name] for name in self.shared_parameter_names}
        bank, storage_format = _preparation(build)
        bank_key = None if bank is None else bank.key
        return {**containers, "bank_key": bank_key, "storage_format": storage_format}

    def target_problems(self, config: VBLoRAConfig, path: str, module: nn.Module) -> Iterator[str]:
        """Yield an offence for each size that `vector_length` must divide and does not."""
        size = geometry(module)
        assert size is not None
        for name in () if config.pad_last_tile else ("in_features", "out_features"):
            if (features := getattr(size, name)) % config.vector_length:
                yield (
                    f"`{name}` {features} must be divisible by `vector_length` "
                    f"{config.vector_length}."
                )

    def parameter_problems(self, config: VBLoRAConfig, target: ParameterTarget) -> Iterator[str]:
        """Yield sizes that `vector_length` must divide and does not, and dropout."""
        for features in (target.size.in_features, target.size.out_features):
            if features % config.vector_length and not config.pad_last_tile:
                yield (
                    f"its size {features} must be divisible by `vector_length` "
                    f"{config.vector_length}, or set `pad_last_tile=True`."
                )
        if config.vblora_dropout:
            yield f"`vblora_dropout`={config.vblora_dropout!r} is for modules; leave the default."

    def target_remedy(self, config: VBLoRAConfig, modules: Sequence[nn.Module]) -> str:
        """Return a sentence with the values of `vector_length` that divide all sizes."""
        sizes = [size for module in modules if (size := geometry(module)) is not None]
        common = math.gcd(
            *(size.in_features for size in sizes), *(size.out_features for size in sizes)
        )
        fitting = ", ".join(str(d) for d in range(1, common + 1) if common % d == 0)
        return (
            f"Lengths that divide all targeted sizes are {fitting}; or set `pad_last_tile=True`, "
            "which cuts the last tile to size."
        )

    def complete(self, config: VBLoRAConfig) -> Preparation:
        """Find the shared bank that a config names, and put its sizes into the config."""
        if not config.shares_bank:
            return Preparation(None)
        bank = find_bank(config, self._shared_banks())
        if config.bank_sha256 is None:
            config.bank_sha256 = bank.key
            config.num_vectors, config.vector_length = bank.vectors.shape
            config.validate()
        return Preparation(bank)

    @classmethod
    def shared_tensors(
        cls, config: VBLoRAConfig, present: Mapping[str, Tensor]
    ) -> Mapping[str, Tensor]:
        """Return the shared bank that a config names, by digest."""
        if not config.shares_bank:
            return {}
        bank = find_bank(config, present)
        return {bank.key: bank.vectors}

    def _shared_banks(self) -> dict[str, Tensor]:
        """Return the model's shared banks by digest."""
        container = self.shared_containers().get(_SHARED)
        if container is None:
            container = next((layer.vblora_shared_banks for layer in self._layers()), None)
        return {} if container is None else dict(container.items())

    def _layers(self) -> Iterator[VBLoRALayer]:
        return (layer for layer in self.tuner_layers() if isinstance(layer, VBLoRALayer))

    def adjust_config(self, plan: Plan[VBLoRAConfig], construction: Construction) -> None:
        """Set `fan_in_fan_out` as in the layers, and choose the storage format."""
        config, like = plan.config, construction.like
        config.fan_in_fan_out = expected_layout(plan.targets.values(), config.fan_in_fan_out)
        storage_format = StorageFormat.LOGITS
        if like is not None:
            formats = (layer.storage_format.get(like) for layer in self._layers())
            storage_format = next(found for found in formats if found is not None)
        elif config.save_only_topk_weights and not construction.initialize:
            if config.inference_mode:
                storage_format = StorageFormat.TOPK_WEIGHTS
            elif config.train_topk_weights:
                storage_format = StorageFormat.TOPK_LOGITS
        plan.found = _preparation(plan)._replace(storage_format=storage_format)

    def build_shared_parameters(
        self, build: Build[VBLoRAConfig], placement: Placement, initialize: bool
    ) -> dict[str, nn.Parameter]:
        """Return a new own bank, uniform within the config's bound, or move a shared one."""
        (device, dtype), config, preparation = placement, build.config, _preparation(build)
        if (found := preparation.bank) is not None:
            if not found.is_resident:
                device = torch.device("cpu") if device.type == "meta" else device
                expected = {_SHARED: torch.empty(0, dtype=dtype)}
                warn_of_values("The shared bank", {_SHARED: found.vectors}, expected)
                moved = found._replace(vectors=found.vectors.to(device, dtype))
                build.found = preparation._replace(bank=moved)
            return {}
        bank = nn.Parameter(
            torch.empty(config.num_vectors, config.vector_length, device=device, dtype=dtype)
        )
        if initialize:
            nn.init.uniform_(bank, -config.init_vector_bank_bound, config.init_vector_bank_bound)
        return {BANK: bank}

    def put_shared(self, build: Build[VBLoRAConfig]) -> list[str]:
        """Put an adapter's own bank, or the shared bank that it uses, where its layers read it."""
        bank, container = _preparation(build).bank, build.containers[_SHARED]
        if bank is None:
            return super().put_shared(build)
        if bank.key not in container:
            container[bank.key] = nn.Parameter(bank.vectors, requires_grad=False)
        return [*super().put_shared(build), _SHARED]

    def detach_adapter(self, adapter_name: str) -> None:
        """Remove a shared bank that no other adapter uses."""
        for key in {layer.bank_key.get(adapter_name) for layer in self._layers()}:
            if key is not None and not any(
                other == key
                for layer in self._layers()
                for name, other in layer.bank_key.items()
                if name != adapter_name
            ):
                del self.shared_containers()[_SHARED][key]

    def _init_vblora_vector_bank(self, config: VBLoRAConfig, adapter_name: str) -> None:
        """Initialize an adapter's own bank again; other programs call it by this name."""
        bound = config.init_vector_bank_bound
        nn.init.uniform_(self.vblora_vector_bank[adapter_name], -bound, bound)

    def build_for(
        self,
        adapter_name: str,
        config: VBLoRAConfig,
        layers: Mapping[str, BaseTunerLayer],
        like: str,
    ) -> Build[VBLoRAConfig]:
        """Build an adapter over the bank of the adapter that it will replace."""
        needed, present = config.bank_sha256, self.peft_config[like].bank_sha256
        if needed != present:
            own = "one of its own"
            raise CheckpointError(
                f"The checkpoint needs the vector bank {needed or own}, the adapter has "
                f"{present or own}; nothing was changed. `load_adapter` it under a new name."
            )
        return super().build_for(adapter_name, config, layers, like)

    def combine(self, request: Combination, layers: Mapping[str, VBLoRALayer]) -> Combined:
        """Combine adapters into a new one."""
        return combining.combine(self.peft_config, layers, request)

    @classmethod
    def note_loaded(cls, model: nn.Module, adapter_name: str) -> None:
        """Note which layers lack logits and can't be trained, and warn if they are trainable."""
        waiting = False
        for _, layer in modules_of(model, VBLoRALayer):
            if adapter_name in layer.scaling:
                layer.note_loaded(adapter_name)
                trainable = any(p.requires_grad for p in layer.adapter_parameters(adapter_name))
                waiting |= trainable and layer.topk_only[adapter_name]
        if waiting:
            warn(
                f"Adapter {adapter_name} is trainable but was loaded from a compact file "
                "(`save_only_topk_weights`): it infers and merges, and its first forward in "
                f"training will fail. {TRAINING_REMEDY}"
            )

    def get_nb_savable_parameters(self, adapter: str | None = None) -> tuple[int, int]:
        """Return the number of float32 values that saving an adapter writes: of bank and logits,
        and of biases and full modules.

        A shared bank is not written with the adapter. Parameters of the base model that were
        unfrozen by hand are counted too, because they need saving.

        Args:
            adapter: The adapter's name; by default the one called "default", else the only one that
                is active.

        Raises:
            PeftValueError: There is no such adapter, or the choice is ambiguous.
        """
        if adapter is None:
            adapter = adapter_meant(None, self.peft_config, self.active_adapters)
        self.check_names(adapter)
        config = self.peft_config[adapter]
        layers = [layer for layer in self._layers() if adapter in layer.scaling]
        of_layers = sum(layer.savable_parameters(adapter, config) for layer in layers)
        bank = 0 if config.shares_bank else self.vblora_vector_bank[adapter].numel()
        view = in_view(config, adapter)
        saved = adapter_tensors(named_tensors(walk(self.model, view), view), config, adapter)
        of_adapters = {
            id(parameter)
            for layer in self.tuner_layers()
            for name in layer.scaling
            for parameter in layer.adapter_parameters(name)
        }
        unfrozen = (
            parameter
            for parameter in self.model.parameters()
            if parameter.requires_grad and id(parameter) not in of_adapters
        )
        other = {id(tensor): tensor.numel() for tensor in (*saved.values(), *unfrozen)}
        for layer in layers:
            for tensor in layer.adapter_tensors(adapter):
                other.pop(id(tensor), None)
        return int(of_layers) + bank, sum(other.values())

    def print_savable_parameters(self, adapter: str | None = None) -> None:
        """Print the number of float32 values that saving an adapter writes.

        Args:
            adapter: The adapter, as for `get_nb_savable_parameters`.
        """
        adapters, other = self.get_nb_savable_parameters(adapter)
        print(
            f"VB-LoRA params to-be-saved (float32-equivalent): {adapters:,d} || total params "
            f"to-be-saved: {adapters + other:,d}"
        )


def _preparation(made: Plan[VBLoRAConfig] | Build[VBLoRAConfig]) -> Preparation:
    """Return the shared bank and storage format found by `complete` and `adjust_config`."""
    assert isinstance(made.found, Preparation)
    return made.found


@methods_of(VBLoRAModel)
class VBLoRAMethods:
    """Methods that a model with VB-LoRA adapters has in addition to those of every `PeftModel`."""

    get_nb_savable_parameters = forwarded(VBLoRAModel.get_nb_savable_parameters)
    print_savable_parameters = forwarded(VBLoRAModel.print_savable_parameters)
