# SPDX-License-Identifier: Apache-2.0
"""`PeftConfig`: a dataclass with the contents of an `adapter_config.json`."""

from __future__ import annotations

import inspect
import json
import os
from collections.abc import Iterator
from copy import copy, deepcopy
from dataclasses import MISSING, asdict, dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from ._version import __version__
from .base.errors import PeftTypeError, PeftValueError, warn
from .base.patterns import format_patterns, parse_patterns
from .base.placeholders import placeholders
from .base.plain_values import JsonObject, as_list, plain, unwritable
from .base.registry import PEFT_TYPE_TO_CONFIG_MAPPING, PeftType, TaskType, lookup
from .base.suggestions import did_you_mean
from .base.validation import (
    LARGEST_SIZE,
    LayerIndices,
    TokenIndices,
    at_least,
    boolean,
    choice,
    is_int,
    layer_selection,
    module_names,
    name_list,
    name_patterns,
    number,
    pattern_dict,
    probability,
    regex,
    text,
    token_indices,
)
from .checkpoint.files import CONFIG_NAME, read_json, write_config
from .checkpoint.hub import HubOptions, find_file, pass_over, split_hub_options
from .checkpoint.paths import as_folder

__all__ = [
    "LycorisConfig", "PeftConfig", "TargetedConfig", "as_folder", "at_least", "boolean", "choice",
    "is_int", "name_list", "name_patterns", "number", "pattern_dict", "probability", "regex",
]  # fmt: skip

PromptLearningConfig: type  # a placeholder

if not TYPE_CHECKING:  # names of the interface that are elsewhere here, or not provided
    __getattr__ = placeholders(__name__)


C = TypeVar("C", bound="PeftConfig")


@dataclass
class PeftConfig:
    """Fields that the config of every adapter has.

    All values can be saved: paths, dtypes, NumPy numbers and others become the value that a file
    holds when the config is made. None for a switch, a dictionary or a dropout rate means the
    default, as it does in files.

    Args:
        task_type: A `TaskType` or its name, which chooses the `PeftModelFor…` class; None for
            `PeftModel`.
        peft_type: The method; each subclass sets its own.
        auto_mapping: Class and library of the base model, written for adapters without a task type.
        peft_version: Version of the package that wrote the file.
        base_model_name_or_path: Folder or Hub id of the base model.
        revision: Revision of the base model.
        inference_mode: True freezes the adapter.

    Raises:
        PeftValueError: A value is not allowed. The message names all such values.
    """

    task_type: str | TaskType | None = None
    peft_type: str | PeftType | None = None
    auto_mapping: JsonObject | None = None
    peft_version: str | None = None
    base_model_name_or_path: str | None = None
    revision: str | None = None
    inference_mode: bool = False

    # Fields that do not change what a loaded adapter computes: targets, initialization, dropout,
    # saving options.
    no_effect: ClassVar[frozenset[str]] = frozenset(
        {
            "task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path",
            "revision", "inference_mode",
        }
    )  # fmt: skip
    # Fields that name entries of the adapter's tensors.
    labels: ClassVar[tuple[str, ...]] = ()
    # Fields that this package adds to the interface, with the value that a file without them means.
    absent_values: ClassVar[JsonObject] = {}
    # Fields whose keys are names or regular expressions.
    patterns: ClassVar[tuple[str, ...]] = ()
    # Fields that are sizes of stored tensors: none is larger than the file's number of values.
    sizes: ClassVar[tuple[str, ...]] = ()
    # Fields that are not saved, since they concern one process.
    unsaved: ClassVar[tuple[str, ...]] = ()

    def __new__(cls, *args: object, **kwargs: object) -> PeftConfig:
        """Raise for unknown fields, with suggestions; Python's own message has none."""
        if not kwargs.keys() <= cls.__dataclass_fields__.keys():
            known = inspect.signature(cls.__init__).parameters
            takes_any = any(p.kind is p.VAR_KEYWORD for p in known.values())
            if not takes_any and (unknown := [name for name in kwargs if name not in known]):
                raise PeftTypeError(
                    f"{cls.__name__}.__init__() got {_unknown_fields(unknown, [*known][1:])}"
                )
        return super().__new__(cls)

    def __post_init__(self) -> None:
        # Fields from a file include a version; keys of patterns mean something else there.
        vars(self)["_is_new"] = self.peft_version is None
        self.peft_version = self.peft_version or __version__
        for item in fields(self):
            if getattr(self, item.name) is None and (
                isinstance(item.default, bool) or "dropout" in item.name
            ):
                setattr(self, item.name, item.default)
            elif getattr(self, item.name) is None and item.default_factory is not MISSING:
                setattr(self, item.name, item.default_factory())
        self.validate()

    def affects_output(self, name: str) -> bool:
        """Return whether a field changes what a loaded adapter computes."""
        return name not in self.no_effect

    def validate(self) -> None:
        """Check all fields, when the config and when the adapter is made.

        Raises:
            PeftValueError: Fields have values that are not allowed; the message names all.
        """
        saved = [item.name for item in fields(self) if item.name not in self.unsaved]
        for name in saved:
            setattr(self, name, plain(getattr(self, name)))
        for name in self.patterns:
            if isinstance(getattr(self, name), dict):
                setattr(self, name, parse_patterns(getattr(self, name), vars(self)["_is_new"]))
        problems = list(self._problems()) or list(self._contradictions())
        for name in saved:
            odd = next(unwritable(getattr(self, name)), None)
            if odd is not None and not any(f"`{name}`" in problem for problem in problems):
                problems.append(f"`{name}` holds {odd!r}, which can't be written to a config file.")
        if problems:
            raise PeftValueError(f"{type(self).__name__}: " + " ".join(problems))

    def _problems(self) -> Iterator[str]:
        """Yield a sentence for each value that is not allowed; subclasses add their rules."""
        for name in ("base_model_name_or_path", "revision"):
            yield from text(name, getattr(self, name))
        tasks = [task.value for task in TaskType]
        if self.task_type is not None and self.task_type not in tasks:
            yield (
                f"Invalid task type: {str(self.task_type)!r}. Must be one of the following task "
                f"types: {', '.join(tasks)}."
            )
        yield from boolean("inference_mode", self.inference_mode)

    def _contradictions(self) -> Iterator[str]:
        """Yield a sentence for fields that contradict each other; each has an allowed value."""
        yield from ()

    @property
    def trained_biases(self) -> str:
        """Biases of the base model to train: "none", "all", else those of adapted layers."""
        return "none"

    @property
    def is_prompt_learning(self) -> bool:
        """True for methods that prepend virtual tokens; False for all methods of this package."""
        return False

    @property
    def is_adaption_prompt(self) -> bool:
        """True for adaption prompts; False for all methods of this package."""
        return False

    def for_adapter(self: C) -> C:
        """Return a copy for one adapter, with the token for the Hub, or raise `PeftValueError`."""
        checked = copy(self)
        checked.validate()
        result = deepcopy(checked)
        if self.source is not None:
            result.source = self.source
        return result

    def as_loaded(self: C) -> C:
        """Return a loaded adapter's config; other programs may run the file in another form."""
        return self

    def for_copy(self: C, reference: bool = False) -> C:
        """Return the config for a copy; a `reference` model of a policy has no dropout."""
        result = deepcopy(self)
        for item in fields(self) if reference else ():
            if "dropout" in item.name and isinstance(getattr(self, item.name), float):
                setattr(result, item.name, 0.0)
        return result

    def to_dict(self) -> JsonObject:
        r"""Return the fields by name.

        Fields that this package adds to the interface are left out if their absence means the same
        value, so that other implementations can read the result. Sets stay sets; `save_pretrained`
        writes them as lists. Keys of patterns are those of a file: `^layers.0` becomes
        `^layers.0(\..*)?`, which matches the modules below it for all readers.
        """
        content = {
            k: format_patterns(v) if k in self.patterns else v
            for k, v in asdict(self).items()
            if k not in self.unsaved
        }
        return {
            k: v
            for k, v in content.items()
            if k not in self.absent_values or v != self.absent_values[k]
        }

    def to_json(self, auto_mapping: JsonObject | None = None) -> str:
        """Return the text of `adapter_config.json`."""
        content = plain(self.to_dict())
        content["peft_version"] = __version__
        if auto_mapping is not None:
            content["auto_mapping"] = auto_mapping
        # Only the fields are sorted: of several patterns that match a module, the first counts.
        return json.dumps(dict(sorted(content.items())), indent=2, default=as_list)

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs: Any) -> None:
        """Write `adapter_config.json` into a folder, which is made if missing.

        Args:
            save_directory: The folder.
            **kwargs: `auto_mapping_dict` is written as `auto_mapping`; options for saving whole
                models have no effect.

        Raises:
            PeftValueError: `save_directory` is a file.
        """
        auto_mapping = kwargs.pop("auto_mapping_dict", None)
        pass_over(kwargs, "save_pretrained")
        folder = as_folder(save_directory)
        write_config(folder, self.to_json(auto_mapping))

    def push_to_hub(
        self,
        repo_id: str,
        *,
        token: str | bool | None = None,
        private: bool | None = None,
        **options: Any,
    ) -> object:
        """Save the config to a repository on the Hub, which is made if missing.

        Args:
            repo_id: "user/name".
            token: Access token, by default the one stored by huggingface_hub.
            private: Make a new repository private.
            **options: For the commit: `commit_message`, `revision`, `create_pr`.
        """
        from huggingface_hub import HfApi

        api = HfApi(token=token)
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        text = self.to_json().encode()
        return api.upload_file(
            path_or_fileobj=text, path_in_repo=CONFIG_NAME, repo_id=repo_id, **options
        )

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike,
        subfolder: str | None = None,
        **kwargs: object,
    ) -> PeftConfig:
        """Read the config of a saved adapter, as an object of its method's config class.

        Args:
            pretrained_model_name_or_path: A local folder, or an id on the Hub.
            subfolder: Folder inside it.
            **kwargs: Options for the Hub (`revision`, `token`, `cache_dir`, …), and fields that
                replace those of the file. Others are ignored, since callers pass on the options
                for the base model.

        Raises:
            CheckpointNotFoundError: There is no such config.
            CheckpointError: The file is not a JSON object.
            PeftTypeError: The file is not an adapter's config.
            PeftValueError: The method is not implemented, or a value is not allowed.
        """
        hub, overrides = split_hub_options({**kwargs, "subfolder": subfolder})
        path = find_file(pretrained_model_name_or_path, (CONFIG_NAME,), hub)
        config = cls.from_file_fields(cls.from_json_file(path), overrides)
        path_or_id = pretrained_model_name_or_path
        is_local = os.path.isdir(path_or_id)
        config.source = (os.path.abspath(path_or_id) if is_local else path_or_id, hub)
        return config

    @property
    def source(self) -> tuple[str | os.PathLike, HubOptions] | None:
        """Folder or Hub id that the config was read from, with options for the Hub; files that the
        config names are looked up there. It is not a field, since it does not describe the adapter.
        """
        return vars(self).get("_source")

    @source.setter
    def source(self, source: tuple[str | os.PathLike, HubOptions]) -> None:
        vars(self)["_source"] = source

    def __getstate__(self) -> dict[str, object]:
        """Leave out the token for the Hub, so that no copy holds it."""
        state = dict(vars(self))
        if self.source is not None:
            path_or_id, hub = self.source
            state["_source"] = (path_or_id, {k: v for k, v in hub.items() if k != "token"})
        return state

    @classmethod
    def from_json_file(cls, path_json_file: str | os.PathLike, **kwargs: object) -> JsonObject:
        """Return the fields in a JSON file.

        Raises:
            CheckpointError: The file is not a JSON object.
        """
        content = read_json(Path(path_json_file))
        content.pop("runtime_config", None)  # concerns the process that wrote the file
        return content

    @classmethod
    def from_peft_type(cls: type[C], **kwargs: object) -> C:
        """Make a config of the class that `peft_type` names, or of this class.

        Unknown fields are ignored, with a warning if they are set.
        """
        peft_type = kwargs.get("peft_type")
        config_cls = cls if peft_type is None else lookup(PEFT_TYPE_TO_CONFIG_MAPPING, peft_type)
        if not issubclass(config_cls, cls):
            raise PeftValueError(
                f"A config of type {peft_type!r} is not a {cls.__name__}; read it as a "
                f"{config_cls.__name__}."
            )
        return config_cls(**config_cls.check_kwargs(**kwargs))

    @classmethod
    def from_file_fields(cls: type[C], content: JsonObject, overrides: JsonObject) -> C:
        """Make a config of a file's fields; missing fields get other implementations' defaults."""
        peft_type = content.get("peft_type")
        if peft_type is None:
            raise PeftTypeError(
                f"The {cls.__name__} config that is trying to be loaded is missing required keys: "
                "{'peft_type'}. The file is not an adapter's config."
            )
        config_cls = lookup(PEFT_TYPE_TO_CONFIG_MAPPING, peft_type)
        changes = {f.name: overrides[f.name] for f in fields(config_cls) if f.name in overrides}
        changes |= {
            name: parse_patterns(changes[name], True)
            for name in config_cls.patterns
            if isinstance(changes.get(name), dict)
        }
        version = content.get("peft_version") or __version__
        content = {**content, "peft_version": version, **changes}
        return cls.from_peft_type(**{**config_cls.absent_values, **config_cls._upgrade(content)})

    @classmethod
    def _upgrade(cls, content: JsonObject) -> JsonObject:
        """Return the fields of a file converted to the fields of this class."""
        return content

    @classmethod
    def _get_peft_type(cls, model_id: str | os.PathLike, **hub_kwargs: object) -> str:
        """Return the method in a saved adapter's config."""
        hub, _ = split_hub_options(hub_kwargs)
        return read_json(find_file(model_id, (CONFIG_NAME,), hub))["peft_type"]

    @classmethod
    def check_kwargs(cls, **kwargs: object) -> JsonObject:
        """Return those of `kwargs` that are fields; a warning names the others that are set."""
        known = {f.name for f in fields(cls)}
        unknown = sorted(name for name in set(kwargs) - known if kwargs[name])
        if unknown:
            warn(
                f"Unexpected keyword arguments {unknown} for class {cls.__name__}, these are "
                "ignored. This probably means that the configuration file was saved by a newer "
                "version or by another implementation."
            )
        return {key: value for key, value in kwargs.items() if key in known}


class TargetedConfig(PeftConfig):
    """Base class of configs for methods that adapt modules chosen by name.

    It is not a dataclass: subclasses declare those of these fields that they have, each in its
    documented order.
    """

    target_modules: list[str] | str | set[str] | None
    exclude_modules: list[str] | str | set[str] | None
    modules_to_save: list[str] | None = None
    trainable_token_indices: TokenIndices | None = None
    target_parameters: list[str] | None = None
    layers_to_transform: LayerIndices | None
    layers_pattern: list[str] | str | None

    no_effect: ClassVar[frozenset[str]] = PeftConfig.no_effect | {
        "target_modules", "exclude_modules", "modules_to_save", "target_parameters",
        "layers_to_transform", "layers_pattern", "init_weights",
    }  # fmt: skip

    def __post_init__(self) -> None:
        for name in ("target_modules", "exclude_modules"):
            value = plain(getattr(self, name))
            if isinstance(value, (list, tuple)) and all(isinstance(entry, str) for entry in value):
                setattr(self, name, set(value))
        super().__post_init__()

    def _problems(self) -> Iterator[str]:
        yield from super()._problems()
        for name in ("target_modules", "exclude_modules"):
            yield from name_patterns(name, getattr(self, name))
        yield from module_names("modules_to_save", self.modules_to_save)
        yield from name_list("target_parameters", self.target_parameters)
        yield from token_indices("trainable_token_indices", self.trainable_token_indices)
        if "layers_to_transform" in self.__dataclass_fields__:
            yield from layer_selection(self.layers_to_transform, self.layers_pattern)


@dataclass
class LycorisConfig(TargetedConfig):
    """Config of a method of the LyCORIS family, whose layers can differ in rank and alpha.

    Args:
        rank_pattern: Rank for modules by name or regular expression, in place of `r`. A key stands
            for the whole module path or its end. A key that begins with `^` stands for all modules
            below the path too; files say so in a way that other readers understand.
        alpha_pattern: Alpha for modules by name or regular expression, in place of `alpha`.
    """

    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)

    no_effect: ClassVar[frozenset[str]] = TargetedConfig.no_effect | {
        "rank_dropout", "module_dropout", "rank_dropout_scale",
    }  # fmt: skip
    patterns: ClassVar[tuple[str, ...]] = ("rank_pattern", "alpha_pattern")
    # None where a rank beyond a layer's size makes no larger tensors.
    largest_rank: ClassVar[int | None] = LARGEST_SIZE

    def _problems(self) -> Iterator[str]:
        yield from super()._problems()
        rank = partial(at_least, most=self.largest_rank)
        yield from pattern_dict("rank_pattern", self.rank_pattern, rank)
        yield from pattern_dict("alpha_pattern", self.alpha_pattern, number)


PeftConfigMixin = PeftConfig  # an earlier name of the base class


def check_config(value: object) -> None:
    """Raise `PeftTypeError`, which says how to get a config, if `value` is not one."""
    if isinstance(value, PeftConfig):
        return
    remedy = ""
    if isinstance(value, type) and issubclass(value, PeftConfig):
        remedy = f" Make an object of the class: `{value.__name__}(...)`."
    elif isinstance(value, dict):
        remedy = " `peft.get_peft_config` makes one of a dictionary that has a `peft_type`."
    elif isinstance(value, (str, os.PathLike)):
        remedy = (
            " `PeftConfig.from_pretrained` reads a saved one; `PeftModel.from_pretrained` loads "
            "the whole adapter."
        )
    elif callable(getattr(value, "named_modules", None)):
        remedy = (
            " The model is the first argument of `get_peft_model` and `plan`, the config the "
            "second."
        )
    raise PeftTypeError(f"The config must be a PeftConfig, got {type(value)}.{remedy}")


def _unknown_fields(names: list[str], known: list[str]) -> str:
    """Return the end of a message about unknown fields of a config."""
    hints = [
        f" The rank is `r`, not `{name}`."
        if "rank" in name and "r" in known
        else did_you_mean(name, known)
        for name in names
    ]
    of_method = [name for name in known if name not in PeftConfig.__dataclass_fields__]
    listed = "" if all(hints) else f" There are {', '.join(of_method or known)}."
    start = "an unexpected keyword argument" if len(names) == 1 else "unexpected keyword arguments"
    return f"{start} {', '.join(map(repr, names))}.{''.join(hints)}{listed}"
