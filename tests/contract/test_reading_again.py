# SPDX-License-Identifier: Apache-2.0
"""Reading config and weights as those of one save, while others write."""

import pytest
import torch
from helpers.models import mlp

from peft import LoraConfig, get_peft_model
from peft.base.errors import CheckpointError
from peft.checkpoint.hub import load_peft_weights, of_one_save

pytestmark = pytest.mark.quick
WEIGHTS = "adapter_model.safetensors"


def test_what_is_always_replaced_is_given_up(tmp_path):
    reads = []

    def read():
        reads.append((tmp_path / WEIGHTS).write_bytes(b"x" * (len(reads) + 1)))
        raise ValueError  # of a half-written file

    with pytest.raises(CheckpointError, match="is written again and again; try it again later"):
        of_one_save(tmp_path, None, read)
    assert len(reads) == 100


@pytest.mark.parametrize("replaced", [0, 1, 3])
def test_what_was_replaced_meanwhile_is_read_again(tmp_path, replaced):
    reads = []

    def read():
        reads.append(1)
        if len(reads) <= replaced:
            (tmp_path / WEIGHTS).write_bytes(b"x" * len(reads))
            raise ValueError
        return len(reads)

    assert of_one_save(tmp_path, None, read) == replaced + 1


def test_an_error_of_files_that_stay_is_raised(tmp_path):
    with pytest.raises(ZeroDivisionError):
        of_one_save(tmp_path, None, lambda: 1 / 0)


def test_a_device_that_is_none(tmp_path):
    get_peft_model(mlp(), LoraConfig(target_modules=["0"])).save_pretrained(tmp_path)
    first = [] if torch.cuda.is_available() else [0]
    for device in ("nowhere", 1.5, "meta", "cuda:99", 99, 10**30, *first):
        with pytest.raises(ValueError, match=f"{device!r} is not a device with .* pass 'cpu'"):
            load_peft_weights(tmp_path, device)
    for device in (None, "cpu", "cpu:0"):
        tensors = load_peft_weights(tmp_path, device).values()
        assert all(tensor.device == torch.device("cpu") for tensor in tensors)
