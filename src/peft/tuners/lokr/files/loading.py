# SPDX-License-Identifier: Apache-2.0
"""Inspect a LoKr file, and load it into a model."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ....base.constants import MODEL_ROOT
from ....base.containers import modules_of
from ....base.errors import CheckpointError, PeftTypeError, PeftValueError
from ....base.plain_values import json_object
from ....base.registry import PEFT_TYPE_TO_TUNER_MAPPING, PeftType, lookup
from ....base.suggestions import listed
from ....base.validation import check_adapter, check_flags, text
from ....checkpoint.checks import warn_of_values
from ....checkpoint.files import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, read_json
from ....checkpoint.keys import adapter_tensors
from ....checkpoint.state_dict import get_peft_model_state_dict
from ....core.conversion import config_of, root_of
from ....core.filling import fill_with
from ....core.injection import Build
from ....core.model_methods import tuner_of
from ....core.skeleton import skeleton_of
from ..config import LoKrConfig
from ..layer import LoKrLayer
from .placement import Placement, infer_config, place
from .reading import LoKrFile, read_lokr_file

# A path, or tensors by key.
File = str | os.PathLike[str] | dict[str, Tensor]


@dataclass
class LoKrReport:
    """The contents of a file and, for a model, the layers that they fit.

    Args:
        file: The file's contents.
        placement: The layers; None without a model.
    """

    file: LoKrFile
    placement: Placement | None = None

    @property
    def fits(self) -> bool:
        """True if all of the file fits the model; False without a model."""
        return self.placement is not None and not self.placement.problems and not self.file.unknown

    @property
    def config(self) -> LoKrConfig:
        """Config of the adapter in the model.

        Raises:
            CheckpointError: There is no model, or nothing of the file fits it.
        """
        if self.placement is None or not self.placement.placed:
            raise CheckpointError(
                f"'{self.file.source}': nothing of it is placed in a model, so there is no config."
            )
        return infer_config(self.placement)

    @property
    def problems(self) -> list[str]:
        """A sentence for everything that does not fit."""
        problems = [] if self.placement is None else self.placement.problems
        if not (unknown := self.file.unknown):
            return [*problems]
        keys = listed(map(repr, unknown), most=5)
        return [f"Keys of no LoKr module: {keys}.", *problems]

    def __repr__(self) -> str:
        placed = "no model" if self.placement is None else f"{len(self.placement.placed)} placed"
        return f"<LoKrReport: {self.file!r}, {placed}; print it for a table>"

    def __str__(self) -> str:
        lines = [f"{self.file.source}: LoKr, written by {self.file.writer}"]
        for component, modules in self.file.components.items():
            ranks = sorted({module.rank for module in modules if module.rank is not None})
            full = sum(module.rank is None for module in modules)
            text = [f"ranks {', '.join(map(str, ranks))}"] if ranks else []
            text += [f"{full} of full factors"] if full else []
            if any(module.dora_scale is not None for module in modules):
                text.append("weight decomposition")
            lines.append(
                f"  {component or '(no prefix)'}: {len(modules)} modules; {'; '.join(text)}"
            )
        if self.placement is not None:
            lines += [f"  {placed}" for placed in self.placement.placed]
        return "\n".join([*lines, *(f"  ! {problem}" for problem in self.problems)])


def inspect_lokr_file(
    file: File, model: nn.Module | None = None, component: str | None = None
) -> LoKrReport:
    """Report the contents of a LoKr file of any writer and, for a model, the layers that they fit.
    Nothing is changed.

    Args:
        file: A `.safetensors` (or `.bin`) file, a folder that `save_pretrained` made, or tensors by
            key.
        model: The model that the file is for, with or without other adapters.
        component: The component of the file that is for this model (`"lora_unet"`, `"lora_te1"`,
            `"transformer"`, …); by default the one that fits.

    Returns:
        A report to print; a program reads its `fits`, `problems` and `config`.

    Raises:
        CheckpointError: The file can't be read or holds no LoKr modules.
        PeftTypeError: `file` is neither a path nor tensors, or `model` is not a module.
        PeftValueError: The file lacks the component.

    Example:
        >>> import torch
        >>> tensors = {"lycoris_0.lokr_w1": torch.ones(2, 2), "lycoris_0.lokr_w2": torch.ones(4, 3)}
        >>> print(inspect_lokr_file(tensors, nn.Sequential(nn.Linear(6, 8))))
        tensors: LoKr, written by LyCORIS (or SimpleTuner, ai-toolkit)
          lycoris: 1 modules; 1 of full factors
          0 <- 0: 2x2 (x) 4x3, scale 1

    Source: arXiv:2309.14859, section 3.2
    """
    if model is not None and not isinstance(model, nn.Module):
        raise PeftTypeError(
            f"`model`={model!r} must be a module of torch; a model's weights by key are not enough."
        )
    contents = read_lokr_file(file)
    return LoKrReport(contents, None if model is None else _placement(contents, model, component))


def load_lokr_file(
    model: nn.Module,
    file: File,
    adapter_name: str = "default",
    component: str | None = None,
    *,
    is_trainable: bool = False,
    ignore_unplaced: bool = False,
) -> LoKrReport:
    """Load a LoKr file of any writer into a model as an adapter: all of it, or nothing.

    The adapter can be trained, switched, merged and saved as any other; `save_lokr_file` writes it
    in a program's layout.

    Args:
        model: A `PeftModel`, or a model to inject the adapter into in place. The adapter methods of
            diffusers and transformers then work on that model.
        file, component: As for `inspect_lokr_file`.
        adapter_name: A new name.
        is_trainable: False freezes the adapter.
        ignore_unplaced: Load the modules that fit and name the others in the report, in place of
            raising.

    Returns:
        The report of `inspect_lokr_file`.

    Raises:
        CheckpointError: As for `inspect_lokr_file`, or a module does not fit. The message names all
            that do not; the model is left as it was.
        PeftValueError: The name is taken.

    Example:
        >>> import torch
        >>> base = nn.Sequential(nn.Linear(6, 8))
        >>> name = "lora_unet_0"
        >>> tensors = {f"{name}.lokr_w1": torch.ones(2, 2), f"{name}.lokr_w2": torch.ones(4, 3)}
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
    placement, source = report.placement, report.file.source
    assert placement is not None
    if report.problems and not (ignore_unplaced and placement.placed):
        raise CheckpointError(
            f"'{source}' does not fit the model; nothing was loaded. {' '.join(report.problems)} "
            "`inspect_lokr_file` shows what fits; `ignore_unplaced=True` leaves out what does not."
        )
    config = report.config
    config.inference_mode = not is_trainable
    fill = _filler(placement, adapter_name, source)
    if tuner_of(model) is not None:
        peft_model: Any = model
        peft_model.add_filled_adapter(adapter_name, config, fill)
    else:
        _inject(model, config, adapter_name, fill)
    return report


def _placement(contents: LoKrFile, model: nn.Module, component: str | None) -> Placement:
    """Place the component that is for a model."""
    components = contents.components
    for problem in text("component", component):
        raise PeftTypeError(problem)
    if component is not None and component not in components:
        known = ", ".join(map(repr, components))
        raise PeftValueError(f"'{contents.source}' has no component {component!r}; it has {known}.")
    names = list(components) if component is None else [component]
    base, saved = root_of(model)[0], _saved_config(contents)
    placements = {name: place(components[name], base, saved) for name in names}
    fitting = [p for p in placements.values() if not p.problems]
    if len(names) == 1 or len(fitting) == 1:
        return fitting[0] if fitting else placements[names[0]]
    counts = ", ".join(f"{name!r} ({len(p.placed)} of {p.count})" for name, p in placements.items())
    best = max(placements.values(), key=lambda p: len(p.placed))
    best.placed.clear()
    best.problems.insert(
        0, f"Several components could be meant; pass `component`. Modules that fit: {counts}."
    )
    return best


def _saved_config(file: LoKrFile) -> LoKrConfig | None:
    """Return the config in the file's header (diffusers) or beside the file (Hugging Face PEFT)."""
    text = file.metadata.get("lora_adapter_metadata")
    path = Path(file.source)
    if text is not None:
        fields = json_object(text, f"{file.source}, the config in its header")
        # Pipelines put a component before each name.
        fields = {name.rpartition(".")[2]: value for name, value in fields.items()}
    elif path.name == SAFETENSORS_WEIGHTS_NAME and path.with_name(CONFIG_NAME).is_file():
        fields = read_json(path.with_name(CONFIG_NAME))
    else:
        return None
    return LoKrConfig.from_file_fields({**fields, "peft_type": PeftType.LOKR}, {})


def _filler(placement: Placement, adapter_name: str, source: str) -> Callable[[Build], None]:
    """Return the function that writes the placed tensors into a finished adapter."""

    def fill(build: Build) -> None:
        tensors = {
            f"{placed.path}.{name}": tensor
            for placed in placement.placed
            for name, tensor in placed.tensors().items()
        }
        expected = adapter_tensors(build.named_tensors(), build.config, adapter_name)
        warn_of_values(f"'{source}'", tensors, expected)
        fill_with(build, tensors)

    return fill


def _inject(
    model: nn.Module, config: LoKrConfig, adapter_name: str, fill: Callable[[Build], None]
) -> None:
    """Inject an adapter into a model that is not a `PeftModel`."""
    configs = vars(model).get("peft_config", {})
    if adapter_name in configs:
        raise PeftValueError(
            f"Adapter with name '{adapter_name}' already exists; choose another, or delete that "
            "one first."
        )
    tuner_cls = lookup(PEFT_TYPE_TO_TUNER_MAPPING, PeftType.LOKR)
    tuner = tuner_cls(model, config, adapter_name, shared_root=model, initialize=False, fill=fill)
    vars(model)["peft_config"] = {**configs, adapter_name: tuner.config_to_save(adapter_name)}
    # The adapter methods of diffusers and transformers ask for it.
    if getattr(model, "_hf_peft_config_loaded", None) is False:
        vars(model)["_hf_peft_config_loaded"] = True


def read_lokr_adapter(
    file: File, model: nn.Module | None = None, component: str | None = None
) -> tuple[LoKrConfig, dict[str, Tensor]]:
    """Return a LoKr file of any writer as config and tensors by checkpoint key, as
    `save_pretrained` writes them.

    Args:
        file, component: As for `inspect_lokr_file`.
        model: The model that the file is for, without adapters. The adapter is put into it, so
            pass one on the meta device. None: the names of modules in the file are taken as paths,
            which needs names with dots.

    Raises:
        CheckpointError: As for `load_lokr_file`, or the file's names are ambiguous without a model.

    Example:
        >>> import torch
        >>> tensors = {"unet.a.b.lokr_w1": torch.ones(2, 2), "unet.a.b.lokr_w2": torch.ones(4, 3)}
        >>> config, state = read_lokr_adapter(tensors)
        >>> config.target_modules, list(state)[0]
        ({'a.b'}, 'base_model.model.a.b.lokr_w1')
    """
    host = _stand_in(read_lokr_file(file), component) if model is None else model
    load_lokr_file(host, file, component=component)
    config = config_of(host, "default")
    state = get_peft_model_state_dict(host)
    if model is None:
        paths = [path for path, _ in modules_of(host, LoKrLayer)]
        config = replace(config, target_modules=sorted(paths), exclude_modules=None)
    return config, {MODEL_ROOT + key.removeprefix(MODEL_ROOT): t for key, t in state.items()}


def _stand_in(contents: LoKrFile, component: str | None) -> nn.Module:
    """Return a model that has the modules of a file at the paths that it names."""
    components = contents.components
    if component is None and len(components) > 1:
        raise PeftValueError(
            f"'{contents.source}' is for several models; pass `component`, one of "
            f"{', '.join(map(repr, components))}."
        )
    name = next(iter(components)) if component is None else component
    modules = components.get(name, [])
    if flat := [module.name for module in modules if module.flat and "_" in module.name]:
        raise CheckpointError(
            f"'{contents.source}' has `_` for dots in names of modules ({flat[0]!r}), so their "
            "paths are not known; pass the model that it is for (its config is enough)."
        )
    state = {
        f"{MODEL_ROOT}{module.name}.lokr_{factor}": tensor
        for module in modules
        for factor, tensor in module.factors.items()
    }
    config = LoKrConfig(target_modules=[module.name for module in modules])
    return skeleton_of([(config, state)])
