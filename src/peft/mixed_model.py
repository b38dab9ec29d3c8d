# SPDX-License-Identifier: Apache-2.0
"""`PeftMixedModel`: a base model with adapters of several methods."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .config import PeftConfig
from .core.adapted_model import AdaptedModel
from .core.switching import check_deletable
from .peft_model import PeftModel
from .tuners.mixed import MixedModel


class PeftMixedModel(PeftModel):
    """A `PeftModel` whose adapters may be of different methods, active together or one for each
    sample of a batch.

    Each adapter is saved as it would be by itself: "default" into the folder, the others into
    sub-folders of their names. To load them again, give one to `from_pretrained` and the others to
    `load_adapter`. The arguments are those of `PeftModel`.

    Example:
        >>> import torch
        >>> from peft import LoKrConfig, PolyConfig, get_peft_model
        >>> base = torch.nn.Sequential(torch.nn.Linear(8, 8))
        >>> model = get_peft_model(base, LoKrConfig(target_modules=["0"]), "style", mixed=True)
        >>> model.add_adapter("tasks", PolyConfig(r=2, n_tasks=3, target_modules=["0"]))
        >>> model(torch.zeros(2, 8), adapter_names=["style", "tasks"], task_ids=[0, 2]).shape
        torch.Size([2, 8])
    """

    @property
    def prefix(self) -> str:
        """The word "mixed", since names of adapter parameters have no common start."""
        return MixedModel.prefix

    def delete_adapter(self, adapter_name: str | Sequence[str]) -> None:
        """Delete one adapter or several. If no other was active, the first by name becomes active.

        Raises:
            PeftTypeError: A name is not a string.
            PeftValueError: There is no such adapter, or one is merged; none is deleted.
        """
        given: Any = adapter_name
        names = dict.fromkeys(given) if isinstance(given, (list, tuple)) else [given]
        layers = list(self.base_model.tuner_layers())
        for name in names:
            check_deletable(layers, name, self.peft_config)
        for name in names:
            super().delete_adapter(name)

    def _tuner_class(self, config: PeftConfig) -> type[AdaptedModel]:
        return MixedModel

    def _check_method(self, config: PeftConfig) -> None:
        self.base_model.method_of(config)
