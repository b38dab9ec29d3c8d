# SPDX-License-Identifier: Apache-2.0
"""`RoutingTuner`: a model whose calls take `task_ids`."""

from __future__ import annotations

from typing import ClassVar, TypeVar

from ...base.containers import walk
from ...config import TargetedConfig
from ..injection import Build
from ..tuner import BaseTuner
from .calls import CALL_ARGUMENTS, Routing
from .layer import RoutingLayer

C = TypeVar("C", bound=TargetedConfig)


class RoutingTuner(BaseTuner[C]):
    """A model with adapters of a method that routes; all methods of one model share its routing."""

    adapter_call_arguments: ClassVar[tuple[str, ...]] = CALL_ARGUMENTS
    merge_options: ClassVar[tuple[str, ...]] = ("task_id",)

    @property
    def routing(self) -> Routing:
        """The routing that all layers of the model share."""
        if "_routing" not in vars(self):
            layer = next((m for _, m in walk(self.model) if isinstance(m, RoutingLayer)), None)
            self._routing = Routing(self.model) if layer is None else layer.routing
        return self._routing

    def attach_adapter(self, build: Build[C]) -> None:
        """Make the model's calls take `task_ids`, and name them in its signatures."""
        layer, config = next(self.tuner_layers(), None), build.config
        if layer is not None:
            self.routing.attach(self.model, build.adapter_name, config, layer)  # type: ignore[arg-type]

    def detach_adapter(self, adapter_name: str) -> None:  # noqa: D102
        self.routing.configs.pop(adapter_name, None)

    def detach_adapters(self) -> None:
        """Give the model its own methods back."""
        self.routing.detach(self.model)

    def forward(self, *args: object, **kwargs: object) -> object:
        """Call the model; a client's own `forward`, for example TRL's, takes `task_ids` too."""
        self.routing.ensure_wrapped(self.model)
        return super().forward(*args, **kwargs)
