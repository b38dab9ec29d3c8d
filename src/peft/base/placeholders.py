# SPDX-License-Identifier: Apache-2.0
"""Names of the PEFT interface that this package does not provide.

Client libraries import them at their own import and ask `isinstance(config, PrefixTuningConfig)`.
They get a class that nothing is an instance of; making one, or calling what is a function
elsewhere, raises an error that says what is provided. Modules that this package lacks can be
imported too, and all that is in them is such a class. Options of LoRA can be made; `LoraConfig`
refuses them.
"""

from __future__ import annotations

import sys
from functools import cache, partial
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from . import placeholder_names
from .errors import PeftNotSupportedError
from .registry import not_provided
from .suggestions import did_you_mean

# Declared for type checkers; a class stands for each.
_NAMES = frozenset(placeholder_names.__annotations__)
_LORA_CONFIGS = """
    ArrowConfig BdLoraConfig CordaConfig EvaConfig KasaConfig LoftQConfig LoraGAConfig MontecloraConfig VeloraConfig
"""
# Folders of methods, and modules of features, that are not here. Whatever is asked of them is a
# marker.
_METHODS = """
    adalora adamss adaption_prompt beft boft c3a cartridge cpt deft delora fourierft frod glora gralora hira hra ia3
    lily ln_tuning miss multitask_prompt_tuning oft osf p_tuning peanut prefix_tuning prompt_tuning psoft pvera
    randlora road shadow shira supertuning tinylora trainable_tokens unilora vera waveft xlora
"""
_FEATURES = """
    peft.optimizers.lorafa peft.optimizers.riemannian peft.tuners._buffer_dict peft.tuners.lora.aqlm
    peft.tuners.lora.arrow peft.tuners.lora.awq peft.tuners.lora.bnb peft.tuners.lora.corda peft.tuners.lora.dora
    peft.tuners.lora.eetq peft.tuners.lora.eva peft.tuners.lora.gptq peft.tuners.lora.hqq peft.tuners.lora.inc
    peft.tuners.lora.intruders peft.tuners.lora.loraga peft.tuners.lora.monteclora peft.tuners.lora.te
    peft.tuners.lora.torchao peft.tuners.lora.tp_layer peft.tuners.lora.variants peft.tuners.lora.velora
    peft.utils.incremental_pca peft.utils.integrations peft.utils.loftq_utils peft.utils.quantization_utils
"""
_ABSENT = frozenset([*(f"peft.tuners.{method}" for method in _METHODS.split()), *_FEATURES.split()])


@cache
def marker(name: str, module: str = "peft") -> type:
    """The class that stands for a name of a module.

    Raises:
        AttributeError: In the interface the module has no such name.
    """
    declared = getattr(sys.modules.get(module), "__annotations__", {})
    is_named = name in declared or (name in _NAMES and module in ("peft", "peft.tuners"))
    if not is_named and (name.startswith("__") or not is_absent(module)):
        declared = [*declared, *(_NAMES if module in ("peft", "peft.tuners") else ())]
        present = (
            ()
            if name.startswith("_") or module not in sys.modules
            else [*vars(sys.modules[module]), *declared]
        )
        raise AttributeError(
            f"module {module!r} has no attribute {name!r}.{did_you_mean(name, present)}",
            name=name,
            obj=None,
        )

    if name in _LORA_CONFIGS.split():
        return _refused_where_used(name, module)

    def refuse(self: Any, *args: Any, **kwargs: Any) -> None:
        raise PeftNotSupportedError(not_provided(name))

    return type(
        name,
        (),
        {"__init__": refuse, "__module__": module, "__doc__": "Not provided by this package."},
    )


def _refused_where_used(name: str, module: str) -> type:
    """The class that stands for an option of LoRA. Scripts make such options at their own import,
    for cases they may never come to; it is `LoraConfig` that refuses them.
    """

    def hold(self: Any, *args: Any, **kwargs: Any) -> None:
        self.args, self.kwargs = args, kwargs

    def show(self: Any) -> str:
        return f"{name}({', '.join([*map(repr, self.args), *(f'{key}={value!r}' for key, value in self.kwargs.items())])})"

    return type(
        name,
        (),
        {
            "__init__": hold,
            "__repr__": show,
            "__module__": module,
            "__doc__": "Not provided by this package.",
        },
    )


def is_absent(module: str) -> bool:
    """Whether a module of the interface, or one in a folder of it, is not here."""
    return module in _ABSENT or module.rpartition(".")[0] in _ABSENT


class _Absent(MetaPathFinder, Loader):
    """Finds modules of the interface that are not here, after all other finders: in them, every
    name is a marker.
    """

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> ModuleSpec | None:
        return ModuleSpec(fullname, self, is_package=True) if is_absent(fullname) else None

    def create_module(self, spec: ModuleSpec) -> None:
        return None

    def exec_module(self, module: ModuleType) -> None:
        module.__doc__ = "Not provided by this package."
        vars(module)["__getattr__"] = partial(marker, module=module.__name__)


def install() -> None:
    """Let modules that are not here be imported."""
    if not any(isinstance(finder, _Absent) for finder in sys.meta_path):
        sys.meta_path.append(_Absent())
