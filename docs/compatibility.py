# SPDX-License-Identifier: Apache-2.0
"""Write `compatibility.md`: the methods, options and names of Hugging Face PEFT that this package
has.

`compatibility.json` lists the names in a release of Hugging Face PEFT. With that release on the
path, `--record` writes the list:

    PYTHONPATH=.peer python docs/compatibility.py --record    # compatibility.json
    python docs/compatibility.py                              # compatibility.md
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import json
import sys
import typing
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
PROVIDED, PLACEHOLDER, ABSENT, ADDED = "provided", "placeholder", "absent", "added"
# The methods that are provided here, in the order of the page.
METHODS = ("POLY", "VBLORA", "LOKR", "LOHA", "LORA")
CLASSES = {
    "PeftModel": "peft",
    "PeftMixedModel": "peft",
    "PeftConfig": "peft",
    "BaseTuner": "peft.tuners.tuners_utils",
    "BaseTunerLayer": "peft.tuners.tuners_utils",
}
INTRODUCTION = """\
# Compatibility with Hugging Face PEFT

This page compares this package with Hugging Face PEFT {version}, name by name. `make docs` writes
it from the code and from a list of that release's names. In the tables "here" is this package and
"there" is Hugging Face PEFT. [Swapping the packages](swapping.md) describes the differences in
sentences.

- **provided**: works here as it does there.
- **placeholder**: can be imported or passed, so code that only mentions it runs. Instantiating or
  calling it raises `PeftNotSupportedError`, and so does a value that turns the option on.
- **absent**: the name does not exist here.
- **added**: exists only here. A config that leaves it at its default is saved without it, and
  loads there. (`kronecker_layout` is saved where outputs depend on it: for `nn.Conv1d` with a full
  `W2`.)
"""
ENDING = """\
## Ask the code

```python
import peft
from peft.utils.peft_types import PEFT_TYPE_TO_CONFIG_MAPPING

sorted(
    method.value for method in PEFT_TYPE_TO_CONFIG_MAPPING
)  # ['LOHA', 'LOKR', 'LORA', 'POLY', 'ROUTED', 'VBLORA']
try:
    peft.IA3Config()
except NotImplementedError as error:
    print(error)  # names this package, and says how to switch to the other
```
"""


def record() -> dict[str, Any]:
    """Return the names that the `peft` on the path has."""
    import peft
    from peft.utils import peft_types

    configs, mixed = peft.PEFT_TYPE_TO_CONFIG_MAPPING, peft.PEFT_TYPE_TO_MIXED_MODEL_MAPPING
    methods = {
        kind.value: {"config": cls.__name__, "mixed": kind in mixed}
        for kind, cls in configs.items()
    }
    for name in METHODS:
        cls = configs[peft_types.PeftType(name)]
        methods[name] |= {
            "fields": [field.name for field in dataclasses.fields(cls)],
            "values": choices(cls),
        }
    functions = {
        n: parameters(getattr(peft, n))
        for n in peft.__all__
        if inspect.isfunction(getattr(peft, n))
    }
    return {
        "version": peft.__version__,
        "methods": dict(sorted(methods.items())),
        "names": sorted(peft.__all__),
        "functions": functions,
        "classes": {
            name: members(getattr(importlib.import_module(module), name))
            for name, module in CLASSES.items()
        },
    }


def choices(config_cls: type) -> dict[str, list[str]]:
    """Return the strings that a config's fields can have, where its types list them."""
    found = {}
    for name, hint in typing.get_type_hints(config_cls).items():
        values = [value for value in _literals(hint) if isinstance(value, str)]
        if values:
            found[name] = values
    return found


def _literals(hint: Any) -> Iterator[Any]:
    if typing.get_origin(hint) is typing.Literal:
        yield from typing.get_args(hint)
    else:
        for part in typing.get_args(hint):
            yield from _literals(part)


def parameters(function: Any) -> list[str]:
    """Return the names of a function's parameters; `**` stands for any others."""
    named = inspect.signature(function).parameters.values()
    return [
        "**" if p.kind is p.VAR_KEYWORD else p.name for p in named if p.kind is not p.VAR_POSITIONAL
    ]


def members(cls: type) -> dict[str, list[str]]:
    """Return the public members that a class has beyond those of `nn.Module`, methods with their
    parameters.
    """
    from torch import nn

    names = [name for name in dir(cls) if not name.startswith("_") and not hasattr(nn.Module, name)]
    entries = {name: inspect.getattr_static(cls, name) for name in names}
    plain = {name: getattr(entry, "__func__", entry) for name, entry in entries.items()}
    return {
        name: parameters(entry) if inspect.isfunction(entry) else []
        for name, entry in plain.items()
    }


def page() -> str:
    """Return the text of `compatibility.md`."""
    theirs, ours = json.loads((HERE / "compatibility.json").read_text()), record()
    parts = [
        INTRODUCTION.format(version=theirs["version"]),
        _methods(theirs, ours),
        _options(theirs, ours),
        _values(theirs),
        _names(theirs),
        _members(theirs, ours),
        ENDING,
    ]
    return "\n".join(parts)


def _methods(theirs: dict, ours: dict) -> str:
    from peft import PEFT_TYPE_TO_TUNER_MAPPING

    rows, mixes = [], {True: "yes", False: "no"}
    every = {**ours["methods"], **theirs["methods"]}
    for name, method in sorted(
        every.items(), key=lambda item: (item[0] not in ours["methods"], item[0])
    ):
        own, is_added = ours["methods"].get(name), name not in theirs["methods"]
        adapted = PEFT_TYPE_TO_TUNER_MAPPING[name].supported_modules if own else ""
        here = mixes[own["mixed"]] if own else ""
        rows.append(
            (
                name,
                f"`{method['config']}`",
                ADDED if is_added else name_status(method["config"]),
                adapted,
                "" if is_added else mixes[method["mixed"]],
                here,
            )
        )
    text = (
        "## Methods\n\n"
        "A method mixes if its adapters can share a model with those of other methods "
        "(`mixed=True`).\n\n"
    )
    return text + _table(
        ("method", "config", "here", "adapts here", "mixes there", "mixes here"), rows
    )


def _options(theirs: dict, ours: dict) -> str:
    fields = {
        name: dict.fromkeys([*theirs["methods"][name]["fields"], *ours["methods"][name]["fields"]])
        for name in METHODS
    }
    rows = []
    for option in sorted({option for name in METHODS for option in fields[name]}):
        rows.append(
            (
                f"`{option}`",
                *(
                    option_status(name, option, theirs) if option in fields[name] else ""
                    for name in METHODS
                ),
            )
        )
    rows.sort(key=lambda row: all(cell in (ADDED, "") for cell in row[1:]))
    return (
        "## Options\n\nFields of configs. An empty cell: the method has no such option in either "
        "package.\n\n" + _table(("option", *METHODS), rows)
    )


def _values(theirs: dict) -> str:
    rows = []
    for name in METHODS:
        for option, values in theirs["methods"][name]["values"].items():
            cells = [
                f'"{value}"' if value_status(name, option, value) == PROVIDED else f'~~"{value}"~~'
                for value in values
            ]
            rows.append((name, f"`{option}`", ", ".join(cells)))
    text = (
        "## Values of options\n\n"
        "String values of options there. Values struck out are refused here.\n\n"
    )
    return text + _table(("method", "option", "values"), rows)


def _names(theirs: dict) -> str:
    methods = {method["config"].removesuffix("Config") for method in theirs["methods"].values()}
    by_status: dict[str, list[str]] = {PLACEHOLDER: [], ABSENT: []}
    for name in theirs["names"]:
        status = name_status(name)
        if status != PROVIDED and name.removesuffix("Config").removesuffix("Model") not in methods:
            by_status[status].append(f"`{name}`")
    provided = sum(name_status(name) == PROVIDED for name in theirs["names"])
    text = f"## Names in `peft`\n\n{provided} of {len(theirs['names'])} names are provided. "
    text += "Names other than the configs and models of the methods above:\n\n"
    return text + "".join(
        f"- {status}: {', '.join(names) or 'none'}\n" for status, names in by_status.items()
    )


def _members(theirs: dict, ours: dict) -> str:
    objects, lines = examples(), []
    for name, there in theirs["classes"].items():
        absent = [f"`{member}`" for member in there if not hasattr(objects[name], member)]
        lacking = [
            f"`{m}({p})`"
            for m, names in there.items()
            for p in _lacking(names, ours["classes"][name].get(m))
        ]
        lines.append(
            (
                f"`{name}`",
                str(len(there) - len(absent)),
                ", ".join(absent) or "none",
                ", ".join(lacking) or "none",
            )
        )
    for name, names in theirs["functions"].items():
        if lacking := _lacking(names, ours["functions"].get(name)):
            lines.append((f"`{name}`", "", "", ", ".join(map("`{}`".format, lacking))))
    text = (
        "## Members and parameters\n\n"
        "Public members of objects there, and parameters of functions and methods there.\n\n"
    )
    return text + _table(
        (
            "class or function",
            "members here",
            "members absent",
            "parameters absent",
        ),
        lines,
    )


def _lacking(there: list[str], here: list[str] | None) -> list[str]:
    return [] if not here or "**" in here else [name for name in there if name not in (*here, "**")]


def examples() -> dict[str, Any]:
    """Return an object of each class."""
    import torch

    import peft

    def base() -> torch.nn.Module:
        return torch.nn.Sequential(torch.nn.Linear(4, 4))

    config = peft.LoraConfig(target_modules=["0"])
    model, mixed = (
        peft.get_peft_model(base(), config),
        peft.get_peft_model(base(), config, mixed=True),
    )
    tuner = model.base_model
    return {
        "PeftModel": model,
        "PeftMixedModel": mixed,
        "PeftConfig": config,
        "BaseTuner": tuner,
        "BaseTunerLayer": tuner.model[0],
    }


def name_status(name: str) -> str:
    """Return the status of a name of `peft` in this package."""
    import peft
    from peft.base import placeholder_names

    if name in peft.__all__:
        return PROVIDED
    return PLACEHOLDER if hasattr(placeholder_names, name) else ABSENT


def option_status(method: str, option: str, theirs: dict) -> str:
    """Return the status of a method's option in this package."""
    import peft

    fields = {
        field.name: field
        for field in dataclasses.fields(peft.PEFT_TYPE_TO_CONFIG_MAPPING[peft.PeftType(method)])
    }
    if option not in fields:
        return ABSENT
    if option not in theirs["methods"][method]["fields"]:
        return ADDED
    return (
        PLACEHOLDER
        if fields[option].metadata.get("help", "").startswith("Not provided")
        else PROVIDED
    )


def value_status(method: str, option: str, value: str) -> str:
    """Try a value in a config, and return its status."""
    import peft

    value = value.replace("[number of iters]", "4")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            peft.PEFT_TYPE_TO_CONFIG_MAPPING[peft.PeftType(method)](**{option: value})
        except peft.PeftError:
            return ABSENT
    return PROVIDED


def _table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    lines = [list(head), *map(list, rows)]
    lines.insert(1, ["---"] * len(lines[0]))
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


if __name__ == "__main__":
    if "--record" in sys.argv:
        (HERE / "compatibility.json").write_text(json.dumps(record(), indent=1) + "\n")
    else:
        (HERE / "compatibility.md").write_text(page())
