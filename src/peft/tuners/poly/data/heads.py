# SPDX-License-Identifier: Apache-2.0
"""Cut a model's classification head down to some of its labels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ....base.constants import SEQ_CLS_HEAD_NAMES
from ....base.errors import PeftTypeError, PeftValueError
from ....base.suggestions import did_you_mean
from ....core.auxiliary import AuxiliaryTrainingWrapper
from ....core.layer import BaseTunerLayer


def check_unadapted(model: nn.Module, task: str) -> None:
    """Check that `model` is a model without adapters; the message names `task`."""
    if not isinstance(model, nn.Module):
        raise PeftTypeError(f"`model` must be a model, not {type(model).__name__}.")
    for path, layer in model.named_modules():
        if isinstance(layer, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
            raise PeftValueError(
                f"The model has adapters (in `{path}`); call `merge_and_unload(task_id={task!r})` "
                "first and narrow the model that it returns."
            )


def find_head(model: nn.Module, outputs: int) -> str:
    """Return the path of the only linear layer in a classification head with so many outputs."""
    found = [
        path
        for path, layer in model.named_modules()
        if isinstance(layer, nn.Linear)
        and layer.out_features == outputs
        and set(path.split(".")) & set(SEQ_CLS_HEAD_NAMES)
    ]
    if len(found) != 1:
        raise PeftValueError(
            f"Found {found or 'no layer'} with {outputs} outputs in "
            f"{' or '.join(SEQ_CLS_HEAD_NAMES)}; name the one that gives the labels as `module`."
        )
    return found[0]


def linear_at(model: nn.Module, path: str, outputs: int) -> nn.Linear:
    """Return the linear layer at a path, which must have so many outputs."""
    modules = {name: layer for name, layer in model.named_modules(remove_duplicate=False) if name}
    layer = modules.get(path)
    if layer is None:
        raise PeftValueError(f"The model has no module `{path}`.{did_you_mean(path, modules)}")
    if not isinstance(layer, nn.Linear) or layer.out_features != outputs:
        raise PeftValueError(
            f"`{path}` ({type(layer).__name__}) is not a linear layer with {outputs} outputs, one "
            "for each label of all tasks."
        )
    return layer


@torch.no_grad()
def narrow(model: nn.Module, path: str, head: nn.Linear, rows: slice, names: Sequence[str]) -> None:
    """Replace a head by some of its rows, and name the labels in the model's config."""
    place = {"device": head.weight.device, "dtype": head.weight.dtype}
    new = nn.Linear(head.in_features, len(names), head.bias is not None, **place)
    new.weight.copy_(head.weight[rows])
    if head.bias is not None:
        new.bias.copy_(head.bias[rows])
    new.requires_grad_(head.weight.requires_grad).train(head.training)
    parent, _, child = path.rpartition(".")
    setattr(model.get_submodule(parent), child, new)
    classifier: Any = model
    if hasattr(classifier, "config") and hasattr(classifier.config, "id2label"):
        classifier.config.id2label = dict(enumerate(names))
        classifier.config.label2id = {name: i for i, name in enumerate(names)}
    if hasattr(classifier, "num_labels"):
        classifier.num_labels = len(names)
