# SPDX-License-Identifier: Apache-2.0
"""The files that are damaged, and what reads them: loads into models, commands, parsers alone."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

import peft
from peft import AdapterLibrary, AdapterPack, PeftModel, VectorBank
from peft.checkpoint.digests import adapter_digest
from peft.checkpoint.key_groups import group_keys, module_shapes
from peft.checkpoint.layout import read_layout
from peft.cli.program import program
from peft.inspection import inspect_adapter
from peft.library.configs import config_digest, config_from, facts_of
from peft.library.index import INDEX_NAME, IndexFile
from peft.utils.hotswap import hotswap_adapter

from .damage import Files
from .scenarios import METHODS, adapted, base

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
PACK = "users.adapters.safetensors"
# Module paths of a real model, for patterns in configs.
PATHS = (
    "model.layers.11.self_attn.q_proj",
    "model.layers.11.block_sparse_moe.experts.7.down_proj",
    "text_encoder.text_model.encoder.layers.11.self_attn.out_proj",
)


@dataclass
class Target:
    """A kind of files: how to write valid ones, and what reads them.

    Args:
        name: Its name.
        write: Writes them into a folder.
        read: Reads them into a model from the folder; a parser reads the files in memory.
        model: Makes the model.
        names_others: True if a config names folders of other adapters.
        is_parser: True if no model is needed and nothing is read from the folder.
        equals_file: True if the model's state dict then has the file's tensors.
    """

    name: str
    write: Callable[[Path], object]
    read: Callable[[Any, Any], object]
    model: Callable[[], nn.Module] = base
    names_others: bool = False
    is_parser: bool = False
    equals_file: bool = False


def targets() -> Iterator[Target]:
    """Yield the kinds of files, parsers last."""
    yield from _adapters()
    yield from _other_ways()
    yield from _lokr_files()
    yield from _libraries()
    yield from _commands()
    yield from parsers()


def _load(model: nn.Module, folder: Path, **options: Any) -> PeftModel:
    return PeftModel.from_pretrained(model, folder, **options)


def _adapters() -> Iterator[Target]:
    for method in METHODS:
        yield Target(f"{method} adapter", _writer(method), _load, equals_file=method != "VBLORA")
    yield Target(
        "LORA with rows, a head and norms",
        lambda f: _rows_and_head().save_pretrained(f),
        _load,
        _text,
    )
    yield Target("VBLORA over a shared bank", _over_a_bank, _load)
    yield Target("ROUTED adapter", partial(_routed, False), _load, names_others=True)
    yield Target(
        "ROUTED adapter with its experts", partial(_routed, True), _load, names_others=True
    )
    yield Target("legacy adapter", _writer("LORA", safe_serialization=False), _load)
    yield Target("vector bank", _bank().save_pretrained, lambda m, f: VectorBank.from_pretrained(f))


def _writer(method: str, scale: int = 2, **options: bool) -> Callable[[Path], object]:
    """Return a function that saves an adapter; it is made when it is needed."""
    return lambda folder: adapted(method, scale).save_pretrained(folder, **options)


def _lokr_file(layout: str, name: str = WEIGHTS) -> Callable[[Path], object]:
    return lambda folder: peft.save_lokr_file(adapted("LOKR", 2), folder / name, layout)


class _Text(nn.Module):
    """A model of tokens with a head."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(6, 8)
        self.norm = nn.LayerNorm(8)
        self.layers = nn.ModuleList(
            nn.ModuleDict({"q_proj": nn.Linear(8, 8), "conv": nn.Conv1d(8, 8, 3, padding=1)})
            for _ in range(2)
        )
        self.head = nn.Linear(8, 3)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Return a row of numbers for each token."""
        x = self.norm(self.tokens(ids))
        for layer in self.layers:
            x = x + layer["conv"](layer["q_proj"](x).mT).mT
        return self.head(x)


def _text() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return _Text().eval()


def _rows_and_head() -> PeftModel:
    config = peft.LoraConfig(
        r=2,
        target_modules=["q_proj", "conv"],
        modules_to_save=["head"],
        trainable_token_indices={"tokens": [1, 4]},
        use_dora=True,
        bias="lora_only",
        rank_pattern={"layers.1.q_proj": 3},
        alpha_pattern={"conv": 5.0},
        layers_to_transform=[0, 1],
        layers_pattern="layers",
        init_lora_weights=False,
    )
    return _seeded(_text, config)


def _seeded(make: Callable[[], nn.Module], config: peft.PeftConfig) -> PeftModel:
    """Return a model with a new adapter that is the same each time."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return peft.get_peft_model(make(), config)


def _bank() -> VectorBank:
    return VectorBank(torch.linspace(-1, 1, 32).reshape(8, 4))


def _over_a_bank(folder: Path) -> None:
    _bank().save_pretrained(folder)
    sizes = {"r": 2, "topk": 2, "num_vectors": 8, "vector_length": 4}
    config = peft.VBLoRAConfig(
        bank=str(folder), target_modules=["0", "2"], save_only_topk_weights=True, **sizes
    )
    _seeded(base, config).save_pretrained(folder)
    path = folder / CONFIG
    path.write_text(json.dumps({**json.loads(path.read_text()), "bank": "."}))


def _routed(with_experts: bool, folder: Path) -> None:
    for name, method in (("a", "LORA"), ("b", "LOKR")):
        adapted(method, 2).save_pretrained(folder / name)
    model = peft.get_routed_model(
        base(),
        {name: str(folder / name) for name in "ab"},
        routing="phatgoose",
        save_experts=with_experts,
    )
    model.save_pretrained(folder)
    path = folder / CONFIG
    config = json.loads(path.read_text())
    for name in "ab":
        config["experts"][name]["source"] = name
    path.write_text(json.dumps(config))


def _other_ways() -> Iterator[Target]:
    """Yield other ways to load an adapter."""
    for method in ("LORA", "POLY"):
        yield Target(
            f"{method} adapter over one of its kind",
            _writer(method),
            lambda m, f: m.load_adapter(f, "default"),
            partial(adapted, method, 2, seed=1),
        )
        yield Target(
            f"{method} adapter beside another",
            _writer(method),
            lambda m, f: m.load_adapter(f, "second", torch_device="cpu"),
            partial(adapted, method, 1),
        )
    yield Target(
        "LORA adapter as far as it fits",
        _writer("LORA"),
        partial(_load, strict=False, ignore_mismatched_sizes=True, is_trainable=True),
    )
    yield Target(
        "LORA adapter in place of another",
        _writer("LORA"),
        lambda m, f: hotswap_adapter(m, str(f), "default", torch_device="cpu"),
        partial(adapted, "LORA", 1),
    )
    for method in ("LORA", "LOKR", "VBLORA"):
        yield Target(
            f"{method} adapter without a model",
            _writer(method),
            lambda m, f: peft.load_standalone(f),
        )
    yield Target("digest of an adapter", _writer("LORA"), lambda m, f: adapter_digest(f))


def _lokr_files() -> Iterator[Target]:
    def read(model: nn.Module, folder: Path) -> None:
        print(peft.inspect_lokr_file(folder / WEIGHTS, model), file=io.StringIO())
        peft.load_lokr_file(model, folder / WEIGHTS)

    for layout in ("lycoris", "kohya", "comfyui", "diffusers", "onetrainer"):
        yield Target(f"LoKr file, {layout}", _lokr_file(layout), read)
    config = peft.LoKrConfig(
        r=2,
        use_effective_conv2d=True,
        decompose_both=True,
        decompose_factor=2,
        weight_decompose=True,
        init_weights=False,
        target_modules=["0", "1"],
    )
    yield Target(
        "LoKr file of convolutions",
        lambda f: peft.save_lokr_file(_seeded(_convolutions, config), f / WEIGHTS, "lycoris"),
        read,
        _convolutions,
    )


def _convolutions() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(4, 4, 3), nn.Conv2d(4, 8, 1)).eval()


def _libraries() -> Iterator[Target]:
    yield Target(
        "library",
        _library,
        lambda m, f: AdapterLibrary(f, refresh=False).add_to(m, ["a", "b", "u"]),
        partial(adapted, "LORA", 3),
    )
    yield Target("library, refreshed", _library, _refreshed)
    yield Target("pack", _pack, _unpacked)


def _library(folder: Path) -> None:
    for number, name in enumerate("ab", 1):
        adapted("LORA", number).save_pretrained(folder / name)
    adapted("LOHA", 3).save_pretrained(folder / "old", safe_serialization=False)
    with AdapterPack.write(folder / PACK, {"u": folder / "a", "v": folder / "b"}):
        library = AdapterLibrary(folder)
    library.rename(next(e.name for e in library if e.place.member == "u"), "u")
    library.tag("a", "good")
    library.score("a", accuracy=0.5)


def _refreshed(model: nn.Module, folder: Path) -> None:
    library = AdapterLibrary(folder)
    print(library, library.check(), file=io.StringIO())
    for entry in library:
        library.load(entry.name)


def _pack(folder: Path) -> None:
    adapted("LORA", 1).save_pretrained(folder / "a")
    adapted("LOKR", 1).save_pretrained(folder / "b")
    AdapterPack.write(folder / PACK, {name: folder / name for name in "ab"}).close()
    for name in "ab":
        for path in (folder / name).iterdir():
            path.unlink()
        (folder / name).rmdir()


def _unpacked(model: nn.Module, folder: Path) -> None:
    with AdapterPack(folder / PACK) as pack:
        pack.sizes()
        pack.digests()
        for name in pack:
            pack.load(name)


def _commands() -> Iterator[Target]:
    """Yield what the command line reads."""

    def inspected(model: nn.Module, folder: Path) -> None:
        contents = inspect_adapter(folder)
        json.dumps(contents.to_dict())
        str(contents), repr(contents)

    for method in METHODS:
        yield Target(f"peft inspect of {method}", _writer(method), inspected)
    yield Target(
        "peft inspect of a kohya file",
        _lokr_file("kohya"),
        partial(_command, ["inspect", WEIGHTS, "--json"]),
    )
    yield Target("peft inspect of a pack", _pack, partial(_command, ["inspect", PACK]))
    yield Target("peft inspect of a folder", _library, partial(_command, ["inspect", "."]))
    yield Target(
        "peft convert to LoRA",
        lambda f: adapted("LOKR", 2).save_pretrained(f / "a"),
        partial(_command, ["convert", "a", "out", "--to", "lora", "--rank", "2", "--force"]),
    )
    yield Target(
        "peft convert of a file",
        _lokr_file("comfyui", "style.safetensors"),
        partial(_command, ["convert", "style.safetensors", "out", "--to", "folder", "--force"]),
    )


def _command(arguments: list[str], model: nn.Module, folder: Path) -> None:
    """Run a command on files of a folder."""
    is_place = [
        i > 0 and word[0] != "-" and arguments[i - 1] not in ("--to", "--rank")
        for i, word in enumerate(arguments)
    ]
    places = [
        str(folder / word) if own else word for word, own in zip(arguments, is_place, strict=True)
    ]
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        program.main(places, standalone_mode=False)


def parsers() -> Iterator[Target]:
    """Yield what reads bytes alone."""
    for method in (*METHODS, "ROUTED"):
        write = partial(_routed, False) if method == "ROUTED" else _writer(method)
        yield Target(f"config of {method}", _only(CONFIG, write), _parse_config, is_parser=True)
    for method in ("LORA", "LOKR"):
        yield Target(f"header of {method}", _only(WEIGHTS, _writer(method)), _parse_header,
                     is_parser=True)  # fmt: skip
    yield Target("index", _only(INDEX_NAME, _library), _parse_index)
    yield Target("header of a pack", _only(PACK, _pack), _parse_pack)


def _only(name: str, write: Callable[[Path], object]) -> Callable[[Path], object]:
    """Return a function that writes one of the files."""

    def write_one(folder: Path) -> None:
        write(folder)
        for path in sorted(folder.rglob("*"), reverse=True):
            if path.is_dir():
                path.rmdir()
            elif path != folder / name:
                path.unlink()

    return write_one


def _parse_config(model: None, files: Files) -> None:
    text = _bytes(files, CONFIG).decode(errors="surrogateescape")
    config = config_from(text, CONFIG)
    facts_of(config, 1000, CONFIG)
    config_digest(text, CONFIG)
    config.to_json()


def _parse_header(model: None, files: Files) -> None:
    content = _bytes(files, WEIGHTS)
    layout = read_layout(io.BytesIO(content), len(content), WEIGHTS)
    layout.tensors(bytearray(content[len(layout.prefix) :]))
    module_shapes(group_keys(layout.spans), {k: span.shape for k, span in layout.spans.items()})


def _parse_index(model: None, folder: Path) -> None:
    index = IndexFile(folder / INDEX_NAME).read()
    for line in index.lines():
        json.dumps(line)


def _parse_pack(model: None, folder: Path) -> None:
    with AdapterPack(folder / PACK) as pack:
        pack.sizes()
        pack.digests()


def _bytes(files: Files, name: str) -> bytes:
    content = files.get(name, b"")
    assert isinstance(content, bytes)
    return content
