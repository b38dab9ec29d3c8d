# SPDX-License-Identifier: Apache-2.0
"""`MixedModel`: adapters of several methods on one model."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from itertools import chain
from typing import TYPE_CHECKING, Any, ClassVar

from torch import nn

from ..base.errors import PeftValueError
from ..base.missing_attribute import PeftAttributeError
from ..base.placeholders import placeholder
from ..base.registry import PEFT_TYPE_TO_MIXED_MODEL_MAPPING, PeftType
from ..config import PeftConfig, TargetedConfig, check_config
from ..core.adapted_model import AdaptedModel
from ..core.layer import BaseTunerLayer

if TYPE_CHECKING:
    from ..core.tuner import BaseTuner


class MixedModel(AdaptedModel[TargetedConfig]):
    """A model with adapters of several methods. Where two methods adapt the same layer, the later
    one's layer wraps the earlier one's, and their deltas add up.

    Each method has a tuner of its own, which plans and builds adapters; all of them share this
    model's configs. The state that does not depend on a method is kept here: which adapters there
    are, and which are active.

    Example:
        >>> import torch
        >>> from peft import LoKrConfig, VBLoRAConfig
        >>> base = torch.nn.Sequential(torch.nn.Linear(8, 8))
        >>> model = MixedModel(base, LoKrConfig(target_modules=["0"]), "a")
        >>> config = VBLoRAConfig(num_vectors=6, vector_length=4, target_modules=["0"])
        >>> model.add_adapter("b", config)
        >>> model.set_adapter(["a", "b"])
        >>> model(torch.zeros(2, 8)).shape
        torch.Size([2, 8])
    """

    prefix: ClassVar[str] = "mixed"

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._methods: dict[PeftType, BaseTuner] = {}
        super().__init__(*args, **kwargs)

    @classmethod
    def of(cls, model: nn.Module, layer_cls: type[BaseTunerLayer] = BaseTunerLayer) -> MixedModel:
        """Return a tuner of the adapters that were injected into a model, in layers of a class."""
        tuner = cls(model, None, shared_root=model)
        tuner.peft_config = getattr(model, "peft_config", {})
        for config in tuner.peft_config.values():
            tuner.method_of(config)
        tuner.tuner_layer_cls = layer_cls  # type: ignore[misc]
        active = (name for layer in tuner.tuner_layers() for name in layer.active_adapters)
        tuner._active = [name for name in dict.fromkeys(active) if name in tuner.peft_config]
        return tuner

    def methods(self) -> Collection[BaseTuner]:
        """Return the tuners of the methods that the model has adapters of."""
        return self._methods.values()

    def method_of(self, config: PeftConfig) -> BaseTuner:
        """Return the tuner of a config's method; refuse methods that can't share a model."""
        check_config(config)
        peft_type = config.peft_type
        if peft_type not in self._methods:
            if peft_type not in PEFT_TYPE_TO_MIXED_MODEL_MAPPING:
                compatible = ", ".join(
                    sorted(PeftType(known).value for known in PEFT_TYPE_TO_MIXED_MODEL_MAPPING)
                )
                raise PeftValueError(
                    f"The provided `peft_type` {str(getattr(peft_type, 'value', peft_type))!r} is "
                    f"not compatible with the `PeftMixedModel`. Compatible types are: {compatible}."
                )
            tuner_cls: type[BaseTuner] = PEFT_TYPE_TO_MIXED_MODEL_MAPPING[peft_type]
            method = tuner_cls(self.model, None, shared_root=self)
            method.peft_config, method.running_calls = self.peft_config, self.running_calls
            self._methods[PeftType(peft_type)] = method
        return self._methods[PeftType(peft_type)]

    def __getattr__(self, name: str) -> Any:
        """Return an attribute of the base model that this class lacks; not those of one method."""
        try:
            return super().__getattr__(name)
        except PeftAttributeError as error:
            error.remedy = (
                " A model of several methods does not have it: use it in a `PeftModel` with that "
                "adapter, save the adapter, and load it here."
            )
            raise

    @property
    def adapter_call_arguments(self) -> tuple[str, ...]:  # type: ignore[override]
        """Keyword arguments of the model's calls that are for any of the methods."""
        return _union(method.adapter_call_arguments for method in self.methods())

    @property
    def merge_options(self) -> tuple[str, ...]:  # type: ignore[override]
        """Arguments of a merge that any of the methods takes."""
        return _union(method.merge_options for method in self.methods())

    @property
    def shared_parameter_names(self) -> tuple[str, ...]:  # type: ignore[override]
        """Attributes with parameters that all layers of a method share."""
        return _union(method.shared_parameter_names for method in self.methods())


def _union(names: Iterable[tuple[str, ...]]) -> tuple[str, ...]:
    """Return all names, each once."""
    return tuple(dict.fromkeys(chain.from_iterable(names)))


if not TYPE_CHECKING:

    def __getattr__(name: str) -> object:
        """Return `COMPATIBLE_TUNER_TYPES`, the methods whose adapters can be mixed."""
        if name == "COMPATIBLE_TUNER_TYPES":
            return tuple(PEFT_TYPE_TO_MIXED_MODEL_MAPPING)
        return placeholder(name, __name__)
