# SPDX-License-Identifier: Apache-2.0
"""A folder with a small adapter of each method, and users over one vector bank; copied per test."""

import shutil

import pytest
import torch
from helpers.methods import METHODS
from helpers.models import TARGETS, mlp
from helpers.users import USERS, save_user

from peft import VectorBank, get_peft_model


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    """The folder that tests copy: `methods/<name>`, `users/<name>`, `bank`."""
    root = tmp_path_factory.mktemp("made")
    torch.manual_seed(0)
    for name, method in METHODS.items():
        model = get_peft_model(mlp(), method.config(target_modules=TARGETS))
        model.peft_config["default"].base_model_name_or_path = f"base/{name.lower()}"
        model.save_pretrained(root / "methods" / name.lower())
    VectorBank(torch.randn(12, 4)).save_pretrained(root / "bank")
    for seed, name in enumerate(USERS):
        save_user(root / "users" / name, "bank", root, seed)
    return root


@pytest.fixture
def folder(made, tmp_path):
    """A copy of the folder."""
    return shutil.copytree(made, tmp_path / "library")
