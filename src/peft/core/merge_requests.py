# SPDX-License-Identifier: Apache-2.0
"""Names of adapters that a merge is asked for."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from ..base.errors import PeftTypeError, warn
from ..base.validation import check_adapter


def checked_names(adapter_names: Iterable[str]) -> list[str]:
    """Names of adapters, each once.

    Raises:
        PeftTypeError: They are no list of strings.
    """
    if isinstance(adapter_names, str) or not isinstance(adapter_names, Iterable):
        raise PeftTypeError(f"`adapter_names`={adapter_names!r} should be a list of strings.")
    adapter_names = list(adapter_names)
    for name in adapter_names:
        check_adapter(name)
    return list(dict.fromkeys(adapter_names))


def check_merge_options(options: Iterable[str], known: Sequence[str], owner: str) -> None:
    """Check the names of the options of a merge.

    Args:
        options: The names.
        known: Options of the methods whose adapters are merged.
        owner: The tuner's class, for the message.

    Raises:
        PeftTypeError: One is unknown.
    """
    if unknown := sorted(set(options).difference(known)):
        names = ", ".join(f"`{name}`" for name in ("adapter_names", "safe_merge", *known))
        raise PeftTypeError(
            f"Merging got unexpected keyword arguments: {', '.join(unknown)}. With {owner} it "
            f"takes {names}."
        )


def warn_of_merged(merged: Sequence[str], left: Sequence[str]) -> None:
    """Say so where adapters that are to be merged are merged already.

    Args:
        merged: Those that are.
        left: Those that are not.
    """
    if merged and left:
        warn(
            f"Already following adapters were merged {','.join(merged)}. You are now additionally "
            f"merging {','.join(left)}."
        )
    elif merged:
        warn("All adapters are already merged, nothing to do.")
