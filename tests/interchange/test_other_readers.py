# SPDX-License-Identifier: Apache-2.0
"""What a file says that Hugging Face PEFT does not know makes it refuse the file, not read half of
it.
"""

import re

import pytest
import torch
from torch import nn

from peft import VBLoRAConfig, VectorBank, get_peft_model

pytestmark = [pytest.mark.processes, pytest.mark.xdist_group("interchange")]

FORMS = {
    "plain": ({}, "^read$"),
    "compact": ({"save_only_topk_weights": True}, "^read$"),
    "shared": ({"bank": "bank"}, r"size mismatch.*vector_bank.*\[0, 4\]"),
    "shared compact": (
        {"bank": "bank", "save_only_topk_weights": True},
        r"size mismatch.*vector_bank.*\[0, 4\]",
    ),
    "gate": ({"output_gate": True}, r"size mismatch.*vector_bank.*\[1, 10, 4\]"),
    "half": ({"save_only_topk_weights": True, "topk_weights_dtype": "float16"}, "dtype"),
    "cut": ({"pad_last_tile": True, "vector_length": 3}, "divisible"),
}


@pytest.fixture(scope="module")
def answers(packages):
    """What Hugging Face PEFT says to a file of each form."""
    peer = packages["theirs"]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(peer.folder)
        VectorBank(torch.randn(10, 4)).save_pretrained("bank")
        for form, (fields, _) in FORMS.items():
            config = VBLoRAConfig(
                **{
                    "r": 2,
                    "num_vectors": 10,
                    "vector_length": 4,
                    "target_modules": ["0", "1"],
                    **fields,
                }
            )
            get_peft_model(
                nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 8)), config
            ).save_pretrained(form)
    peer.order("look", list(FORMS))
    return peer.answer("look")


@pytest.mark.parametrize("form", FORMS)
def test_a_form_is_read_or_refused(answers, form):
    assert re.search(FORMS[form][1], answers[form], re.DOTALL), answers[form]
