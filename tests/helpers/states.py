# SPDX-License-Identifier: Apache-2.0
"""Comparisons of models and numbers."""

import torch


def snapshot(model):
    """All that an error must leave alone."""
    return {
        "state": {name: tensor.clone() for name, tensor in model.state_dict().items()},
        "requires_grad": {
            name: parameter.requires_grad for name, parameter in model.named_parameters()
        },
        "modules": {
            name: (type(module).__name__, module.training) for name, module in model.named_modules()
        },
        "rng": torch.get_rng_state(),
    }


def assert_unchanged(before, model):
    after = snapshot(model)
    assert after["requires_grad"] == before["requires_grad"]
    assert after["modules"] == before["modules"]
    assert torch.equal(after["rng"], before["rng"])
    assert after["state"].keys() == before["state"].keys()
    for name, tensor in before["state"].items():
        torch.testing.assert_close(after["state"][name], tensor, rtol=0, atol=0, equal_nan=True)


def assert_rounded(actual, expected, terms=256):
    """Assert that two ways to compute the same differ by rounding alone.

    Each number is a sum of products on the way of which at most `terms` numbers are added, so two
    orders of adding them are apart by at most `terms` units in the last place of the largest. The
    small models here have two layers with some seven products of width 16 or 24.
    """
    size = max(1.0, expected.detach().abs().max().item())
    torch.testing.assert_close(
        actual, expected, rtol=0, atol=terms * torch.finfo(expected.dtype).eps * size
    )
