# SPDX-License-Identifier: Apache-2.0
"""`MixedModel`: adapters of several methods on one model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from ..base.errors import PeftValueError
from ..base.registry import PEFT_TYPE_TO_MIXED_MODEL_MAPPING, PeftType
from ..config import PeftConfig, check_config
from ..core.build import Build
from ..core.tuner import BaseTuner


class MixedModel(BaseTuner):
    """A model with adapters of several methods. Where two methods adapt the same layer, the later
    one's layer is around the earlier one's, and what they add to the output adds up.

    Each method has a tuner of its own, without adapters of its own account: it plans and builds,
    and knows what is peculiar to the method. Everything that is said once for all methods (which
    adapters there are, which are active) is held here.

    Args:
        As `BaseTuner`.

    Example:
        >>> import torch
        >>> from peft import LoKrConfig, VBLoRAConfig
        >>> model = MixedModel(torch.nn.Sequential(torch.nn.Linear(8, 8)), LoKrConfig(target_modules=["0"]), "a")
        >>> model.add_adapter("b", VBLoRAConfig(num_vectors=6, vector_length=4, target_modules=["0"]))
        >>> model.set_adapter(["a", "b"])
        >>> model(torch.zeros(2, 8)).shape
        torch.Size([2, 8])
    """

    prefix = "mixed"

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._methods: dict[Any, BaseTuner] = {}
        super().__init__(*args, **kwargs)

    def method_of(self, config: PeftConfig) -> BaseTuner:
        """The tuner of a config's method.

        Raises:
            PeftTypeError: Not a config.
            PeftValueError: The method is unknown, or can't share a model.
        """
        check_config(config)
        peft_type = config.peft_type
        if peft_type not in self._methods:
            if peft_type not in PEFT_TYPE_TO_MIXED_MODEL_MAPPING:
                compatible = ", ".join(
                    sorted(PeftType(known).value for known in PEFT_TYPE_TO_MIXED_MODEL_MAPPING)
                )
                raise PeftValueError(
                    f"The provided `peft_type` {str(getattr(peft_type, 'value', peft_type))!r} is "
                    "not compatible with the "
                    f"`PeftMixedModel`. Compatible types are: {compatible}."
                )
            method: BaseTuner = PEFT_TYPE_TO_MIXED_MODEL_MAPPING[peft_type](
                self.model, None, shared_root=self
            )
            method.peft_config = self.peft_config
            self._methods[peft_type] = method
        return self._methods[peft_type]

    @property
    def adapter_call_arguments(self) -> tuple[str, ...]:  # type: ignore[override]  # noqa: D102
        return tuple(
            dict.fromkeys(
                name for method in self._methods.values() for name in method.adapter_call_arguments
            )
        )

    @property
    def merge_options(self) -> tuple[str, ...]:  # type: ignore[override]  # noqa: D102
        return tuple(
            dict.fromkeys(
                name for method in self._methods.values() for name in method.merge_options
            )
        )

    @property
    def shared_parameter_names(self) -> tuple[str, ...]:  # type: ignore[override]  # noqa: D102
        return tuple(
            dict.fromkeys(
                name for method in self._methods.values() for name in method.shared_parameter_names
            )
        )

    def attach_adapter(self, build: Build) -> None:  # noqa: D102
        self.method_of(build.config).attach_adapter(build)

    def detach_adapter(self, adapter_name: str) -> None:  # noqa: D102
        self.method_of(self.peft_config[adapter_name]).detach_adapter(adapter_name)

    def detach_adapters(self) -> None:  # noqa: D102
        for method in self._methods.values():
            method.detach_adapters()

    def note_loaded(self, model: nn.Module, adapter_name: str) -> None:  # type: ignore[override]  # noqa: D102
        self.method_of(self.peft_config[adapter_name]).note_loaded(model, adapter_name)

    def config_to_save(self, adapter_name: str) -> PeftConfig:  # noqa: D102
        return self.method_of(self.peft_config[adapter_name]).config_to_save(adapter_name)

    def merge_options_of(self, adapter_name: str, options: Mapping[str, Any]) -> dict[str, Any]:
        """Those of the options that the adapter's method knows (`task_id`), as that has them."""
        method = self.method_of(self.peft_config[adapter_name])
        return method.merge_options_of(
            adapter_name, {k: v for k, v in options.items() if k in method.merge_options}
        )
