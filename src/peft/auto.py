# SPDX-License-Identifier: Apache-2.0
"""`AutoPeftModel…`: load an adapter together with the base model that its config names."""

from __future__ import annotations

import importlib
import os
from collections.abc import Sequence
from typing import Any, ClassVar, Protocol

from torch import nn

from .base.constants import WEIGHTS_FILES
from .base.errors import PeftTypeError, PeftValueError
from .base.registry import PEFT_TYPE_TO_TUNER_MAPPING, TaskType, lookup
from .base.validation import check_flags
from .checkpoint.files import read_shapes
from .checkpoint.hub import find_file, split_hub_options
from .checkpoint.paths import check_path
from .checkpoint.vocabulary import fit_vocabulary
from .config import PeftConfig
from .peft_model import MODEL_TYPE_TO_PEFT_MODEL_MAPPING, PeftModel

# Libraries that an adapter's config may name as the home of its base model's class.
_SAFE_LIBRARIES = ("diffusers", "lerobot", "megatron", "transformers")


def get_default_import_allowlist() -> list[str]:
    """Return the libraries that `AutoPeftModel` imports because an adapter's config says so."""
    return list(_SAFE_LIBRARIES)


class _ModelClass(Protocol):
    """A class of another library that loads models."""

    def from_pretrained(self, name: str, **options: object) -> nn.Module: ...


class AutoPeftModel:
    """Loader of a saved adapter together with its base model.

    Example:
        `model = AutoPeftModelForCausalLM.from_pretrained("my-adapter")`
    """

    # The task of the class, and the transformers class that loads its base models.
    _task: ClassVar[TaskType | None] = None
    _auto_class: ClassVar[str | None] = None

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        adapter_name: str = "default",
        is_trainable: bool = False,
        config: PeftConfig | None = None,
        revision: str | None = None,
        import_allowlist: Sequence[str] | None = None,
        **kwargs: Any,
    ) -> PeftModel:
        """Load an adapter and its base model. If the adapter was saved with an embedding or a head
        of another number of tokens, the base model is resized first.

        Args:
            pretrained_model_name_or_path: The adapter's local folder, or its id on the Hub.
            adapter_name: A name for the adapter.
            is_trainable: False freezes the adapter and puts the model into eval mode.
            config: A config to use in place of the saved one.
            revision: The adapter's revision; the base model's revision is in the config.
            import_allowlist: Libraries that may be imported because the config says that the base
                model's class is there, in place of `get_default_import_allowlist()`. A config can
                come from anyone, and importing a module runs it.
            **kwargs: Options of the base model's `from_pretrained` (`torch_dtype`, `device_map`,
                …). Options for the Hub and `ignore_mismatched_sizes` are for both base model and
                adapter, `strict` for the adapter alone.

        Raises:
            PeftTypeError: A switch is neither True nor False, or `import_allowlist` is no list.
            PeftValueError: The adapter is for another task, or its config does not name its base
                model, or names a library that `import_allowlist` does not allow.
        """
        check_path(pretrained_model_name_or_path)
        fit: dict[str, Any] = {
            "strict": kwargs.pop("strict", True),
            "ignore_mismatched_sizes": kwargs.get("ignore_mismatched_sizes", False),
        }
        check_flags(is_trainable=is_trainable, **fit)
        hub, _ = split_hub_options({**kwargs, "revision": revision})
        config = config or PeftConfig.from_pretrained(pretrained_model_name_or_path, **hub)
        if config.base_model_name_or_path is None:
            raise PeftValueError(
                "The adapter's config does not name its base model; load that, then use "
                "PeftModel.from_pretrained."
            )
        kwargs.pop("subfolder", None)  # the adapter's, not the base model's
        base = cls._base_class(config, import_allowlist).from_pretrained(
            config.base_model_name_or_path, revision=config.revision, **kwargs
        )
        shapes = read_shapes(find_file(pretrained_model_name_or_path, WEIGHTS_FILES, hub))
        tuner_cls = lookup(PEFT_TYPE_TO_TUNER_MAPPING, config.peft_type)
        fit_vocabulary(base, shapes, tuner_cls.checkpoint_format.token_dims)
        model_cls = PeftModel if cls._task is None else MODEL_TYPE_TO_PEFT_MODEL_MAPPING[cls._task]
        return model_cls.from_pretrained(
            base,
            pretrained_model_name_or_path,
            adapter_name,
            is_trainable=is_trainable,
            config=config,
            **hub,
            **fit,
        )

    @classmethod
    def _base_class(cls, config: PeftConfig, allowed: Sequence[str] | None) -> _ModelClass:
        """Return the base model's class; raise if the config is for another task or lacks it."""
        if config.task_type not in (None, cls._task):
            if cls._task is not None:
                raise PeftValueError(
                    f"{cls.__name__} is for {cls._task}, the adapter for task type "
                    f"{config.task_type!r}."
                )
            raise PeftValueError(
                "Cannot use `AutoPeftModel` with a task type, please use a specific class for your "
                "task type. (e.g. `AutoPeftModelForCausalLM` for `task_type='CAUSAL_LM'`; this "
                f"adapter's is {config.task_type!r})"
            )
        mapping = config.auto_mapping or {}
        if config.task_type is None and {"parent_library", "base_model_class"} <= mapping.keys():
            library, name = mapping["parent_library"], mapping["base_model_class"]
            return _model_class(library, name, allowed)
        if cls._auto_class is None:
            raise PeftValueError(
                "The adapter's config has no `auto_mapping` that says what class its base model "
                "has."
            )
        return getattr(importlib.import_module("transformers"), cls._auto_class)


def _model_class(library: str, name: str, allowed: Sequence[str] | None) -> _ModelClass:
    """Import the class that a config names. Only libraries that are allowed are imported."""
    if isinstance(allowed, str):
        raise PeftTypeError(f"`import_allowlist`={allowed!r} must be a list of libraries' names.")
    allowed = _SAFE_LIBRARIES if allowed is None else allowed
    if not any(f"{library}.".startswith(f"{each}.") for each in allowed):
        raise PeftValueError(
            f"The auto mapping wants to import {library!r} which is not in the import allowlist: "
            f"{', '.join(allowed) or 'empty'}. Importing a module runs it. If you are sure that "
            f"it is safe, pass `import_allowlist=[{library!r}]`; or load the base model yourself, "
            "then use `PeftModel.from_pretrained`."
        )
    model_class = getattr(importlib.import_module(library), name, None)
    if not isinstance(model_class, type) or not hasattr(model_class, "from_pretrained"):
        raise PeftValueError(
            f"The adapter's config says that its base model is of class {name!r} of {library!r}: "
            "there is no such class of models. Load the base model yourself, then use "
            "`PeftModel.from_pretrained`."
        )
    return model_class


class AutoPeftModelForCausalLM(AutoPeftModel):
    """`AutoPeftModel` for causal language models."""

    _task, _auto_class = TaskType.CAUSAL_LM, "AutoModelForCausalLM"


class AutoPeftModelForSeq2SeqLM(AutoPeftModel):
    """`AutoPeftModel` for encoder-decoder language models."""

    _task, _auto_class = TaskType.SEQ_2_SEQ_LM, "AutoModelForSeq2SeqLM"


class AutoPeftModelForSequenceClassification(AutoPeftModel):
    """`AutoPeftModel` for sequence classification."""

    _task, _auto_class = TaskType.SEQ_CLS, "AutoModelForSequenceClassification"


class AutoPeftModelForTokenClassification(AutoPeftModel):
    """`AutoPeftModel` for token classification."""

    _task, _auto_class = TaskType.TOKEN_CLS, "AutoModelForTokenClassification"


class AutoPeftModelForQuestionAnswering(AutoPeftModel):
    """`AutoPeftModel` for extractive question answering."""

    _task, _auto_class = TaskType.QUESTION_ANS, "AutoModelForQuestionAnswering"


class AutoPeftModelForFeatureExtraction(AutoPeftModel):
    """`AutoPeftModel` for feature extraction."""

    _task, _auto_class = TaskType.FEATURE_EXTRACTION, "AutoModel"


def auto_class_name(task_type: str) -> str:
    """Return the name of transformers' class that loads base models for a task type."""
    classes = AutoPeftModel.__subclasses__()
    return next(cls._auto_class for cls in classes if cls._task == task_type and cls._auto_class)
