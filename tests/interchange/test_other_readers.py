# SPDX-License-Identifier: Apache-2.0
"""What a file says that Hugging Face PEFT does not know makes it refuse the file, not read half of it."""

import json
import os
import re
import subprocess
import sys

import pytest
import torch
from test_interchange import PEER
from torch import nn

from peft import VBLoRAConfig, VectorBank, get_peft_model

pytestmark = [pytest.mark.processes, pytest.mark.xdist_group("interchange")]

READ = """
import json, sys, torch, peft
found = {}
for folder in sys.argv[1:]:
    base = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Linear(16, 8))
    try:
        peft.PeftModel.from_pretrained(base, folder)
        found[folder] = "read"
    except Exception as error:
        found[folder] = str(error)
print(json.dumps(found))
"""
FORMS = {
    "plain": ({}, "^read$"),
    "compact": ({"save_only_topk_weights": True}, "^read$"),
    "shared": ({"bank": "bank"}, r"size mismatch.*vector_bank.*\[0, 4\]"),
    "shared compact": ({"bank": "bank", "save_only_topk_weights": True}, r"size mismatch.*vector_bank.*\[0, 4\]"),
    "gate": ({"output_gate": True}, r"size mismatch.*vector_bank.*\[1, 10, 4\]"),
    "half": ({"save_only_topk_weights": True, "topk_weights_dtype": "float16"}, "dtype"),
    "cut": ({"pad_last_tile": True, "vector_length": 3}, "divisible"),
}


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    """What Hugging Face PEFT says to a file of each form."""
    if not (PEER / "peft").is_dir():
        message = f"Hugging Face PEFT is not in {PEER}; `make test` puts it there."
        pytest.fail(message) if os.environ.get("CI") else pytest.skip(message)
    root = tmp_path_factory.mktemp("forms")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        VectorBank(torch.randn(10, 4)).save_pretrained("bank")
        for form, (fields, _) in FORMS.items():
            config = VBLoRAConfig(**{"r": 2, "num_vectors": 10, "vector_length": 4, "target_modules": ["0", "1"], **fields})
            get_peft_model(nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 8)), config).save_pretrained(form)
    command = [sys.executable, "-W", "ignore", "-c", READ, *FORMS]
    env = {"PYTHONPATH": str(PEER), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PATH": ""}
    done = subprocess.run(command, env=env, cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("form", FORMS)
def test_a_form_is_read_or_refused(answers, form):
    assert re.search(FORMS[form][1], answers[form], re.DOTALL), answers[form]
