# SPDX-License-Identifier: Apache-2.0
"""An adapter that is a copy of another one of the same model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from ..checkpoint.checks import check_complete, check_state
from ..checkpoint.keys import MODEL_ROOT, ROOT, adapter_tensors, in_view
from ..checkpoint.writing import write_state
from ..config import PeftConfig
from ..integrations.distributed import state_tensors
from .injection import Build
from .layer import layer_of


def copier(model: nn.Module, config: PeftConfig, source: str) -> Callable[[Build], None]:
    """Return a function that fills a finished adapter, not yet in the model, with another's values.

    Args:
        model: A `PeftModel`.
        config: The config of the adapter to copy.
        source: Its name.
    """

    def fill(build: Build) -> None:
        named = {
            (ROOT if name.partition(".")[0] in build.shared else MODEL_ROOT) + name: tensor
            for name, tensor in build.named_tensors()
        }
        expected = adapter_tensors(named.items(), config, build.adapter_name)
        present = state_tensors(model, in_view(config, source))
        values = adapter_tensors(present.items(), config, source)
        values = {key: tensor for key, tensor in values.items() if key in expected}
        check_complete(check_state(expected, values), source)
        write_state(None, expected, values)
        for path, layer in build.layers.items():
            _copy_rest(
                layer,
                layer_of(model.get_submodule(MODEL_ROOT + path), type(layer)),
                build.adapter_name,
                source,
            )

    return fill


def _copy_rest(layer: Any, known: Any, name: str, source: str) -> None:
    """Copy what belongs to an adapter in a layer and is in no checkpoint: its strength now, what it
    started with.
    """
    layer.scaling[name] = known.scaling[source]
    for attribute in layer.value_names:
        entries, values = getattr(layer, attribute), getattr(known, attribute)
        if name in entries and source in values and isinstance(entries[name], nn.Module):
            entries[name].load_state_dict(values[source].state_dict())
