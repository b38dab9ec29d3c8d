# SPDX-License-Identifier: Apache-2.0
"""The frozen model that all methods adapt: a small ViT pretrained upright, or the user's own."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import (
    AutoConfig,
    AutoModelForImageClassification,
    PreTrainedModel,
    ViTConfig,
    ViTForImageClassification,
)

from .data import Data, Shape


@dataclass
class Base:
    """A transformers image classifier and the normalization of its input."""

    model: PreTrainedModel
    mean: list[float]
    std: list[float]

    def prepare(self, pixels: Tensor) -> Tensor:
        """Normalize ``pixels [n, channels, side, side]`` from [0, 1] as in the model's training."""
        mean, std = (torch.tensor(values).view(1, -1, 1, 1) for values in (self.mean, self.std))
        return (pixels - mean) / std


def input_shape(model_folder: Path | None, data_folder: Path | None, side: int) -> Shape:
    """Input shape of the given model, else of the digits, else a color square of ``side``."""
    if not model_folder:
        return Shape(side, 3, {}) if data_folder else Shape(8, 1, {})
    config = AutoConfig.from_pretrained(model_folder, local_files_only=True)
    size = getattr(config, "image_size", 224)
    side = size if isinstance(size, int) else size[0]
    return Shape(side, getattr(config, "num_channels", 3), config.label2id)


def small_vit(side: int, channels: int, classes: list[str]) -> ViTForImageClassification:
    """A ViT of 71,000 parameters that reads a picture as 2 x 2 patches (8 x 8 for larger ones)."""
    return ViTForImageClassification(
        ViTConfig(
            image_size=side,
            patch_size=max(1, side // (2 if side <= 16 else 8)),
            num_channels=channels,
            hidden_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=128,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            id2label=dict(enumerate(classes)),
            label2id={name: label for label, name in enumerate(classes)},
        )
    )


def load_folder_model(folder: Path, classes: list[str]) -> tuple[Base, list[str]]:
    """Load the user's model. Its head stays if it knows all the classes; otherwise it gets a new
    one.

    Returns:
        The base, and the parameters' names that pretraining has to train (none if the head is
        kept).
    """
    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    known = set(classes) <= set(config.id2label.values())
    names = (
        {}
        if known
        else {
            "id2label": dict(enumerate(classes)),
            "label2id": {c: i for i, c in enumerate(classes)},
        }
    )
    model = AutoModelForImageClassification.from_pretrained(
        folder, local_files_only=True, ignore_mismatched_sizes=True, **names
    )
    base = Base(model, *normalization(folder, getattr(config, "num_channels", 3)))
    head = [name for name, _ in model.named_parameters() if "classifier" in name]
    return base, [] if known else head


def normalization(folder: Path, channels: int) -> tuple[list[float], list[float]]:
    """Mean and deviation of ``preprocessor_config.json``, or one half."""
    file = folder / "preprocessor_config.json"
    stored = json.loads(file.read_text()) if file.exists() else {}
    return stored.get("image_mean", [0.5] * channels), stored.get("image_std", [0.5] * channels)


def save_base(base: Base, folder: Path) -> None:
    """Write model and normalization so that ``load_folder_model`` reads them back."""
    base.model.save_pretrained(folder)
    stored = {"image_mean": base.mean, "image_std": base.std}
    (folder / "preprocessor_config.json").write_text(json.dumps(stored, indent=2) + "\n")


def make_base(model_folder: Path | None, data: Data, epochs: int) -> Base:
    """Load or build the base, pretrain its new weights on upright pictures, and freeze it."""
    side, channels = data.test.pixels.shape[-1], data.test.pixels.shape[1]
    if model_folder:
        base, new = load_folder_model(model_folder, list(data.classes.values()))
    else:
        base = Base(
            small_vit(side, channels, list(data.classes.values())),
            [0.5] * channels,
            [0.5] * channels,
        )
        new = [name for name, _ in base.model.named_parameters()]
    if new:
        pretrain(base, data, new, epochs)
    base.model.requires_grad_(False)
    base.model.eval()
    return base


def pretrain(
    base: Base, data: Data, names: list[str], epochs: int, batch: int = 64, rate: float = 2e-3
) -> None:
    """Supervised training of the parameters in ``names`` on the pretraining part, upright."""
    model, images = base.model, data.pretrain
    parameters = [
        parameter.requires_grad_(name in names) for name, parameter in model.named_parameters()
    ]
    parameters = [parameter for parameter in parameters if parameter.requires_grad]
    steps = epochs * -(-len(images) // batch)
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, rate, total_steps=steps, pct_start=0.1
    )
    model.train()
    with tqdm(
        total=steps, desc=f"{'pretraining the base':28s}", unit="step", dynamic_ncols=True
    ) as bar:
        for _ in range(epochs):
            for index in torch.randperm(len(images)).split(batch):
                some = images.take(index)
                loss = model(pixel_values=base.prepare(some.pixels), labels=some.labels).loss
                optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(parameters, 1.0)
                optimizer.step()
                schedule.step()
                bar.update()
            bar.set_postfix(loss=f"{loss.item():.2f}")
