# SPDX-License-Identifier: Apache-2.0
"""`ArrowConfig` and `create_arrow_model`, as the PEFT interface has them."""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

from torch import nn

from ...base.errors import PeftTypeError, PeftValueError
from ...base.validation import at_least, boolean, number
from ...checkpoint.hub import HubOptions, split_hub_options
from ...peft_model import PeftModel
from .config import RoutedConfig
from .entrance import get_routed_model
from .sources import Source


@dataclass
class ArrowConfig:
    """Options of Arrow routing.

    Args:
        top_k: Number of experts for each token.
        router_temperature: Divides the scores before the softmax.
        use_gks: Subtract the mean of general adapters from each expert (general-knowledge
            subtraction).
        rng_seed: Without effect: prototypes are computed exactly, without random numbers.

    Attributes:
        task_adapter_names, gks_adapter_names: Names of the experts and of the general adapters,
            set by `create_arrow_model`.

    Raises:
        PeftValueError: A value is not allowed.

    Source: arXiv:2405.11157, section 3.2 (Arrow); arXiv:2505.10939 (subtraction)
    """

    top_k: int = 3
    router_temperature: float = 1.0
    use_gks: bool = False
    task_adapter_names: list[str] | None = field(default=None, init=False)
    gks_adapter_names: list[str] | None = field(default=None, init=False)
    rng_seed: int | None = None

    def __post_init__(self) -> None:
        problems = [
            *at_least("top_k", self.top_k),
            *number("router_temperature", self.router_temperature, positive=True),
            *boolean("use_gks", self.use_gks),
        ]
        if problems:
            raise PeftValueError(f"ArrowConfig: {' '.join(problems)}")


def create_arrow_model(
    base_model: nn.Module,
    task_specific_adapter_paths: Sequence[str | os.PathLike[str]],
    arrow_config: ArrowConfig,
    general_adapter_paths: Sequence[str | os.PathLike[str]] | None = None,
    **adapter_kwargs: object,
) -> PeftModel:
    """Return a model that routes each token over saved adapters by Arrow.

    The adapters can be of any method and rank. The routed adapter is called "arrow_router", its
    experts "task_0", "task_1", ….

    Args:
        base_model: The base model; the routing is put into it in place.
        task_specific_adapter_paths: Folders or Hub ids, also `owner/repository/subfolder`.
        arrow_config: The options; gets the names of the experts.
        general_adapter_paths: With `use_gks`, adapters to subtract. The mean of their factors is
            subtracted from those of each expert, which needs adapters of one rank and scale;
            `get_routed_model` can subtract their deltas.
        **adapter_kwargs: Options for the Hub, and `autocast_adapter_dtype`.

    Raises:
        CheckpointNotFoundError: There is no such adapter.
        CheckpointError: An adapter is damaged, or does not fit the base model.
        PeftValueError: No path, or no general one though `use_gks`, or adapters do not fit. The
            model is left as it was after any error.

    Source: arXiv:2405.11157, section 3.2
    """
    if not isinstance(arrow_config, ArrowConfig):
        raise PeftTypeError(
            f"`arrow_config` must be an ArrowConfig, got {type(arrow_config).__name__}."
        )
    if not _are_paths(task_specific_adapter_paths):
        raise PeftValueError(
            "`task_specific_adapter_paths` should contain at least one adapter path, in a list."
        )
    if arrow_config.use_gks and not _are_paths(general_adapter_paths):
        raise PeftValueError(
            "You should provide general LoRA paths if you want to use GenKnowSub: "
            "`general_adapter_paths`, a list."
        )
    hub, rest = split_hub_options(adapter_kwargs)
    general = list(general_adapter_paths or ()) if arrow_config.use_gks else []
    config = RoutedConfig(
        routing="arrow",
        top_k=arrow_config.top_k,
        temperature=arrow_config.router_temperature,
        general_subtraction="factors",
        inference_mode=True,
    )
    model = get_routed_model(
        base_model,
        {f"task_{i}": _source(path, hub) for i, path in enumerate(task_specific_adapter_paths)},
        config,
        "arrow_router",
        general_experts={f"gks_{i}": _source(path, hub) for i, path in enumerate(general)},
        hub_options=hub,
        autocast_adapter_dtype=bool(rest.get("autocast_adapter_dtype", True)),
    )
    routed = model.peft_config["arrow_router"]
    assert isinstance(routed, RoutedConfig)
    arrow_config.task_adapter_names = list(routed.experts)
    arrow_config.gks_adapter_names = list(routed.general_experts)
    return model


def _are_paths(paths: object) -> bool:
    return isinstance(paths, Collection) and not isinstance(paths, str) and len(paths) > 0


def _source(path: str | os.PathLike[str], hub: HubOptions) -> Source:
    """Return the source of an adapter; a Hub id with more than two parts has a subfolder."""
    place = os.fspath(path)
    source: Source = {k: v for k, v in hub.items() if k in ("subfolder", "revision")}
    parts = place.strip("/").split("/")
    if not os.path.isdir(place) and not os.path.isabs(place) and len(parts) > 2:
        source.setdefault("subfolder", "/".join(parts[2:]))
        place = "/".join(parts[:2])
    return {"source": place, **source}
