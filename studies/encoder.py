# SPDX-License-Identifier: Apache-2.0
"""The language model in two parts. The lower layers are frozen: their outputs for a task's texts
are computed once and kept in a file. The upper layers are adapted.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from .package_data import MODEL, cache
from .texts import PARTS, Task

TOKENS = 40
"""Tokens of a text; later ones are cut off."""


@dataclass
class States:
    """The lower layers' outputs for the texts of one part of a task.

    Args:
        hidden: `[tokens of all texts, width]`, float16.
        ends: `[texts + 1]`, where each text begins.
        labels: `[texts]`.
    """

    hidden: Tensor
    ends: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, numbers: Tensor) -> dict[str, Tensor]:
        """Return padded states `[n, longest, width]`, their mask `[n, longest]` and labels."""
        parts = [self.hidden[self.ends[n] : self.ends[n + 1]].float() for n in numbers.tolist()]
        hidden = nn.utils.rnn.pad_sequence(parts, batch_first=True)
        lengths = torch.tensor([len(part) for part in parts])
        mask = torch.arange(hidden.shape[1]) < lengths[:, None]
        return {"hidden": hidden, "mask": mask, "labels": self.labels[numbers]}


class Upper(nn.Module):
    """The upper layers, without dropout, and a frozen classifier on the mean of the tokens.

    Args:
        layers: Of the encoder.
        head: `[classes, width]` and `[classes]`, weight and bias of the classifier.
    """

    def __init__(self, layers: nn.ModuleList, head: tuple[Tensor, Tensor]) -> None:
        super().__init__()
        self.layers = copy.deepcopy(layers)
        for module in self.layers.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        self.head = nn.Linear(head[0].shape[1], head[0].shape[0])
        self.head.load_state_dict({"weight": head[0], "bias": head[1]})
        self.requires_grad_(False)

    def forward(self, hidden: Tensor, mask: Tensor, labels: Tensor | None = None) -> Any:
        """Return the logits; with labels, the mean cross entropy."""
        logits = self.head(self.features(hidden, mask))
        return logits if labels is None else nn.functional.cross_entropy(logits, labels)

    def features(self, hidden: Tensor, mask: Tensor) -> Tensor:
        """Return the mean of the tokens after the upper layers, `[n, width]`."""
        seen = mask[:, None, None, :].expand(-1, 1, mask.shape[1], -1)
        # On a CPU, PyTorch's flash attention takes half the step for texts of 40 tokens.
        with sdpa_kernel(SDPBackend.MATH):
            for layer in self.layers:
                hidden = layer(hidden, seen)
                hidden = hidden[0] if isinstance(hidden, tuple) else hidden
        weights = mask.unsqueeze(-1).float()
        return (hidden * weights).sum(1) / weights.sum(1)


@lru_cache(maxsize=1)
def _encoder() -> tuple[Any, Any]:
    from transformers import AutoModel, AutoTokenizer

    folder = str(MODEL.folder())
    model = AutoModel.from_pretrained(folder).eval().requires_grad_(False)
    return model, AutoTokenizer.from_pretrained(folder)


def upper_layers(count: int) -> nn.ModuleList:
    """Return the last layers of the encoder."""
    return _encoder()[0].encoder.layer[-count:]


@torch.no_grad()
def name_head(names: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Return a classifier that compares a text with the names of the labels: the directions of the
    encoder's outputs for the names, `[classes, width]`, and zero biases.
    """
    model, tokenizer = _encoder()
    batch = tokenizer(list(names), padding=True, return_tensors="pt")
    hidden = model(**batch).last_hidden_state
    weights = batch["attention_mask"].unsqueeze(-1).float()
    means = (hidden * weights).sum(1) / weights.sum(1)
    return nn.functional.normalize(means, dim=1), torch.zeros(len(names))


def states(task: Task, upper: int) -> dict[str, States]:
    """Return the lower layers' outputs by part, from the cache folder where they are there."""
    key = json.dumps([task.digest, MODEL.sha256, upper, TOKENS])
    path = cache() / "states" / f"{hashlib.sha256(key.encode()).hexdigest()[:24]}.safetensors"
    if not path.exists():
        _write(task, upper, path)
    with safe_open(path, "pt") as file:
        return {
            part: States(
                *(file.get_tensor(f"{part}.{name}") for name in ("hidden", "ends", "labels"))
            )
            for part in PARTS
        }


@torch.no_grad()
def _write(task: Task, upper: int, path: Path) -> None:
    tensors = {}
    for part in PARTS:
        texts, rows = task.texts[part], []
        order = sorted(range(len(texts)), key=lambda n: len(texts[n]))
        found: dict[int, Tensor] = {}
        for first in range(0, len(order), 64):
            numbers = order[first : first + 64]
            found.update(zip(numbers, _lower([texts[n] for n in numbers], upper), strict=True))
        rows = [found[n] for n in range(len(texts))]
        tensors[f"{part}.hidden"] = torch.cat(rows)
        tensors[f"{part}.ends"] = torch.tensor([0, *(len(row) for row in rows)]).cumsum(0)
        tensors[f"{part}.labels"] = torch.tensor(task.labels[part])
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(f".{id(task)}.part")
    save_file(tensors, unfinished)
    unfinished.replace(path)


def _lower(texts: list[str], upper: int) -> list[Tensor]:
    """Return the lower layers' outputs of each text, `[tokens, width]`, in float16."""
    model, tokenizer = _encoder()
    batch = tokenizer(texts, padding=True, truncation=True, max_length=TOKENS, return_tensors="pt")
    outputs = model(**batch, output_hidden_states=True)
    hidden = outputs.hidden_states[-1 - upper].half()
    return [row[: int(n)] for row, n in zip(hidden, batch["attention_mask"].sum(1), strict=True)]
