# SPDX-License-Identifier: Apache-2.0
"""With what the package's metadata asks for, and nothing else, adapters train, save and load."""

import os
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, packages_distributions, requires

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

# Only what is installed without extras can be imported.
BARE = """
import sys

class Without:
    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] not in ABSENT:
            return self.finder.find_spec(name, path, target)

ABSENT = set(sys.argv[1].split(","))
sys.meta_path = [Without(finder) for finder in sys.meta_path]

import tempfile
import warnings
from pathlib import Path

warnings.simplefilter("error")
import torch
from torch import nn

import peft
from peft.cli.program import program

CONFIGS = (
    peft.PolyConfig(r=2, n_tasks=2, target_modules=["0"]),
    peft.VBLoRAConfig(r=2, num_vectors=6, vector_length=4, target_modules=["0"]),
    peft.LoKrConfig(r=2, target_modules=["0"], init_weights=False),
    peft.LoHaConfig(r=2, target_modules=["0"], init_weights=False),
    peft.LoraConfig(r=2, target_modules=["0"], init_lora_weights=False),
)
root = Path(tempfile.mkdtemp())
for config in CONFIGS:
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(8, 8))
    weights = {name: value.clone() for name, value in base.state_dict().items()}
    model = peft.get_peft_model(base, config)
    tasks = {"task_ids": [0, 1]} if config.peft_type == "POLY" else {}
    x = torch.randn(2, 8)
    optimizer = peft.optimizers.create_optimizer(model, lr=1e-2)
    model(x, **tasks).square().sum().backward()
    optimizer.step()
    expected = model.eval()(x, **tasks)
    folder = root / config.peft_type
    model.save_pretrained(folder)
    again = nn.Sequential(nn.Linear(8, 8))
    again.load_state_dict(weights)
    again = peft.PeftModel.from_pretrained(again, folder)
    torch.testing.assert_close(again(x, **tasks), expected)
    program(["inspect", str(folder)], standalone_mode=False)
library = peft.AdapterLibrary(root)
assert len(library) == len(CONFIGS), library
"""


def asked_for(name, extras=()):
    """Return the names of a distribution and all that it needs."""
    names, ahead = set(), [(name, frozenset(extras))]
    while ahead:
        name, extras = ahead.pop()
        if (name, extras) in names:
            continue
        names.add((name, extras))
        try:
            lines = requires(name) or []
        except PackageNotFoundError:
            continue
        for requirement in map(Requirement, lines):
            marker = requirement.marker
            if marker is None or any(marker.evaluate({"extra": e}) for e in extras or [""]):
                ahead.append((canonicalize_name(requirement.name), frozenset(requirement.extras)))
    return {name for name, _ in names}


def test_nothing_else_is_needed():
    """Modules of distributions that neither the package nor what it needs asks for are hidden."""
    given = asked_for("peft")
    absent = {
        module
        for module, owners in packages_distributions().items()
        if given.isdisjoint(map(canonicalize_name, owners))
    }
    assert {"transformers", "scipy", "pandas"} <= absent
    assert "torch" not in absent
    done = subprocess.run(
        [sys.executable, "-c", BARE, ",".join(sorted(absent))],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
