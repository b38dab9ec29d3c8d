# SPDX-License-Identifier: Apache-2.0
"""Base models from their folders: without weights for plans, and with an adapter merged in."""

from __future__ import annotations

import importlib
import os
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from torch import nn

from .auto import auto_class_name
from .base.constants import WEIGHTS_FILES
from .base.errors import CheckpointError, CheckpointWriteError, PeftValueError
from .base.plain_values import JsonObject
from .base.registry import PEFT_TYPE_TO_TUNER_MAPPING, TaskType, lookup
from .checkpoint.files import read_json, read_shapes
from .checkpoint.hub import HubOptions, find_file, local_folder, only_hub_options
from .checkpoint.new_folder import new_folder
from .checkpoint.vocabulary import fit_vocabulary
from .config import PeftConfig
from .peft_model import PeftModel

_CONFIG = "config.json"
# Ends of the names of weights, which a merged model has in files of its own.
_WEIGHTS = (
    ".bin", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx", ".pt", ".pth", ".safetensors",
    ".index.json",
)  # fmt: skip


def meta_model(
    source: str | os.PathLike[str],
    task_type: str | None = None,
    *,
    subfolder: str | None = None,
    **hub_options: object,
) -> nn.Module:
    """Return a model of transformers or diffusers on the meta device: its modules, no weights.

    A model of any size takes seconds, and its `config.json` is all that is read.

    Args:
        source: A folder with a `config.json`, that file, or an id on the Hub.
        task_type: A `TaskType`: the model for this task. None: the class that the config names.
        subfolder: Folder inside it: "transformer", "unet" or "text_encoder" of a pipeline.
        **hub_options: `revision`, `token`, `cache_dir`, …

    Raises:
        CheckpointNotFoundError: There is no such config.
        CheckpointError: It is not a model's config.
        PeftValueError: `task_type` is not a task type, or the library lacks the model's class.

    Example:
        `plan(meta_model("models/llama"), LoraConfig(r=16))`
    """
    hub = only_hub_options({**hub_options, "subfolder": subfolder}, "meta_model")
    model_class = _find_class(source, task_type, hub)
    with torch.device("meta"):
        try:
            return model_class.empty()
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise CheckpointError(f"'{model_class.config_file}' makes no model: {error}") from error


def load_base_model(
    source: str | os.PathLike[str],
    task_type: str | None = None,
    *,
    dtype: torch.dtype | None = None,
    random: bool = False,
    subfolder: str | None = None,
    **hub_options: object,
) -> nn.Module:
    """Return a model of transformers or diffusers on the CPU, with its weights.

    Args:
        source, task_type, subfolder, **hub_options: As for `meta_model`.
        dtype: By default that of the files.
        random: Draw the weights at random; only the config is read.

    Raises:
        As `meta_model`.
        CheckpointError: The weights are missing or damaged.
    """
    hub = only_hub_options({**hub_options, "subfolder": subfolder}, "load_base_model")
    model_class = _find_class(source, task_type, hub)
    if random:
        model = model_class.empty()
        return model if dtype is None else model.to(dtype)
    argument = "torch_dtype" if model_class.is_diffusers else "dtype"
    wanted: object = dtype if dtype is not None or model_class.is_diffusers else "auto"
    try:
        return model_class.cls.from_pretrained(source, **{argument: wanted}, **hub)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(f"The base model '{source}' can't be loaded: {error}") from error


def save_merged(
    path: str | os.PathLike[str],
    adapter: str | os.PathLike[str],
    base_model: str | os.PathLike[str] | None = None,
    *,
    dtype: torch.dtype | None = None,
    replace_existing: bool = False,
    subfolder: str | None = None,
    **options: Any,
) -> None:
    """Merge an adapter into its base model, and write the model to a folder as safetensors.

    Tokenizer and other files of the base model's folder come along; those of the adapter's folder
    take precedence. The folder appears when it is complete, or not at all.

    Args:
        path: The new folder.
        adapter: The adapter's folder, or its id on the Hub.
        base_model: The base model's folder, or its id on the Hub; by default the one that the
            adapter's config names.
        dtype: Dtype to merge and write in, by default that of the base model's files.
        replace_existing: Replace a model that is in the folder.
        subfolder: Folder of the model in a pipeline's base model: "transformer", "unet".
        **options: Arguments that merging the method takes, such as `task_id` of Poly.

    Raises:
        PeftValueError: The folder is there, or the base model is not known.
        CheckpointError: A file is missing or damaged, or does not fit.
        CheckpointWriteError: The files can't be written.
        As `merge_and_unload`; nothing is written then.
    """
    with new_folder(path, _CONFIG, replace_existing) as folder:
        config = PeftConfig.from_pretrained(adapter)
        place = base_model if base_model is not None else config.base_model_name_or_path
        if place is None:
            raise PeftValueError(
                f"The config of '{adapter}' does not name its base model; pass `base_model`."
            )
        revision = config.revision if place == config.base_model_name_or_path else None
        model = load_base_model(
            place, config.task_type, dtype=dtype, subfolder=subfolder, revision=revision
        )
        files = find_file(adapter, WEIGHTS_FILES, {})
        tuner_cls = lookup(PEFT_TYPE_TO_TUNER_MAPPING, config.peft_type)
        fit_vocabulary(model, read_shapes(files), tuner_cls.checkpoint_format.token_dims)
        merged: Any = PeftModel.from_pretrained(model, adapter).merge_and_unload(
            safe_merge=True, **options
        )
        try:
            merged.save_pretrained(folder)
        except (OSError, RuntimeError, SafetensorError) as error:
            failure = CheckpointWriteError(f"'{path}' can't be written: {error}")
            failure.errno = getattr(error, "errno", None)
            raise failure from error
        _copy_companions(adapter, folder, "adapter_")
        _copy_companions(Path(place, subfolder or ""), folder)


class _BaseModelClass(NamedTuple):
    """A model's class in another library, and the config that it is made of."""

    cls: Any
    config_file: Path
    content: JsonObject
    is_diffusers: bool
    place: str

    def empty(self) -> nn.Module:
        """Return a model on the device of the context, without its weights."""
        if self.is_diffusers:
            return self.cls.from_config(self.content)
        transformers = importlib.import_module("transformers")
        config = transformers.AutoConfig.from_pretrained(self.config_file)
        make = getattr(self.cls, "_from_config", None) or self.cls.from_config
        model = make(config)
        model.config._name_or_path = model.name_or_path = self.place
        return model


def _find_class(
    source: str | os.PathLike[str], task_type: str | None, hub: HubOptions
) -> _BaseModelClass:
    """Return the class of the model that a `config.json` describes."""
    if task_type is not None and task_type not in [task.value for task in TaskType]:
        raise PeftValueError(
            f"`task_type`={task_type!r} must be one of {', '.join(t.value for t in TaskType)}."
        )
    path = Path(source) if Path(source).is_file() else find_file(source, (_CONFIG,), hub)
    content = read_json(path)
    is_diffusers = "_class_name" in content
    if not is_diffusers and "model_type" not in content:
        raise CheckpointError(
            f"'{path}' is not the config of a model of transformers or diffusers: it has neither "
            "`model_type` nor `_class_name`."
        )
    names = content.get("architectures") or ["AutoModel"]
    name = str(content["_class_name"] if is_diffusers else names[0])
    if task_type is not None and not is_diffusers:
        name = auto_class_name(task_type)
    library = importlib.import_module("diffusers" if is_diffusers else "transformers")
    cls = getattr(library, name, None)
    if not isinstance(cls, type) or not hasattr(cls, "from_pretrained"):
        raise PeftValueError(
            f"'{path}' is of the class {name!r}, which the installed {library.__name__} does not "
            "have. Load the model yourself and use the Python functions."
        )
    place = "" if path == Path(source) else os.fspath(source)  # a config is not the model
    return _BaseModelClass(cls, path, content, is_diffusers, place)


def _copy_companions(source: str | os.PathLike[str], folder: Path, ignored: str = "\0") -> None:
    """Copy the files of a local folder that are no weights and that a new folder does not have."""
    place = local_folder(source)
    for path in sorted(place.iterdir()) if place is not None else ():
        is_new = not (folder / path.name).exists()
        is_weights = path.name.endswith(_WEIGHTS) or path.name.startswith((ignored, "."))
        if path.is_file() and is_new and not is_weights and path.name != "README.md":
            shutil.copyfile(path, folder / path.name)
