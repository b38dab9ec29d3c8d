# SPDX-License-Identifier: Apache-2.0
"""Real images in three disjoint parts: to pretrain the base, to adapt to the tasks, and to test.

The parts are split by picture, once: a test picture is held out from pretraining and from all tasks
in every rotation.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff"}
SHARES = {"pretrain": 0.4, "adapt": 0.4, "test": 0.2}


@dataclass(frozen=True)
class Images:
    """``pixels [n, channels, side, side]`` in [0, 1] and ``labels [n]``."""

    pixels: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, index: Tensor) -> Images:
        return Images(self.pixels[index], self.labels[index])


@dataclass(frozen=True)
class Data:
    """The three parts, and the classes' names by label."""

    pretrain: Images
    adapt: Images
    test: Images
    classes: dict[int, str]


def load_digits() -> tuple[Images, list[str]]:
    """The 1,797 handwritten digits of 8 x 8 pixels that come with scikit-learn."""
    from sklearn import datasets

    digits = datasets.load_digits()
    pixels = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
    return Images(pixels, torch.tensor(digits.target)), [str(digit) for digit in range(10)]


def load_folder(folder: Path, side: int, channels: int) -> tuple[Images, list[str]]:
    """Read ``folder/<class>/<image>``, each image resized to ``side x side``.

    Raises:
        ValueError: Fewer than two classes, or a class with fewer than five images.
    """
    import numpy as np
    from PIL import Image

    files = {
        sub.name: sorted(file for file in sub.iterdir() if file.suffix.lower() in SUFFIXES)
        for sub in sorted(folder.iterdir())
        if sub.is_dir()
    }
    small = [f"{name} ({len(found)})" for name, found in files.items() if len(found) < 5]
    if len(files) < 2 or small:
        raise ValueError(
            f"{folder}: expected at least two sub-folders, one a class, with five images each; "
            f"found {len(files)} sub-folders"
            + (f", too small: {', '.join(small)}" if small else "")
        )
    mode = "L" if channels == 1 else "RGB"
    pixels, labels = [], []
    for label, found in enumerate(files.values()):
        for file in found:
            with Image.open(file) as image:
                array = np.asarray(image.convert(mode).resize((side, side)), dtype=np.float32) / 255
            pixels.append(torch.from_numpy(array.reshape(side, side, -1)).permute(2, 0, 1))
            labels.append(label)
    return Images(torch.stack(pixels), torch.tensor(labels)), list(files)


def fit_to(images: Images, side: int, channels: int) -> Images:
    """Resize images, and repeat gray channels, to a model's input shape."""
    pixels = images.pixels
    if pixels.shape[-1] != side:
        pixels = F.interpolate(pixels, size=(side, side), mode="bilinear", antialias=True).clamp(
            0, 1
        )
    if pixels.shape[1] != channels:
        pixels = pixels.mean(1, keepdim=True).expand(-1, channels, -1, -1).contiguous()
    return Images(pixels, images.labels)


def split(images: Images, classes: dict[int, str], seed: int) -> Data:
    """Cut every class at random by ``SHARES``, so that all parts hold all classes."""
    generator = torch.Generator().manual_seed(seed)
    parts: dict[str, list[Tensor]] = {name: [] for name in SHARES}
    for label in images.labels.unique():
        members = (images.labels == label).nonzero().squeeze(1)
        members = members[torch.randperm(len(members), generator=generator)]
        first = max(1, round(SHARES["pretrain"] * len(members)))
        last = min(len(members) - 1, round((1 - SHARES["test"]) * len(members)))
        for name, index in zip(SHARES, members.tensor_split([first, last]), strict=True):
            parts[name].append(index)
    return Data(
        **{name: images.take(torch.cat(index)) for name, index in parts.items()}, classes=classes
    )


@dataclass(frozen=True)
class Shape:
    """What the model takes: pixels ``[n, channels, side, side]``, and its own numbers for the
    classes, if it has any.
    """

    side: int
    channels: int
    label_ids: dict[str, int]


def load_data(folder: Path | None, shape: Shape, seed: int) -> Data:
    """Load the user's folder, else the digits. A seed gives the same parts in any process."""
    images, classes = load_folder(folder, shape.side, shape.channels) if folder else load_digits()
    images = fit_to(images, shape.side, shape.channels)
    labels = list(range(len(classes)))
    if set(classes) <= set(shape.label_ids):
        labels = [shape.label_ids[name] for name in classes]
        images = Images(images.pixels, torch.tensor(labels)[images.labels])
    return split(images, dict(zip(labels, classes, strict=True)), seed)
