# SPDX-License-Identifier: Apache-2.0
"""Find the names in a config that match no module of the model, and suggest similar ones."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping

from ..base.constants import (
    INCLUDE_LINEAR_LAYERS_SHORTHAND,
    QA_HEAD_NAMES,
    SEQ_CLS_HEAD_NAMES,
)
from ..base.errors import PeftWarning, warn
from ..base.suggestions import near_misses
from ..config import TargetedConfig
from . import targets as _targets

# A group of a regular expression that lists plain words, such as `(q_proj|v_proj)`.
_WORDS = re.compile(r"\((?:\?:)?((?:[\w.]|\\\.)+(?:\|(?:[\w.]|\\\.)+)+)\)")
# Least similarity at which we suggest a module's name for a word in a regular expression:
# expressions written for many models list words of all of them.
_SLIP = 0.75
# Number of names that a message lists.
_SHOWN = 24
_FEW = 8


def near_modules(name: str, paths: Collection[str], n: int = 3, cutoff: float = 0.6) -> list[str]:
    """Return ends of `paths` that look like `name`, with as many parts or one more, or else one.

    A regular expression is compared by its words.
    """
    name = re.sub(r"[^\w.]+", "", name).strip(".")
    length = name.count(".") + 1
    lengths = (length, length + 1) if length > 1 else (1,)
    found = near_misses(name, (_end(path, parts) for parts in lengths for path in paths), n, cutoff)
    found = [end for end in found if not any(end.endswith(f".{other}") for other in found)]
    return found or (
        near_misses(_end(name, 1), (_end(path, 1) for path in paths), n, cutoff)
        if length > 1
        else []
    )


def unused(names: str | Collection[str], paths: Collection[str]) -> list[str]:
    """Return the entries of a list of module names that match none of `paths`, in order.

    For a regular expression, return the words in a group such as `(q_proj|v_proj)` that change no
    match, if a module has a similar name.
    """
    if isinstance(names, str):
        return [word for word in _idle_words(names, paths) if near_modules(word, paths, 1, _SLIP)]
    ends = {path[i:] for path in paths for i in _targets.starts(path)}
    return [
        name
        for name in (names if isinstance(names, (list, tuple)) else sorted(names))
        if name not in ends
    ]


def with_near_misses(names: Iterable[str], paths: Collection[str]) -> str:
    """Return `names` in quotes, each with the modules that were probably meant."""
    shown = []
    for name in names:
        near = " or ".join(map(repr, near_modules(name, paths)))
        shown.append(f"{name!r}" + (f" (did you mean {near}?)" if near else ""))
    return ", ".join(shown)


def counted_names(paths: Iterable[str]) -> str:
    """Return the names that modules at `paths` end in, in the model's order, each with the number
    of modules.

    Example:
        >>> counted_names(["layers.0.q_proj", "layers.0.to_out.0", "layers.1.q_proj", "lm_head"])
        "'q_proj' (2x), 'to_out.0', 'lm_head'"
    """
    counts = Counter(re.sub(r".*\.(?=[^.]*[^\d.][^.]*(\.\d+)*$)", "", path) for path in paths)
    shown = [f"{name!r}" + (f" ({count}x)" if count > 1 else "") for name, count in counts.items()]
    more = f" and {len(shown) - _SHOWN} more names" if len(shown) > _SHOWN else ""
    return ", ".join(shown[:_SHOWN]) + more


def no_target(config: TargetedConfig, paths: Collection[str], adaptable: Collection[str]) -> str:
    """Return the message for a config that matches none of `paths`, with `adaptable` ones."""
    layers, pattern = _targets.layer_choice(config)
    # Only "all-linear", which stands for the paths that it finds, leaves no targets.
    targets = config.target_modules or INCLUDE_LINEAR_LAYERS_SHORTHAND
    shown = repr(targets)
    if not isinstance(targets, str):
        shown = "{" + ", ".join(map(repr, sorted(targets))) + "}"
    message = (
        f"Target modules {shown} not found in the base model. Please check the target modules and "
        "try again."
    )
    message += what_there_is(config, paths, adaptable)
    if layers is not None:
        message += f" Note: You specified 'layers_to_transform': {layers}."
        message += f" You also specified 'layers_pattern': {pattern}." if pattern else ""
    return message


def what_there_is(
    config: TargetedConfig, paths: Collection[str], adaptable: Collection[str]
) -> str:
    """Return sentences that suggest targets that exist; arguments as for `no_target`."""
    targets, _, pattern = config.target_modules or (), *_targets.layer_choice(config)
    if in_other_layers := _targets.select(paths, targets, config.exclude_modules):
        return f" The model has some {_layers_of(in_other_layers, pattern)}."
    words, text = sorted(targets), _if_expressions(targets)
    if isinstance(targets, str):
        listed = [name for name in re.split(r"[,;|\s]+", targets) if _targets.select(paths, {name})]
        hint = f"; to name modules by the end of their path, pass a list: {listed!r}"
        text = " A string is a regular expression for the whole path of a module"
        text += f"{hint if listed else ''}."
        words = [name for name in _words(targets) if name not in listed]
    near = [match for name in words for match in near_modules(name, adaptable)]
    text += f" Did you mean {', '.join(map(repr, dict.fromkeys(near)))}?" if near else ""
    if adaptable:
        text += f" Modules that can be adapted are called {counted_names(adaptable)}."
    return text


def warn_of_unused(
    config: TargetedConfig, paths: Collection[str], adaptable: Callable[[], Collection[str]]
) -> None:
    """Warn of names and layer indices in a config that match none of a model's module `paths`; for
    targets suggest `adaptable` ones.
    """
    for field, effect in (
        ("target_modules", "adapts"),
        ("exclude_modules", "excludes"),
        ("modules_to_save", "trains"),
    ):
        names = getattr(config, field, None)
        if not names:
            continue
        absent = unused(names, paths)
        if field == "modules_to_save":
            absent = [name for name in absent if not any(_targets.saved([name], p) for p in paths)]
        idle = [name for name in absent if field != "modules_to_save" or name not in _HEADS]
        rest = [] if isinstance(names, str) else sorted(set(names).difference(absent))
        if field == "exclude_modules" and not any(_targets.named(names, path) for path in paths):
            near = f" {with_near_misses(idle, paths)}." if idle else ""
            warn(
                f"You have passed exclude_modules={names!r} but no modules were excluded. "
                f"Please check that exclude_modules was set correctly.{near}",
                PeftWarning,
            )
        elif idle:
            choices = adaptable() if field == "target_modules" else paths
            only = "."
            if 0 < len(rest) <= _FEW:
                only = f"; it {effect} {', '.join(map(repr, rest))} only."
            if not rest and not any(near_modules(name, choices) for name in idle):
                outermost = counted_names(path for path in paths if "." not in path)
                only += f" Its outermost modules are {outermost}."
            warn(
                f"`{field}` names {with_near_misses(idle, choices)}: the model has no such "
                f"module{only}{_if_expressions(idle)}",
                PeftWarning,
            )
    _warn_of_layers(config, paths)


_HEADS = (*SEQ_CLS_HEAD_NAMES, *QA_HEAD_NAMES)


def _warn_of_layers(config: TargetedConfig, paths: Collection[str]) -> None:
    """Warn of `layers_to_transform` and `layers_pattern` that match no layer with a target."""
    wanted, pattern = _targets.layer_choice(config)
    if wanted is None or (not isinstance(wanted, int) and not wanted):
        return
    targeted = _targets.select(paths, config.target_modules or (), config.exclude_modules)
    present = {_targets.layer_index(path, pattern) for path in targeted}
    if absent := sorted({wanted} - present if isinstance(wanted, int) else set(wanted) - present):
        warn(
            f"`layers_to_transform` names {absent}; the model has targeted modules "
            f"{_layers_of(targeted, pattern)}.",
            PeftWarning,
        )
    names = [pattern] if isinstance(pattern, str) else list(pattern or ())
    idle = [
        name
        for name in names
        if not any(_targets.layer_index(path, name) is not None for path in targeted)
    ]
    if idle:
        warn(
            f"`layers_pattern` names {', '.join(map(repr, idle))}, and no targeted module lies in "
            "such a list.",
            PeftWarning,
        )


def warn_of_patterns(
    patterns: Mapping[str, Mapping[str, object]], targets: Collection[str]
) -> None:
    """Warn of keys of pattern dictionaries, by field name, that match no adapted module."""
    for field, by_key in patterns.items():
        idle = [
            key
            for key in by_key
            if not any(_targets.pattern_value({key: True}, path, False) for path in targets)
        ]
        if idle:
            warn(
                f"`{field}` has keys that did not match any targeted module and are ignored: "
                f"{with_near_misses(idle, targets)}.",
                RuntimeWarning,
            )


def _if_expressions(names: Iterable[str]) -> str:
    """Return advice for a list that has regular expressions in it."""
    if isinstance(names, str) or not any(re.search(r"[*^$()|\\\[\]]", name) for name in names):
        return ""
    return " Entries of a list are plain names; pass a regular expression as a string."


def _layers_of(paths: Iterable[str], pattern: _targets.LayerLists) -> str:
    """Return a phrase with the indices of the layers that modules are in: "in layers 0 to 3"."""
    present = sorted(
        {index for path in paths if (index := _targets.layer_index(path, pattern)) is not None}
    )
    if not present:
        return f"in no list called {pattern!r}" if pattern else "in no list of layers"
    runs = len(present) > 1 and present == list(range(present[0], present[-1] + 1))
    if runs:
        return f"in layers {present[0]} to {present[-1]}"
    return f"in layers {', '.join(map(str, present))}"


def _idle_words(pattern: str, paths: Collection[str]) -> Iterator[str]:
    """Yield words of a regular expression's groups that match no path as a group's only word."""
    for group in _WORDS.finditer(pattern):
        start, end = group.span(1)
        for word in group[1].split("|"):
            alone = re.compile(pattern[:start] + word + pattern[end:])
            if not any(alone.fullmatch(path) for path in paths):
                yield word.replace("\\", "")


def _words(pattern: str) -> list[str]:
    """Return the words in groups of a regular expression, or the plain name at its end."""
    words = [
        word.replace("\\", "") for group in _WORDS.finditer(pattern) for word in group[1].split("|")
    ]
    last = re.search(r"[\w.]+(?=\$?$)", pattern)
    return words or ([last[0].strip(".")] if last else [])


def _end(path: str, length: int) -> str:
    return ".".join(path.split(".")[-length:])
