# SPDX-License-Identifier: Apache-2.0
"""Configs of saved adapters, and the properties in them that an index lists."""

from __future__ import annotations

import hashlib
import json
from dataclasses import fields
from typing import NamedTuple

from ..base.errors import PeftError, PeftTypeError
from ..base.plain_values import json_object
from ..base.registry import (
    PEFT_TYPE_TO_CONFIG_MAPPING,
    PEFT_TYPE_TO_TUNER_MAPPING,
    PeftType,
    lookup,
)
from ..config import PeftConfig
from ..core.loading import check_sizes


class Facts(NamedTuple):
    """Properties in a config that the index lists."""

    method: str
    base_model: str | None
    task_type: str | None
    rank: int | None
    tasks: tuple[str, ...]


def facts_of(config: PeftConfig, nbytes: int, source: object) -> Facts:
    """Return the properties in a config that the index lists.

    Raises:
        CheckpointError: Weights of so many bytes can't have the sizes in it.
    """
    check_sizes(config, nbytes, source)
    rank = getattr(config, "r", None)
    return Facts(
        PeftType(config.peft_type).value,
        config.base_model_name_or_path,
        None if config.task_type is None else str(config.task_type),
        rank if type(rank) is int else None,
        _tasks(config),
    )


def _tasks(config: PeftConfig) -> tuple[str, ...]:
    """Return the names of the tasks of an adapter with a delta for each, none for others."""
    tuner = lookup(PEFT_TYPE_TO_TUNER_MAPPING, config.peft_type)
    try:
        return tuple(name for name in tuner.delta_views(config) if name)
    except PeftError:
        return ()


def config_from(text: str, source: object) -> PeftConfig:
    """Make a config of the text of its file; fields that its class lacks are passed over.

    Raises:
        PeftError: It is none that this package can read.
    """
    content = json_object(text, source)
    if content.get("peft_type") is None:
        raise PeftTypeError(f"'{source}' has no `peft_type`; it is not an adapter's config.")
    config_cls = lookup(PEFT_TYPE_TO_CONFIG_MAPPING, content["peft_type"])
    known = {item.name for item in fields(config_cls)} - set(config_cls.unsaved)
    return PeftConfig.from_file_fields({k: v for k, v in content.items() if k in known}, {})


def config_digest(text: str, source: object) -> str:
    """Return the SHA-256 digest of what the text of a config says: order, spaces and line ends do
    not count, and every field does.

    Raises:
        CheckpointError: It is not a JSON object.
    """
    content = json.dumps(json_object(text, source), sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()
