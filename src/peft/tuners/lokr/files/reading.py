# SPDX-License-Identifier: Apache-2.0
"""Reading a LoKr file: what is in it, what each of its modules would become in a model, and putting
that in.
"""

from __future__ import annotations

import json
import math
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ....base.errors import CheckpointError, PeftTypeError, PeftValueError
from ....base.registry import PeftType
from ....base.validation import check_adapter, check_flags
from ....checkpoint.files import (
    CONFIG_NAME,
    SAFETENSORS_WEIGHTS_NAME,
    as_path,
    read_json,
    read_metadata,
    read_weights,
)
from ....checkpoint.values import warn_of_values
from ....core.adapted_model import AdaptedModel
from ....core.build import Build, Construction
from ..config import LoKrConfig
from ..model import LoKrModel
from .keys import NUMBERS, split_key
from .parts import FileModule
from .placing import Placement, place


@dataclass
class LoKrFile:
    """The contents of a LoKr file of any writer.

    Args:
        source: Where it was.
        metadata: Of the file's header.
        modules: By component and name.
        unknown: Keys that belong to no LoKr module.
    """

    source: str
    metadata: dict[str, str] = field(default_factory=dict)
    modules: dict[tuple[str, str], FileModule] = field(default_factory=dict)
    unknown: list[str] = field(default_factory=list)

    @property
    def components(self) -> dict[str, list[FileModule]]:
        """The modules by component."""
        result: dict[str, list[FileModule]] = {}
        for (component, _), module in self.modules.items():
            result.setdefault(component, []).append(module)
        return result

    @property
    def writer(self) -> str:
        """Who wrote the file: as its header says, else as its names suggest."""
        return _writer(self.metadata, set(self.components))


@dataclass
class LoKrReport:
    """What a file holds and, if a model was given, what of it goes where.

    Args:
        file: The file.
        placement: None without a model.
    """

    file: LoKrFile
    placement: Placement | None = None

    @property
    def fits(self) -> bool:
        """Whether all of the file can be put into the model; False without one."""
        return self.placement is not None and not self.placement.problems and not self.file.unknown

    @property
    def config(self) -> LoKrConfig:
        """The config that describes the adapter in the model.

        Raises:
            CheckpointError: There is no model, or nothing of the file can be placed in it.
        """
        if self.placement is None or not self.placement.placed:
            raise CheckpointError(
                f"'{self.file.source}': nothing of it is placed in a model, so that there is no "
                "config."
            )
        return self.placement.config()

    @property
    def problems(self) -> list[str]:
        """Everything that can't be placed, a sentence each."""
        unknown = self.file.unknown
        more = f" and {len(unknown) - 5} more" if len(unknown) > 5 else ""
        own = (
            [f"Keys of no LoKr module: {', '.join(map(repr, unknown[:5]))}{more}."]
            if unknown
            else []
        )
        return own + ([] if self.placement is None else self.placement.problems)

    def __str__(self) -> str:
        file, lines = self.file, [f"{self.file.source}: LoKr, written by {self.file.writer}"]
        for component, modules in file.components.items():
            ranks = sorted({module.rank for module in modules} - {None})  # type: ignore[type-var]
            whole = sum(module.rank is None for module in modules)
            text = [f"ranks {', '.join(map(str, ranks))}"] if ranks else []
            text += [f"{whole} of whole factors"] if whole else []
            text += (
                ["weight decomposition"]
                if any(module.dora_scale is not None for module in modules)
                else []
            )
            lines.append(
                f"  {component or '(no prefix)'}: {len(modules)} modules; {'; '.join(text)}"
            )
        if self.placement is not None:
            lines += self.placement.lines()
        return "\n".join([*lines, *(f"  ! {problem}" for problem in self.problems)])


def inspect_lokr_file(
    file: str | os.PathLike | dict[str, Tensor],
    model: nn.Module | None = None,
    component: str | None = None,
) -> LoKrReport:
    """Say what is in a LoKr file of any writer and, for a model, what each module of it would
    become; nothing is changed.

    Args:
        file: A `.safetensors` (or `.bin`) file, a folder that `save_pretrained` made, or tensors by
            key.
        model: The model it is for, with or without other adapters.
        component: Which part of the file is for this model (`"lora_unet"`, `"lora_te1"`,
            `"transformer"`, …), where it holds several; by default the one that fits.

    Returns:
        A report to print; `fits`, `problems` and `config` say the same to a program.

    Raises:
        CheckpointError: The file can't be read or holds no LoKr modules.
        PeftTypeError: `file` is neither a path nor tensors, or `model` is no module.
        PeftValueError: The file has no such component.

    Example:
        >>> tensors = {"lycoris_0.lokr_w1": torch.ones(2, 2), "lycoris_0.lokr_w2": torch.ones(4, 3)}
        >>> print(inspect_lokr_file(tensors, nn.Sequential(nn.Linear(6, 8))))
        tensors: LoKr, written by LyCORIS (or SimpleTuner, ai-toolkit)
          lycoris: 1 modules; 1 of whole factors
          0 <- 0: 2x2 (x) 4x3, scale 1

    Source: arXiv:2309.14859, section 3.2
    """
    if model is not None and not isinstance(model, nn.Module):
        raise PeftTypeError(
            f"`model`={model!r} must be a module of torch; a model's weights by key are not enough."
        )
    contents = read_lokr_file(file)
    if model is None:
        return LoKrReport(contents)
    chosen = [component] if component is not None else list(contents.components)
    if unknown := [name for name in chosen if name not in contents.components]:
        known = ", ".join(map(repr, contents.components))
        raise PeftValueError(
            f"'{contents.source}' has no component {unknown[0]!r}; it has {known}."
        )
    saved = _saved_config(contents)
    placements = [place(contents.components[name], _base(model), saved) for name in chosen]
    fitting = [p for p in placements if not p.problems]
    if len(chosen) > 1 and len(fitting) != 1:
        counts = ", ".join(
            f"{name!r} ({len(p.placed)} of {p.count})"
            for name, p in zip(chosen, placements, strict=True)
        )
        best = max(placements, key=lambda p: len(p.placed))
        best.placed.clear()
        best.problems.insert(
            0, f"Several components could be meant; pass `component`. Modules that fit: {counts}."
        )
        return LoKrReport(contents, best)
    return LoKrReport(contents, fitting[0] if fitting else placements[0])


def load_lokr_file(
    model: nn.Module,
    file: str | os.PathLike | dict[str, Tensor],
    adapter_name: str = "default",
    component: str | None = None,
    *,
    is_trainable: bool = False,
    ignore_unplaced: bool = False,
) -> LoKrReport:
    """Put a LoKr file of any writer into a model as an adapter: all of it, or nothing.

    The adapter is an ordinary one: it can be trained, switched, merged, saved with its config, and
    written by `save_lokr_file`.

    Args:
        model: A `PeftModel`, or a model to put the adapter into in place. diffusers' and
            transformers' own methods for adapters work on it then.
        file, component: As for `inspect_lokr_file`.
        adapter_name: A new name.
        is_trainable: Whether the adapter is.
        ignore_unplaced: Leave out what can't be placed, in place of raising; the report names it.

    Returns:
        As `inspect_lokr_file`.

    Raises:
        CheckpointError: As `inspect_lokr_file`, or something can't be placed; all of it is named
            and the model left as it was.
        PeftValueError: The name is taken.

    Example:
        >>> base = nn.Sequential(nn.Linear(6, 8))
        >>> tensors = {"lora_unet_0.lokr_w1": torch.ones(2, 2), "lora_unet_0.lokr_w2": torch.ones(4, 3)}
        >>> load_lokr_file(base, tensors).fits, base[0].get_delta_weight("default").sum()
        (True, tensor(48.))
    """
    check_adapter(adapter_name)
    check_flags(is_trainable=is_trainable, ignore_unplaced=ignore_unplaced)
    if model is None:
        raise PeftTypeError(
            "`model`=None must be a module of torch; `inspect_lokr_file` needs none."
        )
    report = inspect_lokr_file(file, model, component)
    assert report.placement is not None
    if report.problems and not (ignore_unplaced and report.placement.placed):
        raise CheckpointError(
            f"'{report.file.source}' does not fit the model; nothing was loaded. "
            f"{' '.join(report.problems)} "
            "`inspect_lokr_file` shows what fits; `ignore_unplaced=True` leaves out what does not."
        )
    config = report.config
    config.inference_mode = not is_trainable
    _put_in(model, config, adapter_name, report.placement, report.file.source)
    return report


def read_lokr_file(file: str | os.PathLike | dict[str, Tensor]) -> LoKrFile:
    """The contents of a file.

    Raises:
        CheckpointError: It can't be read, or holds no LoKr modules, or a number in it is NaN.
        PeftTypeError: It is neither a path nor tensors by key.
    """
    tensors, result = _opened(file)
    for name, tensor in tensors.items():
        key = split_key(name)
        if key is None or (key.tensor in NUMBERS and tensor.numel() != 1):
            result.unknown.append(name)
            continue
        module = result.modules.setdefault(
            (key.component, key.name), FileModule(key.name, key.component, key.flat)
        )
        if key.tensor in NUMBERS:
            setattr(module, key.tensor, _number(result.source, name, tensor))
        elif key.tensor == "dora_scale":
            module.dora_scale = tensor
        else:
            module.factors[key.tensor.removeprefix("lokr_")] = tensor
    for owner, module in list(result.modules.items()):
        if not module.factors:  # alpha or dora_scale of another method's module
            result.unknown.append(".".join(filter(None, owner)))
            del result.modules[owner]
    if not result.modules:
        raise CheckpointError(f"'{result.source}' {_instead(tensors)}")
    for module in result.modules.values():
        module.take_in_scalar()
    return result


def _opened(file: Any) -> tuple[dict[str, Tensor], LoKrFile]:
    """Return a file's tensors, and what else is known of it."""
    if isinstance(file, dict):
        if strange := [
            key
            for key, tensor in file.items()
            if not (isinstance(key, str) and isinstance(tensor, Tensor))
        ]:
            raise PeftTypeError(
                f"`file` must hold tensors by key; {strange[0]!r} has "
                f"{type(file[strange[0]]).__name__}."
            )
        return file, LoKrFile("tensors")
    path = as_path(file, "file", " or tensors by key")
    path = path / SAFETENSORS_WEIGHTS_NAME if path.is_dir() else path
    return read_weights(path), LoKrFile(str(path), read_metadata(path))


def _number(source: str, key: str, tensor: Tensor) -> float:
    """Return the value of a tensor of one. An infinite alpha is the placeholder 1e10 in half
    precision.
    """
    value = float(tensor)
    if math.isnan(value) or (math.isinf(value) and key.endswith("scalar")):
        raise CheckpointError(
            f"'{source}': {key!r} is {value}, which no delta can be multiplied by; nothing was "
            "loaded. The training that wrote the "
            "file went wrong: take a file of an earlier step."
        )
    return value


# What keys of other methods have in them, the method, and what loads it.
_OTHERS = {
    r"\blora_(A|B|down|up|embedding_A)\b": (
        "a LoRA file",
        "load it with `PeftModel.from_pretrained` (a folder with its config) or with diffusers' "
        "`load_lora_weights`",
    ),
    r"\bhada_w1": ("a LoHa file", "`PeftModel.from_pretrained` loads one that has its config"),
    r"\b(poly_lora|vblora)_": ("a Poly or VB-LoRA adapter", "`PeftModel.from_pretrained` loads it"),
}


def _instead(tensors: dict[str, Tensor]) -> str:
    """Return what a file without LoKr modules is, for a message."""
    if not tensors:
        return "is empty: it holds no tensors."
    some = (
        f"its keys are {', '.join(map(repr, list(tensors)[:3]))}{', …' if len(tensors) > 3 else ''}"
    )
    for pattern, (kind, remedy) in _OTHERS.items():
        if any(re.search(pattern, key) for key in tensors):
            return f"holds no LoKr modules; {some}. It is {kind}: {remedy}."
    return f"holds no LoKr modules; {some}. Theirs end with `lokr_w1`, `lokr_w2` and the like."


def _base(model: nn.Module) -> nn.Module:
    """The model in which modules have the paths that files know them by."""
    tuner: Any = model._modules.get("base_model")
    return tuner.model if isinstance(tuner, AdaptedModel) else model


def _saved_config(file: LoKrFile) -> LoKrConfig | None:
    """The config in a file's header, where diffusers writes it, or beside the file, where Hugging
    Face PEFT does.
    """
    text = file.metadata.get("lora_adapter_metadata")
    beside = Path(file.source).parent / CONFIG_NAME
    if text is not None:
        try:
            fields = json.loads(text)
        except json.JSONDecodeError as error:
            raise CheckpointError(
                f"'{file.source}': the config in its header is not valid JSON: {error}"
            ) from None
        fields = {
            name.rpartition(".")[2]: value for name, value in fields.items()
        }  # pipelines put a component before each name
    elif Path(file.source).name == SAFETENSORS_WEIGHTS_NAME and beside.is_file():
        fields = read_json(beside)
    else:
        return None
    return LoKrConfig._from_file_fields({**fields, "peft_type": PeftType.LOKR}, {})  # type: ignore[return-value]


def _writer(metadata: dict[str, str], components: set[str]) -> str:
    module = metadata.get("ss_network_module", "")
    if module:
        return f"sd-scripts with {module}"
    if "ai-toolkit" in metadata.get("software", ""):
        return "ai-toolkit"
    if any(name.startswith("ot_") for name in metadata):
        return "OneTrainer"
    if "lora_adapter_metadata" in metadata:
        return "diffusers"
    suggested = {
        "Hugging Face PEFT": {"base_model.model", "unet.base_model.model"},
        "LyCORIS in kohya's layout": {
            "lora_unet",
            "lora_te",
            "lora_te1",
            "lora_te2",
            "lora_te3",
            "lora_prior_unet",
        },
        "LyCORIS (or SimpleTuner, ai-toolkit)": {"lycoris", "lycoris_unet"},
        "ai-toolkit (or for ComfyUI)": {"diffusion_model", "model.diffusion_model"},
        "OneTrainer": {"lora_transformer"},
        "diffusers (or SimpleTuner)": {
            "transformer",
            "unet",
            "text_encoder",
            "text_encoder_2",
            "text_encoder_3",
        },
    }
    return next(
        (writer for writer, own in suggested.items() if own & components), "an unknown program"
    )


def _by_key(tensors: dict[tuple[str, str], Tensor]) -> dict[str, Tensor]:
    return {".".join(where): tensor for where, tensor in tensors.items()}


def _put_in(
    model: nn.Module, config: LoKrConfig, adapter_name: str, placement: Placement, source: str
) -> None:
    """Add the adapter to a model, filled."""

    @torch.no_grad()
    def fill(build: Build) -> None:
        named = {
            (path, name): tensor
            for path, own in placement.tensors().items()
            for name, tensor in own.items()
        }
        places = {
            (path, name): getattr(build.layers[path], name)[adapter_name] for path, name in named
        }
        warn_of_values(f"'{source}'", _by_key(named), _by_key(places))
        for where, tensor in named.items():
            places[where].copy_(tensor)

    tuner: Any = model._modules.get("base_model")
    if isinstance(tuner, AdaptedModel):
        peft_model: Any = model
        peft_model._add(adapter_name, config, Construction(initialize=False), fill)
        return
    configs: Any = vars(model).get("peft_config", {})
    if adapter_name in configs:
        raise PeftValueError(
            f"Adapter with name '{adapter_name}' already exists; choose another, or delete that "
            "one first."
        )
    tuner = LoKrModel(model, config, adapter_name, shared_root=model, initialize=False, fill=fill)
    model.peft_config = {**configs, adapter_name: tuner.config_to_save(adapter_name)}  # type: ignore[assignment]
    if (
        getattr(model, "_hf_peft_config_loaded", None) is False
    ):  # what the methods of diffusers and transformers ask for
        model._hf_peft_config_loaded = True  # type: ignore[assignment]
