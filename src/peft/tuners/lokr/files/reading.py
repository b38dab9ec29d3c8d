# SPDX-License-Identifier: Apache-2.0
"""A LoKr file → its modules."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from torch import Tensor

from ....base.errors import CheckpointError, PeftTypeError
from ....checkpoint.files import SAFETENSORS_WEIGHTS_NAME, read_metadata, read_weights
from ....checkpoint.paths import as_path
from .file_module import FileModule
from .keys import NUMBERS, split_key

# Components by which a file without a telling header shows its writer.
_WRITERS = {
    "Hugging Face PEFT": {"base_model.model", "unet.base_model.model"},
    "LyCORIS in kohya's layout":
        {"lora_unet", "lora_te", "lora_te1", "lora_te2", "lora_te3", "lora_prior_unet"},
    "LyCORIS (or SimpleTuner, ai-toolkit)": {"lycoris", "lycoris_unet"},
    "ai-toolkit (or for ComfyUI)": {"diffusion_model", "model.diffusion_model"},
    "OneTrainer": {"lora_transformer"},
    "diffusers (or SimpleTuner)":
        {"transformer", "unet", "text_encoder", "text_encoder_2", "text_encoder_3"},
}  # fmt: skip
# Keys of other methods: a pattern, the kind of file, how to load it.
_OTHER_METHODS = (
    (
        r"\blora_(A|B|down|up|embedding_A)\b",
        "a LoRA file",
        "load it with `PeftModel.from_pretrained` (a folder with its config) or with diffusers' "
        "`load_lora_weights`",
    ),
    (r"\bhada_w1", "a LoHa file", "`PeftModel.from_pretrained` loads one that has its config"),
    (r"\b(poly_lora|vblora)_", "a Poly or VB-LoRA adapter", "`PeftModel.from_pretrained` loads it"),
)


@dataclass
class LoKrFile:
    """The contents of a LoKr file of any writer.

    Args:
        source: Path of the file; "tensors" if there is none.
        metadata: The file's header.
        modules: Modules by component and name.
        unknown: Keys that belong to no LoKr module.
    """

    source: str
    metadata: dict[str, str] = field(default_factory=dict)
    modules: dict[tuple[str, str], FileModule] = field(default_factory=dict)
    unknown: list[str] = field(default_factory=list)

    def __repr__(self) -> str:
        return f"LoKrFile('{self.source}', {len(self.modules)} modules, from {self.writer})"

    @property
    def components(self) -> dict[str, list[FileModule]]:
        """Modules by component."""
        result: dict[str, list[FileModule]] = {}
        for (component, _), module in self.modules.items():
            result.setdefault(component, []).append(module)
        return result

    @property
    def writer(self) -> str:
        """Program that wrote the file: from its header, else from its components."""
        return writer_of(self.metadata, self.components) or "an unknown program"


def writer_of(header: Mapping[str, str], components: Collection[str]) -> str | None:
    """Return the program that wrote an adapter's file, by its header, else by the components of its
    keys; None if these do not tell.
    """
    if module := header.get("ss_network_module"):
        return f"sd-scripts with {module}"
    if "ai-toolkit" in header.get("software", ""):
        return "ai-toolkit"
    if any(name.startswith("ot_") for name in header):
        return "OneTrainer"
    if "lora_adapter_metadata" in header:
        return "diffusers"
    return next(
        (program for program, own in _WRITERS.items() if not own.isdisjoint(components)), None
    )


def read_lokr_file(file: str | os.PathLike[str] | dict[str, Tensor]) -> LoKrFile:
    """Read a LoKr file or tensors by key.

    Raises:
        CheckpointError: It can't be read or holds no LoKr modules, or its alpha is NaN.
    """
    tensors, result = _open(file)
    for name, tensor in tensors.items():
        key = split_key(name)
        if key is None or not _fits(key.tensor, tensor):
            result.unknown.append(name)
            continue
        module = result.modules.setdefault(
            (key.component, key.name), FileModule(key.name, key.component, key.flat)
        )
        if key.tensor == "alpha":
            module.alpha = _number(result.source, name, tensor)
        elif key.tensor == "scalar":
            module.scalar = _number(result.source, name, tensor)
        elif key.tensor == "dora_scale":
            module.dora_scale = tensor
        else:
            module.factors[key.tensor.removeprefix("lokr_")] = tensor
    for owner, module in list(result.modules.items()):
        if not module.factors:  # alpha or dora_scale of another method's module
            result.unknown.append(".".join(filter(None, owner)))
            del result.modules[owner]
    if not result.modules:
        raise CheckpointError(f"'{result.source}' {_no_lokr_file(tensors)}")
    for module in result.modules.values():
        module.fold_scalar()
    return result


def _fits(name: str, tensor: Tensor) -> bool:
    """Return whether a tensor has as many axes as one of its name."""
    if name in NUMBERS:
        return tensor.numel() == 1 and not tensor.is_complex()
    return tensor.dim() >= (1 if name == "dora_scale" else 2)


def _open(file: str | os.PathLike[str] | dict[str, Tensor]) -> tuple[dict[str, Tensor], LoKrFile]:
    """Return a file's tensors, and a `LoKrFile` with its source and header."""
    if not isinstance(file, dict):
        path = as_path(file, "file", " or tensors by key")
        path = path / SAFETENSORS_WEIGHTS_NAME if path.is_dir() else path
        return read_weights(path), LoKrFile(str(path), read_metadata(path))
    for key, tensor in file.items():
        if not (isinstance(key, str) and isinstance(tensor, Tensor)):
            raise PeftTypeError(
                f"`file` must hold tensors by key; {key!r} has {type(tensor).__name__}."
            )
    return file, LoKrFile("tensors")


def _number(source: str, key: str, tensor: Tensor) -> float:
    """Return a tensor's one value. An infinite alpha is 1e10, "no scale", in half precision."""
    value = float(tensor)
    if math.isnan(value) or (math.isinf(value) and key.endswith("scalar")):
        raise CheckpointError(
            f"'{source}': {key!r} is {value}, which no delta can be multiplied by; nothing was "
            "loaded. The training that wrote the file went wrong: take a file of an earlier step."
        )
    return value


def _no_lokr_file(tensors: Mapping[str, Tensor]) -> str:
    """Return the end of a message about a file without LoKr modules: its keys, and their method."""
    if not tensors:
        return "is empty: it holds no tensors."
    keys: Collection[str] = list(tensors)[:3]
    start = f"holds no LoKr modules; its keys are {', '.join(map(repr, keys))}"
    start += ", …" if len(tensors) > 3 else ""
    for pattern, kind, remedy in _OTHER_METHODS:
        if any(re.search(pattern, key) for key in tensors):
            return f"{start}. It is {kind}: {remedy}."
    return f"{start}. Keys of LoKr end with `lokr_w1`, `lokr_w2` and the like."
