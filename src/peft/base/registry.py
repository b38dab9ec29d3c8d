# SPDX-License-Identifier: Apache-2.0
"""Names of methods and tasks, and the registry that links a method's name to its classes.

Registration is the only link between the core and a tuner.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from typing import Any, TypeVar

from .errors import PeftValueError
from .field_help import add_field_help
from .suggestions import did_you_mean

T = TypeVar("T")


class PeftType(str, enum.Enum):
    """Names of parameter-efficient fine-tuning methods, as written in `adapter_config.json`."""

    __module__ = "peft.utils.peft_types"

    PROMPT_TUNING = "PROMPT_TUNING"
    MULTITASK_PROMPT_TUNING = "MULTITASK_PROMPT_TUNING"
    P_TUNING = "P_TUNING"
    PREFIX_TUNING = "PREFIX_TUNING"
    LORA = "LORA"
    ADALORA = "ADALORA"
    ADAMSS = "ADAMSS"
    BOFT = "BOFT"
    ADAPTION_PROMPT = "ADAPTION_PROMPT"
    IA3 = "IA3"
    BEFT = "BEFT"
    LILY = "LILY"
    LOHA = "LOHA"
    LOKR = "LOKR"
    OFT = "OFT"
    POLY = "POLY"
    LN_TUNING = "LN_TUNING"
    VERA = "VERA"
    FROD = "FROD"
    PVERA = "PVERA"
    FOURIERFT = "FOURIERFT"
    GLORA = "GLORA"
    XLORA = "XLORA"
    HRA = "HRA"
    VBLORA = "VBLORA"
    UNILORA = "UNILORA"
    CPT = "CPT"
    MISS = "MISS"
    RANDLORA = "RANDLORA"
    ROAD = "ROAD"
    TRAINABLE_TOKENS = "TRAINABLE_TOKENS"
    HIRA = "HIRA"
    SHIRA = "SHIRA"
    C3A = "C3A"
    WAVEFT = "WAVEFT"
    OSF = "OSF"
    DELORA = "DELORA"
    GRALORA = "GRALORA"
    CARTRIDGE = "CARTRIDGE"
    TINYLORA = "TINYLORA"
    PSOFT = "PSOFT"
    PEANUT = "PEANUT"
    SHADOW = "SHADOW"
    SUPERTUNING = "SUPERTUNING"
    DEFT = "DEFT"
    ROUTED = "ROUTED"


class TaskType(str, enum.Enum):
    """Uses of a model, each with a `PeftModelFor…` class."""

    __module__ = "peft.utils.peft_types"

    SEQ_CLS = "SEQ_CLS"
    SEQ_2_SEQ_LM = "SEQ_2_SEQ_LM"
    CAUSAL_LM = "CAUSAL_LM"
    TOKEN_CLS = "TOKEN_CLS"
    QUESTION_ANS = "QUESTION_ANS"
    FEATURE_EXTRACTION = "FEATURE_EXTRACTION"


# Classes of configs and tuners are defined on floors above this one.
PEFT_TYPE_TO_CONFIG_MAPPING: dict[str, Any] = {}
PEFT_TYPE_TO_TUNER_MAPPING: dict[str, Any] = {}
PEFT_TYPE_TO_PREFIX_MAPPING: dict[str, str] = {}
PEFT_TYPE_TO_MIXED_MODEL_MAPPING: dict[str, Any] = {}


def register_peft_method(
    *,
    name: str,
    config_cls: type,
    model_cls: type,
    prefix: str | None = None,
    is_mixed_compatible: bool = False,
) -> None:
    """Add a method to the registry.

    Args:
        name: Lower-case name; its upper-case form is the `peft_type` in configs, and is added to
            `PeftType` if it is new.
        config_cls: Subclass of `PeftConfig`. Its docstring's `Args` become the help of its fields.
        model_cls: Subclass of `BaseTuner`.
        prefix: Prefix of the adapter's parameter names, by default `name` and an underscore.
        is_mixed_compatible: True if the method can share a model with other methods.

    Raises:
        PeftValueError: The name is not in lower case, or it or the prefix is registered already.
    """
    if not name.isidentifier() or name != name.lower():
        raise PeftValueError(f"`name`={name!r} must be a lower-case identifier.")
    peft_type = _peft_type(name.upper())
    if peft_type in PEFT_TYPE_TO_CONFIG_MAPPING:
        raise PeftValueError(f"A method named {name!r} is registered already; choose another name.")
    prefix = prefix or f"{name}_"
    if prefix in PEFT_TYPE_TO_PREFIX_MAPPING.values():
        raise PeftValueError(
            f"The parameter prefix {prefix!r} is taken already; pass another `prefix`."
        )
    add_field_help(config_cls)
    PEFT_TYPE_TO_CONFIG_MAPPING[peft_type] = config_cls
    PEFT_TYPE_TO_TUNER_MAPPING[peft_type] = model_cls
    PEFT_TYPE_TO_PREFIX_MAPPING[peft_type] = prefix
    if is_mixed_compatible:
        PEFT_TYPE_TO_MIXED_MODEL_MAPPING[peft_type] = model_cls


def _peft_type(value: str) -> PeftType:
    """Return the member of `PeftType` called `value`, made if there is none."""
    if value in PeftType.__members__:
        return PeftType[value]
    member = str.__new__(PeftType, value)
    member._name_ = member._value_ = value
    type.__setattr__(PeftType, value, member)
    PeftType._member_map_[value] = PeftType._value2member_map_[value] = member
    PeftType._member_names_.append(value)
    return member


def registered_methods() -> list[str]:
    """Return the names of the methods in the registry."""
    return sorted(PeftType(name).value for name in PEFT_TYPE_TO_CONFIG_MAPPING)


def not_provided(name: str) -> str:
    """Return the message for a name of the interface that this package does not implement."""
    instead = next((remedy for part, remedy in _INSTEAD.items() if part in name), "")
    provided = ", ".join(registered_methods())
    return f"{name} is not provided by this package; it provides {provided}.{instead} {WAY_BACK}"


WAY_BACK = (
    "This `peft` is an independent implementation of the PEFT interface, not Hugging Face's. To go "
    "back to theirs, which has the same name: `pip uninstall peft`, then `pip install peft`."
)
_TOKENS = (
    " Rows of embeddings are trained beside any method by `trainable_token_indices` in its config."
)
# Alternatives to features, by a part of their names.
_INSTEAD = {"TrainableTokens": _TOKENS, "TRAINABLE_TOKENS": _TOKENS}


def lookup(mapping: Mapping[str, T], peft_type: object) -> T:
    """Return a method's entry in one of the mappings above, or raise an error."""
    name = str(getattr(peft_type, "value", peft_type))
    try:
        return mapping[PeftType(peft_type)]
    except KeyError:
        raise PeftValueError(not_provided(f"`peft_type`={name!r}")) from None
    except ValueError:
        provided = registered_methods()
        raise PeftValueError(
            f"`peft_type`={name!r} is not provided by this package and names no method; it "
            f"provides {', '.join(provided)}.{did_you_mean(name, provided)}"
        ) from None
