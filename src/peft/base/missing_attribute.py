# SPDX-License-Identifier: Apache-2.0
"""The error for an attribute that neither a model with adapters nor the models inside it have."""

from __future__ import annotations

from .errors import PeftError
from .registry import PEFT_TYPE_TO_TUNER_MAPPING, PeftType
from .suggestions import did_you_mean


class PeftAttributeError(PeftError, AttributeError):
    """A missing attribute.

    The message, which suggests similar names, is made when it is read: libraries often ask a model
    by `hasattr`, which drops the error.

    Args:
        owners: The object that was asked, then the objects that its attributes come from. An object
            that passes the error on puts itself in front.
        attribute: Name of the attribute.

    Attributes:
        remedy: What to do if the attribute is one of a method; an owner may set it.
    """

    def __init__(self, owners: tuple[object, ...], attribute: str) -> None:
        # With an `obj`, Python would add a suggestion of its own.
        super().__init__(name=attribute, obj=None)
        self.owners = owners
        self.remedy = ""

    def __str__(self) -> str:
        first, *inner = (type(owner).__name__ for owner in self.owners)
        name = str(self.name)
        others = "".join(f", nor has its {other}" for other in inner)
        text = f"'{first}' object has no attribute '{name}'{others}."
        methods = [
            PeftType(kind).value
            for kind, tuner in PEFT_TYPE_TO_TUNER_MAPPING.items()
            if hasattr(tuner, name)
        ]
        if methods:
            return f"{text} It is for adapters of {' and '.join(methods)}.{self.remedy}"
        sources = (*self.owners, *PEFT_TYPE_TO_TUNER_MAPPING.values())
        names = {
            other
            for source in sources
            for other in dir(source)
            if other.startswith("_") == name.startswith("_")
        }
        return text + did_you_mean(name, names, cutoff=0.7)

    def __reduce__(self) -> tuple[type[AttributeError], tuple[str]]:
        return AttributeError, (str(self),)
