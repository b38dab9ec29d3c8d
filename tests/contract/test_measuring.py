"""A model that was run to measure its layers' inputs is as it was."""

import pytest
import torch
from torch import nn

from peft.core.measuring import watched_inputs


def test_a_watched_model_is_as_it_was_after_an_error():
    model = nn.Sequential(nn.Linear(3, 4), nn.Dropout(), nn.Linear(4, 2)).train()
    model[1].eval()
    model[2].register_forward_pre_hook(lambda module, args: None)
    seen = []

    def note(path, args):
        seen.append((path, args[0].shape, torch.is_grad_enabled(), model.training))
        if path == "2":
            raise RuntimeError("stop")

    with (
        pytest.raises(RuntimeError, match="stop"),
        watched_inputs(model, {"0": model[0], "2": model[2]}, note),
    ):
        model(torch.randn(5, 3))
    assert seen == [("0", (5, 3), False, False), ("2", (5, 4), False, False)]
    assert [len(m._forward_pre_hooks) for m in model] == [0, 0, 1]
    assert [m.training for m in (model, *model)] == [True, True, False, True]
    assert model(torch.randn(5, 3)).requires_grad
