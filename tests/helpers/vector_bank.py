# SPDX-License-Identifier: Apache-2.0
"""The tiles that logits select from a vector bank, without their layout in a factor."""

from torch import Tensor

from peft.tuners.vblora.bank import compose_factors


def compose(logits: Tensor, bank: Tensor, topk: int) -> Tensor:
    """The tiles of `A` in `compose_factors`, for logits of any leading shape."""
    logits_A, none = logits.reshape(1, -1, logits.shape[-1]), logits.new_zeros(0, 1, bank.shape[0])
    A, _ = compose_factors(logits_A, none, bank, topk)
    return A.reshape(*logits.shape[:-1], bank.shape[1])
