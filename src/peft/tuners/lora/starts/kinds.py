# SPDX-License-Identifier: Apache-2.0
"""Starts that a file has to hold (`files.py`), and the fields of configs that say so."""

from __future__ import annotations

from ....base.errors import PeftNotSupportedError, warn
from ....base.plain_values import JsonObject

# Values of a config's `start`: the adapter starts with values that it would draw again, or with
# those in its file.
REPEATABLE, IN_FILE = "repeatable", "in_file"
# Starts that are a part of the base weight by data: only the layer, or the file, has them.
FROM_DATA = ("corda", "lora_ga")


def is_random(init_lora_weights: object) -> bool:
    """Return whether an adapter starts from the base weight by random numbers."""
    return isinstance(init_lora_weights, str) and init_lora_weights.startswith("pissa_niter_")


def is_in_file(init_lora_weights: object) -> bool:
    """Return whether a file has to hold an adapter's start, since readers can't compute it."""
    return is_random(init_lora_weights) or init_lora_weights in FROM_DATA


def with_own_rank(content: JsonObject) -> JsonObject:
    """Return the fields of a file with a start, as those of an adapter of its own rank."""
    start = content["start"]
    ranks = {key: r // 2 for key, r in (content.get("rank_pattern") or {}).items()}
    return {
        **content,
        **start,
        "r": content["r"] // 2,
        "rank_pattern": ranks,
        "start": IN_FILE if start.get("init_lora_weights") in FROM_DATA else REPEATABLE,
    }


def check_readable(content: JsonObject) -> None:
    """Check that a file has what its adapter started from, where readers can't compute it.

    Raises:
        PeftNotSupportedError: The start depends on data.
    """
    how = content.get("init_lora_weights")
    if how in FROM_DATA:
        raise PeftNotSupportedError(
            f"LoraConfig: the adapter's `init_lora_weights`={how!r} changed the base weight by "
            "data that is not in its file. Have its writer save it with "
            "`path_initial_model_for_weight_conversion`; or, if this base is the changed one, pass "
            "a config with `init_lora_weights=True`."
        )
    if is_random(how) and content.get("start") is None:
        warn(
            f"The adapter's `init_lora_weights`={how!r} drew random numbers that its file does not "
            "have; with others, its outputs are not those it was trained to. Have its writer save "
            "it with `path_initial_model_for_weight_conversion`."
        )
