# SPDX-License-Identifier: Apache-2.0
"""Where checkpoints are looked for: a path is never asked of the Hub, and what is said of a
misspelt one.
"""

import re
from pathlib import Path

import huggingface_hub
import pytest
from helpers.models import mlp
from huggingface_hub.errors import LocalEntryNotFoundError

from peft import LoraConfig, PeftConfig, PeftModel, VectorBank, get_peft_model, load_peft_weights


@pytest.fixture
def asked(monkeypatch):
    """What the Hub is asked; it is away."""
    asked = []

    def download(repo, name, local_files_only=False, **options):
        asked.append((repo, name, local_files_only))
        raise LocalEntryNotFoundError("The Hub is away.")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    return asked


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """A working directory with adapters in `runs/adapter` and `runs/several/second`."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    config = LoraConfig(target_modules=["0"])
    get_peft_model(mlp(), config).save_pretrained("runs/adapter")
    get_peft_model(mlp(), config, adapter_name="second").save_pretrained("runs/several")
    return tmp_path


WRONG = [
    ("runs/adaptr", r"there is no folder 'runs/adaptr' \(did you mean 'runs/adapter'\?\)"),
    ("./runs/adaptr", r"no folder './runs/adaptr' \(did you mean 'runs/adapter'\?\)"),
    ("rums/adapter/x", r"no folder 'rums/adapter/x' \(did you mean 'runs'\?\)"),
    (
        "rusn",
        r"no folder 'rusn' \(did you mean 'runs'\?\).*named 'owner/name'.*pass `revision='main'`",
    ),
    ("~/runs/adapter", r"`~` is not replaced; did you mean '.*/runs/adapter'\?"),
    ("some/where/else", r"no folder 'some/where/else' \('.' has no 'some'\)"),
    ("C:\\runs\\adapter", r"no folder 'C:\\runs\\adapter'"),
    ("runs/adapter/adapter_model.safetensors", "is a file; give the path of the folder"),
    (
        "runs/several",
        r"in the folder 'runs/several'; its sub-folders 'second' have one \(`subfolder=…`\)",
    ),
    (Path("some") / "where", r"no folder 'some/where'"),
]


@pytest.mark.parametrize(("source", "message"), WRONG, ids=lambda value: str(value)[:30])
def test_a_path_is_not_asked_of_the_hub(folders, asked, source, message):
    for read in (PeftConfig.from_pretrained, VectorBank.from_pretrained, load_peft_weights):
        with pytest.raises(FileNotFoundError) as info:
            read(source)
        if "sub-folders" not in message or read == PeftConfig.from_pretrained:
            assert re.search(message, str(info.value))
    assert all(is_local for _, _, is_local in asked)


def test_a_misspelt_subfolder(folders, asked):
    with pytest.raises(
        FileNotFoundError,
        match=r"'runs/several/secnd', which does not exist \(did you mean 'runs/several/second'",
    ):
        PeftModel.from_pretrained(mlp(), "runs/several", subfolder="secnd")
    assert not asked


def test_the_hub_is_asked_once_for_what_can_be_a_repository(folders, asked):
    with pytest.raises(
        FileNotFoundError, match=r"'someone/something'.*neither a local folder.*The Hub is away"
    ):
        load_peft_weights("someone/something")
    names = ("adapter_model.safetensors", "adapter_model.bin")
    assert asked == [
        ("someone/something", name, local) for name, local in zip(names, (False, True), strict=True)
    ]
    asked.clear()
    with pytest.raises(FileNotFoundError):
        PeftConfig.from_pretrained("runs/adaptr", revision="main")  # said to be one
    assert asked == [("runs/adaptr", "adapter_config.json", False)]
