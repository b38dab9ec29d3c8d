# SPDX-License-Identifier: Apache-2.0
"""The frozen model that all methods adapt: a small residual network, trained on upright digits."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..multitask_digits.data import Data, Images

WIDTH, BLOCKS = 128, 3


class Block(nn.Module):
    """`x + down(relu(up(norm(x))))`."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up, self.down = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.up(self.norm(x)).relu())


class Net(nn.Module):
    """Logits `[batch, 10]` of pixels `[batch, 1, 8, 8]` in [0, 1]; 109,000 parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(64, WIDTH), nn.Linear(WIDTH, 10)
        self.blocks = nn.ModuleList(Block() for _ in range(BLOCKS))

    def forward(self, pixels: Tensor) -> Tensor:
        x = self.stem(2 * pixels.flatten(1) - 1)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def batches(images: Images, rows: int, generator: torch.Generator) -> Iterator[Images]:
    """Yield shuffled batches without end."""
    while True:
        for index in torch.randperm(len(images), generator=generator).split(rows)[
            : len(images) // rows
        ]:
            yield images.take(index)


def fit(model: nn.Module, groups: list[dict], inputs: Iterator[Images], steps: int) -> None:
    """Train with AdamW and clipped gradients: a tenth of the steps warm up, then the rate falls
    linearly.
    """
    optimiser, warm = torch.optim.AdamW(groups, weight_decay=0.0), max(1, steps // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda s: min((s + 1) / warm, (steps - s) / max(1, steps - warm))
    )
    parameters = [parameter for group in optimiser.param_groups for parameter in group["params"]]
    model.train()
    for _ in range(steps):
        some = next(inputs)
        optimiser.zero_grad()
        F.cross_entropy(model(some.pixels), some.labels).backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        schedule.step()
    model.eval()


@torch.no_grad()
def accuracy(model: nn.Module, images: Images) -> float:
    """Return the share of images that the model classifies correctly."""
    return float((model(images.pixels).argmax(1) == images.labels).float().mean())


def make_base(data: Data, steps: int, generator: torch.Generator) -> Net:
    """Return a frozen network, trained on the upright pictures of the pretraining part."""
    net = Net()
    fit(
        net,
        [{"params": list(net.parameters()), "lr": 2e-3}],
        batches(data.pretrain, 64, generator),
        steps,
    )
    return net.requires_grad_(False)
