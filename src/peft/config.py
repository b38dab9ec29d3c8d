# SPDX-License-Identifier: Apache-2.0
"""`PeftConfig`: a dataclass that is the same thing as an `adapter_config.json`."""

from __future__ import annotations

import inspect
import json
import os
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar

from ._version import __version__
from .base.errors import PeftTypeError, PeftValueError, warn
from .base.patterns import format_patterns, parse_patterns
from .base.plain_values import as_list, is_empty, plain, unwritable
from .base.registry import PEFT_TYPE_TO_CONFIG_MAPPING, PeftType, TaskType, lookup
from .base.suggestions import did_you_mean
from .base.validation import (
    at_least,
    boolean,
    choice,
    is_int,
    name_list,
    name_patterns,
    number,
    pattern_dict,
    probability,
    regex,
)
from .checkpoint.files import CONFIG_NAME, read_json, write_config
from .checkpoint.hub import check_path, find_file, pass_over, split_hub_options

__all__ = [
    "LayeredConfig",
    "PeftConfig",
    "TargetedConfig",
    "as_folder",
    "at_least",
    "boolean",
    "choice",
    "is_int",
    "name_list",
    "name_patterns",
    "number",
    "pattern_dict",
    "probability",
    "regex",
]


@dataclass
class PeftConfig:
    """What every adapter's config has.

    Whatever a config accepts can be saved: paths, dtypes, NumPy's numbers and the like become what
    a file holds when the config is made. None for a switch, a dictionary or a dropout rate means
    the default, as it does in files.

    Args:
        task_type: A `TaskType` or its name; chooses the `PeftModelFor…` class, None the plain
            `PeftModel`.
        peft_type: The method; each subclass sets its own.
        auto_mapping: Class and library of the base model, written for adapters without a task type.
        peft_version: Version that wrote the file.
        base_model_name_or_path: Where the base model came from.
        revision: The base model's revision.
        inference_mode: True freezes the adapter.

    Raises:
        PeftValueError: A value is not allowed. All of a config's offences are in one message.
    """

    task_type: str | TaskType | None = field(
        default=None, metadata={"help": "What the model is used for."}
    )
    peft_type: str | PeftType | None = field(default=None, metadata={"help": "The method."})
    auto_mapping: dict | None = field(
        default=None, metadata={"help": "Class and library of the base model."}
    )
    peft_version: str | None = field(
        default=None, metadata={"help": "Version that wrote the config."}
    )
    base_model_name_or_path: str | None = field(
        default=None, metadata={"help": "Where the base model came from."}
    )
    revision: str | None = field(default=None, metadata={"help": "The base model's revision."})
    inference_mode: bool = field(default=False, metadata={"help": "Whether the adapter is frozen."})

    # Fields that this package adds to the interface, with what a file that lacks them means.
    absent_values: ClassVar[dict[str, Any]] = {}
    # Fields whose keys are names or regular expressions.
    patterns: ClassVar[tuple[str, ...]] = ()
    # Fields that say how a process runs the adapter, and are in no file.
    unsaved: ClassVar[tuple[str, ...]] = ()

    def __new__(cls, *args: Any, **kwargs: Any) -> PeftConfig:
        """Refuse unknown fields with a name for what was probably meant, which Python's own message
        lacks.
        """
        if not kwargs.keys() <= cls.__dataclass_fields__.keys():
            known = inspect.signature(cls.__init__).parameters
            takes_any = any(
                parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in known.values()
            )
            if not takes_any and (unknown := [name for name in kwargs if name not in known]):
                raise PeftTypeError(
                    f"{cls.__name__}.__init__() got {_unknown_fields(unknown, [*known][1:])}"
                )
        return super().__new__(cls)

    def __post_init__(self) -> None:
        vars(self)["_is_new"] = self.peft_version is None  # else these are the fields of a file
        self.peft_version = self.peft_version or __version__
        for item in fields(self):
            if getattr(self, item.name) is None and (
                isinstance(item.default, bool) or "dropout" in item.name
            ):
                setattr(self, item.name, item.default)
            elif getattr(self, item.name) is None and item.default_factory is not MISSING:
                setattr(self, item.name, item.default_factory())
        self.validate()

    def validate(self) -> None:
        """Check every field; called on construction and again when the adapter is made.

        Raises:
            PeftValueError: Lists all offences.
        """
        saved = [item.name for item in fields(self) if item.name not in self.unsaved]
        for name in saved:
            setattr(self, name, plain(getattr(self, name)))
        for name in self.patterns:
            if isinstance(getattr(self, name), dict):
                setattr(self, name, parse_patterns(getattr(self, name), vars(self)["_is_new"]))
        problems = list(self._problems())
        for name in saved:
            odd = next(unwritable(getattr(self, name)), None)
            if odd is not None and not any(f"`{name}`" in problem for problem in problems):
                problems.append(f"`{name}` holds {odd!r}, which can't be written to a config file.")
        if problems:
            raise PeftValueError(f"{type(self).__name__}: " + " ".join(problems))

    def _problems(self) -> Iterator[str]:
        """The offences against this config's rules, a sentence each; subclasses add theirs."""
        for name in ("base_model_name_or_path", "revision"):
            if not isinstance(getattr(self, name), (str, type(None))):
                yield f"`{name}`={getattr(self, name)!r} must be a string or None."
        tasks = [task.value for task in TaskType]
        if self.task_type is not None and self.task_type not in tasks:
            yield f"Invalid task type: {str(self.task_type)!r}. Must be one of the following task types: {', '.join(tasks)}."
        yield from boolean("inference_mode", self.inference_mode)

    @property
    def trained_biases(self) -> str:
        """Which biases of the base model are trained too: "none", "all", or (anything else) those
        of the adapted layers.
        """
        return "none"

    @property
    def is_prompt_learning(self) -> bool:
        """Whether the method prepends virtual tokens; none here does."""
        return False

    @property
    def is_adaption_prompt(self) -> bool:
        """Whether the method is an adaption prompt; none here is."""
        return False

    def for_copy(self, reference: bool = False) -> Any:
        """Return the config of an adapter that is a copy of this config's.

        Args:
            reference: Leave out what is random in training, as suits the reference of a policy.
        """
        result = deepcopy(self)
        for item in fields(self) if reference else ():
            if "dropout" in item.name and isinstance(getattr(self, item.name), float):
                setattr(result, item.name, 0.0)
        return result

    def to_dict(self) -> dict[str, Any]:
        r"""All fields by name, but for what is in no file, and what this package adds where a
        dictionary without it means the same, so that others can make their config of it. Sets stay
        sets; `save_pretrained` writes them as lists. Keys of patterns are those of a file:
        `^layers.0` is `^layers.0(\..*)?` there, which means the modules below it to other readers,
        too.
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

    def to_json(self, auto_mapping: dict | None = None) -> str:
        """The text of `adapter_config.json`."""
        content = plain(self.to_dict())
        content["peft_version"] = __version__
        if auto_mapping is not None:
            content["auto_mapping"] = auto_mapping
        # Only the fields are sorted: of patterns that fit the same module, the first counts.
        return json.dumps(dict(sorted(content.items())), indent=2, default=as_list)

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs: Any) -> None:
        """Write `adapter_config.json` into a folder, made if missing.

        Args:
            save_directory: The folder.
            **kwargs: `auto_mapping_dict` is what to write as `auto_mapping`; options for saving
                whole models have no effect.

        Raises:
            PeftValueError: `save_directory` is a file.
        """
        auto_mapping = kwargs.pop("auto_mapping_dict", None)
        pass_over(kwargs, "save_pretrained")
        folder = as_folder(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        write_config(folder, self.to_json(auto_mapping))

    def push_to_hub(
        self,
        repo_id: str,
        *,
        token: str | bool | None = None,
        private: bool | None = None,
        **options: Any,
    ) -> Any:
        """Save the config to a repository on the Hub, made if missing.

        Args:
            repo_id: "user/name".
            token: Access token, by default the one stored by huggingface_hub.
            private: Whether a new repository is private.
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
        **kwargs: Any,
    ) -> PeftConfig:
        """Read the config of a saved adapter; the result has the class of its method.

        Args:
            pretrained_model_name_or_path: A local folder, or an id on the Hub.
            subfolder: Folder inside it.
            **kwargs: Options for the Hub (`revision`, `token`, `cache_dir`, …), and fields to set
                in place of the file's. Others are passed over: callers hand on what they load the base model with.

        Raises:
            CheckpointNotFoundError: No such config.
            CheckpointError: The file is not a JSON object.
            PeftTypeError: It is not an adapter's config.
            PeftValueError: The method is not provided, or a value is not allowed.
        """
        hub, overrides = split_hub_options({**kwargs, "subfolder": subfolder})
        path = find_file(pretrained_model_name_or_path, (CONFIG_NAME,), hub)
        config = cls._from_file_fields(cls.from_json_file(path), overrides)
        is_local = os.path.isdir(pretrained_model_name_or_path)
        config.place = (
            os.path.abspath(pretrained_model_name_or_path)
            if is_local
            else pretrained_model_name_or_path,
            hub,
        )
        return config

    @property
    def place(self) -> tuple[str | os.PathLike, dict[str, Any]] | None:
        """The folder or Hub id that the config was read from, with options for the Hub; files that
        it names may be there. It is no field, as it says nothing of what the adapter is.
        """
        return vars(self).get("_place")

    @place.setter
    def place(self, place: tuple[str | os.PathLike, dict[str, Any]]) -> None:
        vars(self)["_place"] = place

    def __getstate__(self) -> dict[str, Any]:
        """Without the token that the config was read with, so that no copy holds it."""
        state = dict(vars(self))
        if self.place is not None:
            state["_place"] = (
                self.place[0],
                {key: value for key, value in self.place[1].items() if key != "token"},
            )
        return state

    @classmethod
    def from_json_file(cls, path_json_file: str | os.PathLike, **kwargs: Any) -> dict[str, Any]:
        """The fields in a JSON file, as a dictionary.

        Raises:
            CheckpointError: The file is not a JSON object.
        """
        content = read_json(Path(path_json_file))
        content.pop("runtime_config", None)  # how some other process ran; never part of a config
        return content

    @classmethod
    def from_peft_type(cls, **kwargs: Any) -> PeftConfig:
        """Make a config of the class that `peft_type` names (or of this class), ignoring unknown
        fields, with a warning unless they ask for nothing.
        """
        peft_type = kwargs.get("peft_type")
        config_cls = cls if peft_type is None else lookup(PEFT_TYPE_TO_CONFIG_MAPPING, peft_type)
        if not issubclass(config_cls, cls):
            raise PeftValueError(
                f"A config of type {peft_type!r} is no {cls.__name__}; read it as a "
                f"{config_cls.__name__}."
            )
        return config_cls(**config_cls.check_kwargs(**kwargs))

    @classmethod
    def _from_file_fields(cls, content: dict[str, Any], overrides: dict[str, Any]) -> PeftConfig:
        """The config that a file's fields describe, where what they lack means what it meant to
        their writer.
        """
        peft_type = content.get("peft_type")
        if peft_type is None:
            raise PeftTypeError(
                f"The {cls.__name__} config that is trying to be loaded is missing required keys: "
                f"{{'peft_type'}}. "
                "The file is not an adapter's config."
            )
        config_cls = lookup(PEFT_TYPE_TO_CONFIG_MAPPING, peft_type)
        own = {f.name: overrides[f.name] for f in fields(config_cls) if f.name in overrides}
        own |= {
            name: parse_patterns(own[name], True)
            for name in config_cls.patterns
            if isinstance(own.get(name), dict)
        }
        content = {**content, "peft_version": content.get("peft_version") or __version__, **own}
        return cls.from_peft_type(**{**config_cls.absent_values, **config_cls._upgrade(content)})

    @classmethod
    def _upgrade(cls, content: dict[str, Any]) -> dict[str, Any]:
        """Fields of a file, put as this class wants them."""
        return content

    @classmethod
    def _get_peft_type(cls, model_id: str | os.PathLike, **hub_kwargs: Any) -> str:
        """The method named in a saved adapter's config."""
        hub, _ = split_hub_options(hub_kwargs)
        return read_json(find_file(model_id, (CONFIG_NAME,), hub))["peft_type"]

    @classmethod
    def check_kwargs(cls, **kwargs: Any) -> dict[str, Any]:
        """Those of `kwargs` that are fields; the others are dropped, and named in a warning if they
        ask for anything.
        """
        known = {f.name for f in fields(cls)}
        unknown = sorted(name for name in set(kwargs) - known if kwargs[name])
        if unknown:
            warn(
                f"Unexpected keyword arguments {unknown} for class {cls.__name__}, these are "
                "ignored. This probably means that "
                "the configuration file was saved by a newer version or by another implementation.",
            )
        return {key: value for key, value in kwargs.items() if key in known}


class TargetedConfig(PeftConfig):
    """What configs share that adapt modules chosen by name: the rules for `target_modules` and its
    companions.

    No dataclass itself: subclasses declare the fields, each in its documented order.
    """

    target_modules: Any
    exclude_modules: Any
    modules_to_save: Any = None
    trainable_token_indices: Any = None

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
        yield from name_list("modules_to_save", self.modules_to_save)
        tokens = self.trainable_token_indices
        for name, indices in tokens.items() if isinstance(tokens, dict) else [("", tokens or [])]:
            entry = f"`trainable_token_indices`{f'[{name!r}]' if name else ''}"
            if not isinstance(indices, (list, tuple)) or not all(
                is_int(i) and i >= 0 for i in indices
            ):
                yield f"{entry}={indices!r} must be a list of token ids."
            elif len(set(indices)) != len(indices):
                yield f"{entry} names a token twice."


class LayeredConfig(TargetedConfig):
    """A targeted config whose adapter can be limited to some layers by index."""

    layers_to_transform: Any
    layers_pattern: Any

    def _problems(self) -> Iterator[str]:
        yield from super()._problems()
        indices, pattern = self.layers_to_transform, self.layers_pattern
        listed = [indices] if isinstance(indices, int) else indices
        if listed is not None and not (
            isinstance(listed, (list, tuple, set)) and all(is_int(i) and i >= 0 for i in listed)
        ):
            yield f"`layers_to_transform`={indices!r} must be a non-negative integer, a list of them, or None."
        if not is_empty(pattern) and indices is None:
            yield "When `layers_pattern` is specified, `layers_to_transform` must also be specified."
        if isinstance(pattern, str):
            yield from regex("layers_pattern", pattern)
        else:
            yield from name_list("layers_pattern", pattern)
            for name in pattern if isinstance(pattern, (list, tuple, set)) else ():
                yield from regex("layers_pattern", str(name))


def check_config(value: Any) -> None:
    """Insist on a config.

    Raises:
        PeftTypeError: It is something else; says how to get a config from it.
    """
    if isinstance(value, PeftConfig):
        return
    remedy = ""
    if isinstance(value, type) and issubclass(value, PeftConfig):
        remedy = f" Make an object of the class: `{value.__name__}(...)`."
    elif isinstance(value, dict):
        remedy = " `peft.get_peft_config` makes one of a dictionary that has a `peft_type`."
    elif isinstance(value, (str, os.PathLike)):
        remedy = " `PeftConfig.from_pretrained` reads a saved one; `PeftModel.from_pretrained` loads the whole adapter."
    elif callable(getattr(value, "named_modules", None)):
        remedy = " The model is the first argument of `get_peft_model` and `plan`, the config the second."
    raise PeftTypeError(f"The config must be a PeftConfig, got {type(value)}.{remedy}")


def as_folder(path: str | os.PathLike) -> Path:
    """`path` as a folder's path.

    Raises:
        PeftTypeError: It is no path.
        PeftValueError: It is empty, or a file.
    """
    check_path(path, "a folder's path")
    folder = Path(path)
    if folder.is_file():
        raise PeftValueError(f"'{folder}' is a file; give the path of a folder.")
    return folder


def _unknown_fields(names: list[str], known: list[str]) -> str:
    """The end of a message about fields that a config does not have."""
    hints = [
        f" The rank is `r`, not `{name}`."
        if "rank" in name and "r" in known
        else did_you_mean(name, known)
        for name in names
    ]
    own = [name for name in known if name not in PeftConfig.__dataclass_fields__]
    listed = "" if all(hints) else f" There are {', '.join(own or known)}."
    start = "an unexpected keyword argument" if len(names) == 1 else "unexpected keyword arguments"
    return f"{start} {', '.join(map(repr, names))}.{''.join(hints)}{listed}"
