# SPDX-License-Identifier: Apache-2.0
"""`peft compare`."""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass

import click

from ..base.plain_values import JsonObject, plain
from ..base.tables import table
from ..clustering import AdapterSimilarity, adapter_similarity
from ..core.low_rank_deltas import check_has_deltas
from ..standalone import load_standalone
from .common import PLACE, host_of, model_options, named_sources, shared_options, show

# Fields that say nothing of what an adapter computes, or that are made from its tensors here.
_UNIMPORTANT = {
    "auto_mapping", "exclude_modules", "inference_mode", "peft_version", "target_modules",
}  # fmt: skip


@click.command()
@click.argument("adapters", type=PLACE, nargs=-1, required=True)
@model_options
@shared_options
def compare(
    adapters: Sequence[str], model: str | None, subfolder: str | None, as_json: bool
) -> None:
    """Compare adapters layer by layer.

    The table has norms, difference and cosine of the deltas. The adapters can be of any methods and
    ranks, for one base model, which is not needed. Each task of an adapter counts by itself.
    """
    if len(adapters) < 2:
        raise click.UsageError("Name two adapters or more.")
    places = named_sources(adapters)
    for place in places.values():
        check_has_deltas(place)
    loaded = load_standalone(places, model=host_of(model, subfolder, as_json))
    configs = {name: plain(config.to_dict()) for name, config in loaded.peft_config.items()}
    show(_Comparison(adapter_similarity(loaded), _differences(configs)), as_json)


@dataclass
class _Comparison:
    """The similarity of adapters, and the fields in which their configs differ."""

    similarity: AdapterSimilarity
    fields: dict[str, dict[str, object]]

    def to_dict(self) -> JsonObject:
        """Return the comparison as values of JSON."""
        return {**self.similarity.to_dict(), "config_differences": self.fields}

    def __str__(self) -> str:
        lines = [str(self.similarity)]
        if self.fields:
            names = list(next(iter(self.fields.values())))
            rows = [["configs differ in", *names]]
            rows += [[key, *map(repr, values.values())] for key, values in self.fields.items()]
            lines += ["", table(rows)]
        return "\n".join(lines)


def _as_text(value: object) -> object:
    """Return a value of a config as one of JSON."""
    return str(value.value) if isinstance(value, enum.Enum) else value


def _differences(configs: dict[str, JsonObject]) -> dict[str, dict[str, object]]:
    """Return the fields of configs that are not the same in all, with the value in each."""
    keys = set.intersection(*(set(config) for config in configs.values()))
    result = {}
    for key in sorted(keys - _UNIMPORTANT):
        values = {name: _as_text(config[key]) for name, config in configs.items()}
        if len(set(map(repr, values.values()))) > 1:
            result[key] = values
    return result
