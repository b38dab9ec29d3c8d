# SPDX-License-Identifier: Apache-2.0
"""The README.md written beside an adapter."""

from __future__ import annotations

import re
from pathlib import Path

from torch import nn

from .._version import __version__
from ..base.errors import warn
from ..base.registry import PeftType
from .files import alone_in, write_text
from .protocols import AdapterConfig

# Names of hosting sites for uses of a model, where the task type determines them.
_PIPELINES = {"CAUSAL_LM": "text-generation"}
_METADATA = re.compile(r"\s*---\n(.*?\n)?---[ \t]*(?:\n|$)", re.DOTALL)


def update_model_card(folder: Path, config: AdapterConfig, model: nn.Module) -> None:
    """Write a model card, or update the metadata of an existing one, if it can be read."""
    import yaml  # importing huggingface_hub's cards takes longer than saving an adapter

    path = folder / "README.md"
    text = path.read_text(encoding="utf-8") if path.is_file() else _body(config)
    found = _METADATA.match(text)
    try:
        data = (yaml.safe_load(found.group(1) or "") if found else None) or {}
    except yaml.YAMLError as error:
        data = str(error)
    if not isinstance(data, dict):
        warn(
            f"The metadata at the top of '{path}' is not what a model card has there, and is left "
            f"as it is: {data}."
        )
        return
    data["library_name"] = "peft"
    tags = {*map(str, _as_list(data.get("tags"))), *(getattr(model, "model_tags", None) or ())}
    name = getattr(getattr(model, "config", None), "_name_or_path", None)  # of transformers models
    if name:
        data["base_model"] = name
        tags.update(("transformers", f"base_model:adapter:{name}"))
    if config.task_type is not None and config.task_type in _PIPELINES:
        data.setdefault("pipeline_tag", _PIPELINES[config.task_type])
    method = PeftType(config.peft_type).value.lower()
    data["tags"] = sorted({*tags, method})
    metadata = yaml.dump(
        {k: v for k, v in data.items() if v is not None}, sort_keys=False, allow_unicode=True
    )
    body = text[found.end() :] if found else f"\n{text}"
    with alone_in(folder):
        write_text(path, f"---\n{metadata}---\n{body}")


def _as_list(value: object) -> list[object]:
    """Return an entry of a card as a list; it may be a single word, or missing."""
    return value if isinstance(value, list) else [] if value is None else [value]


def _body(config: AdapterConfig) -> str:
    base = config.base_model_name_or_path or "its base model"
    return (
        f"# {getattr(config.peft_type, 'value', config.peft_type)} adapter\n\n"
        f"An adapter for {base}. Load it with `PeftModel.from_pretrained(base_model, folder)`.\n\n"
        f"### Framework versions\n\n- PEFT {__version__}\n"
    )
