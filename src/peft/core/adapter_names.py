# SPDX-License-Identifier: Apache-2.0
"""Checks of the names of adapters."""

from __future__ import annotations

from collections.abc import Collection, Iterable

from ..base.calls.adapter_batch import BASE_MODEL
from ..base.containers import AdapterModuleDict
from ..base.errors import PeftTypeError, PeftValueError
from ..base.validation import check_adapter
from .adapters import AdapterParameterDict

# Bytes of a name in the common file systems.
_LONGEST = 255


def check_name(name: str, taken: Collection[str]) -> None:
    """Check that an adapter can have a name.

    Args:
        name: The name.
        taken: The names of the model's adapters.

    Raises:
        PeftTypeError: It is not a string.
        PeftValueError: It is taken, or has another meaning.
    """
    if not isinstance(name, str):
        raise PeftTypeError(f"The adapter's name {name!r} must be a string.")
    if not name or "." in name:
        raise PeftValueError(
            f"The adapter's name {name!r} must be a non-empty string without dots."
        )
    if name.startswith(("/", "\\")):
        raise PeftValueError(
            f"The adapter's name {name!r} must not be an absolute path: it becomes a folder's name."
        )
    sizes = [len(part.encode(errors="surrogatepass")) for part in name.split("/")]
    if "\0" in name or max(sizes) > _LONGEST:
        shown = name if len(name) <= _LONGEST else f"{name[:20]}…"
        raise PeftValueError(
            f"The adapter's name {shown!r} can't be that of a folder, which has at most {_LONGEST} "
            "bytes, none of them zero; choose another."
        )
    if hasattr(AdapterParameterDict(), name) or hasattr(AdapterModuleDict(), name):
        raise PeftValueError(
            f"The adapter's name {name!r} is an attribute of torch's containers; choose another."
        )
    if name == BASE_MODEL:
        raise PeftValueError(
            f"The adapter's name {name!r} means no adapter in `adapter_names`; choose another."
        )
    if name in taken:
        raise PeftValueError(
            f"Adapter with name '{name}' already exists; choose another, or delete that one first."
        )


def known_names(adapter_names: str | Iterable[str], adapters: Collection[str]) -> list[str]:
    """Return adapter names as a list; raise for a wrong type or an unknown name."""
    if not isinstance(adapter_names, (str, Iterable)):
        raise PeftTypeError(
            f"Adapters are named by a string or a list of strings, got {adapter_names!r}."
        )
    names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
    for name in names:
        check_adapter(name, adapters)
    return names


def names_to_activate(adapter_name: str | list[str], adapters: Collection[str]) -> list[str]:
    """Return names of adapters to make active; raise for none, an unknown one or one name twice."""
    names = known_names(adapter_name, adapters)
    if not names:
        raise PeftValueError(
            f"`adapter_name`={adapter_name!r} names no adapter. To run the model without adapters "
            "use the context `disable_adapter()`, or `disable_adapter_layers()`."
        )
    if len(set(names)) < len(names):
        raise PeftValueError(
            f"`adapter_name`={names} names an adapter twice; active adapters add up, each once."
        )
    return names
