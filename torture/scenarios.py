# SPDX-License-Identifier: Apache-2.0
"""Operations on adapters' files and states that the campaigns break, with what has to hold.

A `Write` replaces something in a folder. A reader then has to see the old or the new content. A
`Read` changes a model from a folder. The model then has to be as before, or wholly changed.
"""

from __future__ import annotations

import hashlib
import shutil
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

import peft
from peft import (
    AdapterLibrary,
    AdapterPack,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    PeftModel,
    PolyConfig,
    VBLoRAConfig,
    VectorBank,
    get_peft_model,
)
from peft.utils.error import PeftValueError
from peft.utils.hotswap import hotswap_adapter

TARGETS = ["0", "2"]
X = torch.linspace(-1, 1, 16).reshape(2, 8)


def base(width: int = 8) -> nn.Sequential:
    """Return the same small model each time."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(8, width), nn.Tanh(), nn.Linear(width, 8))


class Experts(nn.Module):
    """Experts in stacks `[experts, in, out]`; a token runs through all."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.up = nn.Parameter(torch.randn(4, 8, 6))
            self.down = nn.Parameter(torch.randn(4, 6, 8))

    def forward(self, x: Tensor) -> Tensor:
        """Return the sum of the experts' outputs."""
        hidden = torch.einsum("ni,eih->enh", x, self.up).tanh()
        return torch.einsum("enh,eho->no", hidden, self.down)


def experts() -> nn.Sequential:
    """Return the same small mixture of experts each time."""
    return nn.Sequential(Experts())


def config(method: str, scale: int, targets: list[str] = TARGETS) -> peft.PeftConfig:
    """Return a config; others of the method with another scale have the same shapes."""
    common = {"target_modules": targets, "init_weights": False}
    if method == "LORA":
        return LoraConfig(r=2, lora_alpha=scale, target_modules=targets, init_lora_weights=False)
    if method == "LOKR":
        return LoKrConfig(r=2, alpha=scale, **common)
    if method == "LOHA":
        return LoHaConfig(r=2, alpha=scale, **common)
    if method == "POLY":
        return PolyConfig(r=2, n_tasks=2, n_skills=2, alpha=scale, **common)
    if method.startswith("LORA on "):
        stacks = [f"{name}.weight" for name in targets]
        return LoraConfig(
            r=2,
            lora_alpha=scale,
            target_modules=[],
            target_parameters=["0.up", "0.down"] if method == "LORA on experts" else stacks,
            init_lora_weights=False,
        )
    return VBLoRAConfig(
        r=2, num_vectors=8, vector_length=4, target_modules=targets, save_only_topk_weights=True
    )


METHODS = ("LORA", "LOKR", "LOHA", "POLY", "VBLORA", "LORA on parameters")


def adapted(
    method: str,
    scale: int,
    seed: int | None = None,
    model: nn.Module | None = None,
    targets: list[str] | None = None,
) -> PeftModel:
    """Return a model with one adapter whose values depend on the seed, by default the scale."""
    with torch.random.fork_rng():
        torch.manual_seed(scale if seed is None else seed)
        settings = config(method, scale, TARGETS if targets is None else targets)
        model = get_peft_model(base() if model is None else model, settings)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.normal_()
    return model.eval()


def outputs(model: nn.Module) -> bytes:
    """Return the bytes of a model's outputs, for two tasks where it has several."""
    settings = getattr(model, "peft_config", {}).values()
    number = max((getattr(config, "n_tasks", 1) for config in settings), default=1)
    calls = [{"task_ids": task} for task in range(number)] if number > 1 else [{}]
    parts = []
    with torch.no_grad():
        for call in calls:
            try:
                parts.append(model(X, **call).contiguous().numpy().tobytes())
            except PeftValueError as error:  # another task is merged
                parts.append(str(error).encode())
    return b"".join(parts)


def read_adapter(folder: Path, base: Callable[[], nn.Module] = base) -> str | None:
    """Return a digest of the adapter that a reader finds, None where there is none.

    Warnings are errors: none of these folders deserves one.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            model = PeftModel.from_pretrained(base(), folder)
        except FileNotFoundError:
            return None
    settings = model.peft_config["default"].to_dict()
    settings = {key: value for key, value in settings.items() if key != "inference_mode"}
    return digest(repr(sorted(settings.items())).encode() + outputs(model.eval()))


def digest(content: bytes) -> str:
    """Return a short name of some bytes."""
    return hashlib.sha256(content).hexdigest()[:16]


def state_of(model: nn.Module) -> str:
    """Return a digest of all that a caller can see of a model: values, flags, configs, outputs."""
    parts = [repr(type(model))]
    for name, tensor in sorted(model.state_dict().items()):
        parts.append(f"{name} {tensor.dtype} {digest(tensor.contiguous().numpy().tobytes())}")
    parts += [f"{name} {p.requires_grad}" for name, p in model.named_parameters()]
    parts += [f"{name} {type(module)} {module.training}" for name, module in model.named_modules()]
    if isinstance(model, PeftModel):
        parts += [repr(model.active_adapters), repr(sorted(model.peft_config))]
        for config in model.peft_config.values():
            fields = sorted(config.to_dict().items())
            # Equal sets may have their members in another order.
            parts += [repr(sorted(v) if isinstance(v, set) else v) for pair in fields for v in pair]
    return digest("\n".join(parts).encode() + outputs(model))


@dataclass
class Write:
    """An operation that replaces something in a folder.

    Args:
        name: Its name in reports.
        prepare: Writes the old content, if any.
        work: Writes the new content.
        read: Returns what a reader finds.
        model: The model that is written, which has to stay as it is.
    """

    name: str
    prepare: Callable[[Path], object]
    work: Callable[[Path], object]
    read: Callable[[Path], object]
    model: nn.Module


@dataclass
class Read:
    """An operation that changes a model from a folder.

    Args:
        name: Its name in reports.
        prepare: Writes the content.
        model: Makes the model; `work` changes it, or makes one from it and returns it.
        work: The operation.
    """

    name: str
    prepare: Callable[[Path], object]
    model: Callable[[], nn.Module]
    work: Callable[[nn.Module, Path], nn.Module | None]


def _read_bytes(name: str) -> Callable[[Path], str | None]:
    """Return a reader of one file's tensors."""

    def read(folder: Path) -> str | None:
        path = folder / name
        if not path.exists():
            return None
        tensors = peft.checkpoint.files.read_weights(path)
        return digest(repr([(k, v.tolist()) for k, v in sorted(tensors.items())]).encode())

    return read


def writes() -> Iterator[Write]:
    """Yield the operations that write."""
    for method in METHODS:
        old, new = adapted(method, 1), adapted(method, 2)
        yield Write(
            f"save {method} over another",
            old.save_pretrained,
            new.save_pretrained,
            read_adapter,
            new,
        )
    new = adapted("LORA", 2)
    yield Write(
        "save LORA into a new folder", lambda f: None, new.save_pretrained, read_adapter, new
    )
    yield Write(
        "save LORA over a legacy file",
        lambda f: adapted("LORA", 1).save_pretrained(f, safe_serialization=False),
        new.save_pretrained,
        read_adapter,
        new,
    )
    yield Write(
        "save as LORA over another",
        adapted("LORA", 1).save_pretrained,
        lambda f: peft.save_as_lora(f, adapted("LOKR", 2), rank=4),
        read_adapter,
        new,
    )
    bank, other = adapted("VBLORA", 1), adapted("VBLORA", 2)
    yield Write(
        "save a bank over another",
        VectorBank.of(bank).save_pretrained,
        VectorBank.of(other).save_pretrained,
        _read_bytes("vector_bank.safetensors"),
        other,
    )
    lokr, style = adapted("LOKR", 1), adapted("LOKR", 2)
    yield Write(
        "save a LoKr file over another",
        lambda f: peft.save_lokr_file(lokr, f / "style.safetensors", "lycoris"),
        lambda f: peft.save_lokr_file(style, f / "style.safetensors", "lycoris"),
        _read_bytes("style.safetensors"),
        style,
    )
    yield from library_writes()


def library_writes() -> Iterator[Write]:
    """Yield the operations on libraries and packs of adapters that write."""
    one, two = adapted("LORA", 1), adapted("LOKR", 2)

    def some(folder: Path) -> None:
        one.save_pretrained(folder / "a")
        two.save_pretrained(folder / "b")
        AdapterLibrary(folder)

    def elsewhere(folder: Path) -> Path:
        two.save_pretrained(folder.parent / "elsewhere")
        return folder.parent / "elsewhere"

    def packed(folder: Path) -> None:
        some(folder)
        AdapterPack.write(folder / "x.adapters.safetensors", {"a": folder / "a"})

    yield Write(
        "tag an adapter of a library",
        some,
        lambda f: AdapterLibrary(f, refresh=False).tag("a", "tagged"),
        _read_index,
        one,
    )
    yield Write(
        "copy an adapter into a library",
        some,
        lambda f: AdapterLibrary(f).add(elsewhere(f), "c") and None,
        lambda f: read_adapter(f / "c"),
        one,
    )
    yield Write(
        "change the members of a pack",
        packed,
        _exchange,
        _read_pack,
        one,
    )


def _exchange(folder: Path) -> None:
    """Put "b" in the place of "a" in a pack, which may be done already."""
    with AdapterPack(folder / "x.adapters.safetensors") as pack:
        pack.update({"b": folder / "b"}, [name for name in pack if name == "a"]).close()


def _read_index(folder: Path) -> str:
    """Return a digest of the entries in a library's index."""
    library = AdapterLibrary(folder, refresh=False)
    return digest(repr([(e.name, e.tags, e.bytes) for e in library]).encode())


def _read_pack(folder: Path) -> str:
    """Return a digest of the members of a pack, all of which have to be whole."""
    with AdapterPack(folder / "x.adapters.safetensors") as pack:
        contents = {name: pack.content(name) for name in pack}
        return digest(
            repr([(n, c.config_text, bytes(c.data)) for n, c in contents.items()]).encode()
        )


def _interrupted(folder: Path) -> None:
    """Write an adapter as a save leaves it that was killed right after its commit point."""
    adapted("LORA", 1).save_pretrained(folder)
    before = (folder / "adapter_config.json").read_bytes()
    was = hashlib.sha256(before).hexdigest()
    adapted("LORA", 2).save_pretrained(folder)
    text = (folder / "adapter_config.json").read_bytes()
    now = hashlib.sha256(text).hexdigest()
    (folder / f".adapter_config.{now[:32]}.{was[:32]}.json").write_bytes(text)
    (folder / "adapter_config.json").write_bytes(before)


def reads() -> Iterator[Read]:
    """Yield the operations that read."""
    for method in METHODS:
        saved = adapted(method, 2)
        yield Read(
            f"load {method}",
            saved.save_pretrained,
            base,
            lambda m, f: PeftModel.from_pretrained(m, f),
        )
        yield Read(
            f"load {method} beside another",
            saved.save_pretrained,
            lambda method=method: adapted(method, 1),
            lambda m, f: m.load_adapter(f, "second") and None,
        )
        yield Read(
            f"load {method} over an adapter",
            saved.save_pretrained,
            lambda method=method: adapted(method, 2, seed=1),
            lambda m, f: m.load_adapter(f, "default", is_trainable=False) and None,
        )
    yield Read(
        "load LORA after an interrupted save",
        _interrupted,
        base,
        lambda m, f: PeftModel.from_pretrained(m, f),
    )
    yield Read(
        "load LORA from a legacy file",
        lambda f: adapted("LORA", 2).save_pretrained(f, safe_serialization=False),
        base,
        lambda m, f: PeftModel.from_pretrained(m, f),
    )
    yield Read(
        "put adapters of a library on a model",
        lambda f: [
            adapted("LORA", n).save_pretrained(f / name) for n, name in ((1, "a"), (2, "b"))
        ],
        lambda: adapted("LORA", 3),
        lambda m, f: AdapterLibrary(f).add_to(m, ["a", "b"]) and None,
    )
    yield Read(
        "hot swap LORA",
        adapted("LORA", 2).save_pretrained,
        lambda: adapted("LORA", 1),
        lambda m, f: hotswap_adapter(m, str(f), "default"),
    )


def fresh(folder: Path) -> Path:
    """Return an empty folder at a path."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder
