# SPDX-License-Identifier: Apache-2.0
"""The error for an attribute that neither a model with adapters has nor what it hands attributes on
from.
"""

from __future__ import annotations

from typing import Any

from .errors import PeftError
from .registry import PEFT_TYPE_TO_TUNER_MAPPING
from .suggestions import did_you_mean


class PeftAttributeError(PeftError, AttributeError):
    """An attribute is missing.

    The message, which names near misses, is made when it is read: libraries ask models by `hasattr`
    often, and drop the error.

    Args:
        owners: The object that was asked, and those it hands attributes on from. Who hands this
            error on adds itself in front.
        attribute: What was asked for.
    """

    def __init__(self, owners: tuple[Any, ...], attribute: str) -> None:
        super().__init__(name=attribute, obj=None)  # type: ignore[call-arg]  # an `obj` would have Python guess a second time
        self.owners = owners

    def __str__(self) -> str:
        first, *inner = (type(owner).__name__ for owner in self.owners)
        name = str(self.name)
        text = (
            f"'{first}' object has no attribute '{name}'"
            + "".join(f", nor has its {other}" for other in inner)
            + "."
        )
        methods = [
            str(kind.value)
            for kind, tuner in PEFT_TYPE_TO_TUNER_MAPPING.items()
            if hasattr(tuner, name)
        ]
        if methods:
            return f"{text} It is for adapters of {' and '.join(methods)}."
        sources = (*self.owners, *PEFT_TYPE_TO_TUNER_MAPPING.values())
        names = {
            other
            for source in sources
            for other in dir(source)
            if other.startswith("_") == name.startswith("_")
        }
        return text + did_you_mean(name, names, cutoff=0.7)

    def __reduce__(self) -> Any:
        return AttributeError, (str(self),)
