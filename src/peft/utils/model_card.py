# SPDX-License-Identifier: Apache-2.0
"""The README.md written beside an adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .._version import __version__
from .adapter_files import alone_in, write_text

# What hosting sites call the use of a model that is certain by its task type.
_PIPELINES = {"CAUSAL_LM": "text-generation"}


def update_model_card(folder: Path, config: Any, model: Any) -> None:
    """Write a model card into `folder`, or bring the metadata of the one that is there up to date.

    Args:
        folder: Where it lies.
        config: The adapter's config.
        model: The base model.
    """
    from huggingface_hub import ModelCard, ModelCardData

    path = folder / "README.md"
    text = path.read_text(encoding="utf-8") if path.is_file() else _body(config)
    if not text.startswith("---"):
        text = f"---\nlibrary_name: peft\n---\n\n{text}"
    card = ModelCard(text)
    data = card.data.to_dict()
    data["library_name"] = "peft"
    tags = {*(data.get("tags") or []), *(getattr(model, "model_tags", None) or [])}
    name = getattr(getattr(model, "config", None), "_name_or_path", None)  # of transformers models
    if name is not None:
        data["base_model"] = name
        tags.update(("transformers", f"base_model:adapter:{name}"))
    method = str(getattr(config.peft_type, "value", config.peft_type)).lower()
    data["tags"] = sorted({*tags, method})
    if config.task_type in _PIPELINES:
        data.setdefault("pipeline_tag", _PIPELINES[config.task_type])
    card.data = ModelCardData(**data)
    with alone_in(folder):
        write_text(path, str(card))


def _body(config: Any) -> str:
    base = config.base_model_name_or_path or "its base model"
    return (
        f"# {getattr(config.peft_type, 'value', config.peft_type)} adapter\n\nAn adapter for {base}. "
        "Load it with `PeftModel.from_pretrained(base_model, folder)`.\n\n"
        f"### Framework versions\n\n- PEFT {__version__}\n"
    )
