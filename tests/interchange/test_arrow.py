# SPDX-License-Identifier: Apache-2.0
"""Arrow routing over the same LoRA adapters computes what Hugging Face PEFT's does."""

import pytest
import torch

pytestmark = [pytest.mark.processes, pytest.mark.xdist_group("interchange")]


def test_arrow_is_that_of_the_peer(packages, tmp_path):
    found = {}
    for name in ("theirs", "ours"):  # the first writes the adapters
        packages[name].order("arrow", str(tmp_path / "experts"), 3)
        found[name] = packages[name].answer("arrow")
    assert len(found["ours"]) == 5
    outputs = list(found["ours"].values())
    assert (outputs[0] - outputs[1]).abs().max() > 1e-3  # the options matter
    for key, output in found["ours"].items():
        torch.testing.assert_close(output, found["theirs"][key], rtol=0, atol=1e-5, msg=key)
