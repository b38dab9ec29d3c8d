# SPDX-License-Identifier: Apache-2.0
"""Names of the PEFT interface that a module does not define: those that have their home in another
module here, and placeholders for those that this package does not implement.

Client libraries import such names at their own import, and ask `isinstance(config,
PrefixTuningConfig)`. A placeholder is a class without instances: importing it and `isinstance`
checks work; making an instance, or reading an attribute (`PromptTuningInit.TEXT`), raises
`PeftNotSupportedError`, which lists the methods that exist and says which package this is.
Modules that this package lacks can be imported too, and every name in them is a placeholder.
Options of LoRA can be made; `LoraConfig` refuses them.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from . import placeholder_names
from .errors import PeftNotSupportedError
from .other_places import from_other_place
from .registry import PeftType, not_provided
from .suggestions import did_you_mean

_NAMES = frozenset(
    name
    for name, value in vars(placeholder_names).items()
    if value is placeholder_names.Placeholder
) - {"Placeholder"}
_LORA_OPTIONS = frozenset(
    ["ArrowConfig", "BdLoraConfig", "KasaConfig", "MontecloraConfig", "VeloraConfig"]
)
# Modules of features that this package lacks, in addition to the folders of methods.
_FEATURES = frozenset({
    "peft.optimizers.lorafa", "peft.optimizers.riemannian", "peft.tuners._buffer_dict",
    "peft.tuners.lora.aqlm", "peft.tuners.lora.arrow", "peft.tuners.lora.awq",
    "peft.tuners.lora.dora", "peft.tuners.lora.eetq", "peft.tuners.lora.gptq",
    "peft.tuners.lora.hqq", "peft.tuners.lora.inc", "peft.tuners.lora.intruders",
    "peft.tuners.lora.monteclora", "peft.tuners.lora.te", "peft.tuners.lora.tp_layer",
    "peft.tuners.lora.velora", "peft.utils.incremental_pca", "peft.utils.quantization_utils",
})  # fmt: skip


@cache
def placeholder(name: str, module: str = "peft") -> Any:
    """Return a name of a module that another one defines, or its placeholder.

    Raises:
        AttributeError: The interface does not have the name there.
    """
    with suppress(KeyError):
        return from_other_place(name, module)
    if name.endswith("_TARGET_MODULES_MAPPING") and _is_absent(module):
        return getattr(import_module("peft.utils.constants"), name)
    declared = {*getattr(sys.modules.get(module), "__annotations__", ())}
    if module in ("peft", "peft.tuners"):
        declared |= _NAMES
    if name not in declared and (name.startswith("__") or not _is_absent(module)):
        is_public = module in sys.modules and not name.startswith("_")
        present = [*vars(sys.modules[module]), *declared] if is_public else []
        raise AttributeError(
            f"module {module!r} has no attribute {name!r}.{did_you_mean(name, present)}",
            name=name,
            obj=None,
        )
    members = {
        "__init__": _refuse,
        "__module__": module,
        "__doc__": "Not provided by this package.",
    }
    if name in _LORA_OPTIONS:
        members |= {"__init__": _hold, "__repr__": _show}
    return _Absent(name, (), members)


def placeholders(module: str) -> Callable[[str], object]:
    """Return the `__getattr__` of a module, which gives `placeholder` for names that it lacks."""
    return lambda name: placeholder(name, module)


class NotProvidedError(PeftNotSupportedError, AttributeError):
    """An attribute of a class that this package does not provide."""


class _Absent(type):
    """Class of the placeholders: reading one of its attributes or entries says what it is."""

    def __getattr__(cls, name: str) -> object:
        if name.startswith("__"):  # which copying, pickling and others look for
            raise AttributeError(name)
        raise NotProvidedError(not_provided(cls.__name__))

    def __getitem__(cls, key: object) -> object:
        raise PeftNotSupportedError(not_provided(cls.__name__))


def install() -> None:
    """Make the modules of the interface that this package lacks importable."""
    if not any(isinstance(finder, _AbsentModules) for finder in sys.meta_path):
        sys.meta_path.append(_AbsentModules())


def _refuse(self: object, *args: object, **kwargs: object) -> None:
    raise PeftNotSupportedError(not_provided(type(self).__name__))


# Scripts make these option objects of LoRA when they are imported, and may never use them. So
# making an object is allowed, and `LoraConfig` refuses it.
def _hold(self: object, *args: object, **kwargs: object) -> None:
    vars(self).update(args=args, kwargs=kwargs)


def _show(self: object) -> str:
    args, kwargs = vars(self)["args"], vars(self)["kwargs"]
    shown = [*map(repr, args), *(f"{key}={value!r}" for key, value in kwargs.items())]
    return f"{type(self).__name__}({', '.join(shown)})"


class _AbsentModules(MetaPathFinder, Loader):
    """Finder and loader of the modules that this package lacks. It is asked after all others."""

    def find_spec(
        self, fullname: str, path: object, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        parent = fullname.rpartition(".")[0]
        if not _is_listed(fullname) and not (_is_listed(parent) and _is_absent(parent)):
            return None
        return ModuleSpec(fullname, self, is_package=True)

    def create_module(self, spec: ModuleSpec) -> None:
        return None

    def exec_module(self, module: ModuleType) -> None:
        module.__doc__ = "Not provided by this package."
        vars(module)["__getattr__"] = placeholders(module.__name__)


def _is_listed(module: str) -> bool:
    """Return True for modules of features, and for folders of methods not implemented here."""
    folder, _, method = module.rpartition(".")
    is_method = folder == "peft.tuners" and method.upper() in PeftType.__members__
    return module in _FEATURES or is_method


def _is_absent(module: str) -> bool:
    """Return True for an imported module that stands in for one which this package lacks."""
    return isinstance(getattr(sys.modules.get(module), "__loader__", None), _AbsentModules)
