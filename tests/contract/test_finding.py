# SPDX-License-Identifier: Apache-2.0
"""Where checkpoints are looked for: a path is never asked of the Hub, and what is said of a
misspelt one.
"""

import re
import shutil
from pathlib import Path

import huggingface_hub
import pytest
from helpers.models import mlp
from huggingface_hub.errors import EntryNotFoundError, HFValidationError, LocalEntryNotFoundError
from safetensors.torch import load_file

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


@pytest.mark.parametrize(
    "source",
    [
        "/nowhere",
        "./runs",
        "../none",
        ".hidden",
        "~",
        "~me/x",
        "a\\b",
        "a/b/c",
        "name/",
        Path("a/b"),
    ],
    ids=str,
)
def test_what_can_not_be_a_repository_is_not_even_looked_up_in_the_cache(folders, asked, source):
    with pytest.raises(FileNotFoundError, match=r"Can't find 'adapter_config\.json'"):
        PeftConfig.from_pretrained(source)
    assert asked == []


@pytest.mark.parametrize(
    "option", ["revision", "repo_type", "token", "cache_dir", "force_download", "use_auth_token"]
)
def test_an_option_for_the_hub_says_that_it_is_to_be_asked(folders, asked, option):
    for value in (True, None):  # None is the same as no option
        asked.clear()
        with pytest.raises(FileNotFoundError):
            PeftConfig.from_pretrained("runs/adaptr", **{option: value})
        assert asked == [("runs/adaptr", "adapter_config.json", value is None)]


def test_the_hub_is_told_what_the_caller_says(folders, monkeypatch):
    told, obsolete = [], {"resume_download": True, "proxies": {}, "etag_timeout": 3}

    def download(repo, name, **options):
        told.append(options)
        return str(folders / "runs" / "adapter" / name)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    options = {
        "cache_dir": "c", "force_download": True, "local_files_only": True, "repo_type": "model",
        "revision": "r", "subfolder": "s", "token": "t", "user_agent": "u",
    }  # fmt: skip
    load_peft_weights("me/it", **options, **obsolete, use_auth_token="old", device_map="auto")
    load_peft_weights("me/it", use_auth_token="old", revision=None)
    assert told == [options, {"token": "old"}]
    with pytest.warns(UserWarning, match="^load_peft_weights got unexpected .*: b, foo; they have"):
        load_peft_weights("runs/adapter", foo=1, b=2, resume_download=True)


def test_a_hub_that_lacks_a_file_is_asked_for_the_next(folders, monkeypatch):
    asked, errors = [], []

    def download(repo, name, local_files_only=False):
        asked.append((name, local_files_only))
        if errors:
            raise errors.pop(0)
        return str(folders / "runs" / "adapter" / "adapter_model.safetensors")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    first, second = "adapter_model.safetensors", "adapter_model.bin"
    for given, expected in (
        ([EntryNotFoundError("no such file")], [(first, False), (second, False)]),
        ([LocalEntryNotFoundError("away")], [(first, False), (second, True)]),
        ([HFValidationError("no name of a repository")], [(first, False)]),
        ([OSError("broken")], [(first, False)]),
        (
            [EntryNotFoundError("no 1"), EntryNotFoundError("no 2")],
            [(first, False), (second, False)],
        ),
    ):
        asked.clear()
        errors[:] = given
        if len(given) < len(expected):
            assert load_peft_weights("me/it")
        else:
            with pytest.raises(FileNotFoundError, match=f"at 'me/it': it is neither .*{given[-1]}"):
                load_peft_weights("me/it")
        assert asked == expected


def test_similar_folders_are_named_three_at_most(folders, monkeypatch):
    for name in ("adapter1", "adapter2", "adapter3", ".adaptr", "other"):
        shutil.copytree("runs/adapter", f"runs/{name}")
    Path("runs/adaptr1").touch()
    message = r"\(did you mean '([^']*)' or '([^']*)' or '([^']*)'\?\)"
    with pytest.raises(FileNotFoundError, match=message) as info:
        load_peft_weights("./runs/adaptr")
    near = set(re.search(message, str(info.value)).groups())
    assert "runs/adapter" in near and near < {f"runs/adapter{i}" for i in ("", 1, 2, 3)}

    def fail(path):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "iterdir", fail)  # nothing can be said then
    with pytest.raises(FileNotFoundError, match=r"there is no folder './runs/adaptr'\.$"):
        load_peft_weights("./runs/adaptr")


def test_four_sub_folders_are_named(folders):
    for i in range(5):
        shutil.copytree("runs/adapter", f"many/{i}")
    Path("empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"; its sub-folders '0', '1', '2', '3' have one"):
        load_peft_weights("many")
    with pytest.raises(FileNotFoundError, match=r"in the folder 'empty'\.$"):
        load_peft_weights("empty")


def test_keys_are_renamed_by_the_first_pattern_that_matches(folders):
    saved = load_file("runs/adapter/adapter_model.safetensors")
    ends = ("lora_A.weight", "lora_B.weight")
    assert set(saved) == {f"base_model.model.0.{end}" for end in ends}
    mapping = {r"^model": "none", r"^(\d)\.": r"first\1.", r"first0": "second", r"lora": "third"}
    found = load_peft_weights("runs/adapter", key_mapping=mapping)
    assert set(found) == {f"base_model.model.first0.{end}" for end in ends}
    assert set(load_peft_weights("runs/adapter", key_mapping={"^none": "x"})) == set(saved)


def test_what_is_no_path_is_no_source(folders):
    with pytest.raises(TypeError, match="Expected a folder's path.*got 3"):
        load_peft_weights(3)
