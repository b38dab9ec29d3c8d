# SPDX-License-Identifier: Apache-2.0
"""Put adapters of a library on a model, all or none; sizes of the adapters on a model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence

from torch import Tensor, nn

from ..base.containers import walk
from ..base.errors import PeftTypeError, PeftValueError
from ..base.modules import check_model
from ..base.progress import track
from ..base.registry import PEFT_TYPE_TO_MIXED_MODEL_MAPPING, PeftType
from ..base.validation import check_adapter
from ..config import PeftConfig
from ..core.adapter_names import check_name
from ..core.auxiliary import AuxiliaryTrainingWrapper
from ..core.filling import CheckpointFill
from ..core.layer import BaseTunerLayer
from ..core.loading import add_checkpoint, named_as_now
from ..core.model_methods import tuner_of
from ..mixed_model import PeftMixedModel
from ..peft_model import PeftModel
from .content import Content
from .entry import AdapterEntry
from .naming import Names, listed, name_of


def put_on(
    model: nn.Module,
    contents: Mapping[str, Content],
    autocast_adapter_dtype: bool = True,
    methods: Collection[str] = (),
) -> PeftModel:
    """Put adapters on a model, frozen; on a base model the first becomes active.

    Args:
        model: A `PeftModel`, or a base model.
        contents: The adapters by the names that they get.
        autocast_adapter_dtype: Keep them in float32 where the base has 16 bits.
        methods: Methods of which adapters may come later.

    Returns:
        The `PeftModel`, `model` itself if it is one. Of a base model and several methods it is a
        `PeftMixedModel`.

    Raises:
        PeftError: A name is taken or an adapter does not fit. None is put on then.
    """
    check_model(model)
    if not contents:
        raise PeftValueError("No adapter was named; name at least one.")
    taken = model.peft_config if isinstance(model, PeftModel) else {}
    for name in contents:
        check_name(name, taken)
    if isinstance(model, PeftModel):
        _add(model, contents, autocast_adapter_dtype)
        return model
    switches = [(p, p.requires_grad) for p in model.parameters()]
    modes = [(module, module.training) for module in model.modules()]
    (first, content), *others = contents.items()
    own = {PeftType(content.config().peft_type) for content in contents.values()}
    made = _with_first(model, first, content, autocast_adapter_dtype, _is_mixed(own, methods))
    try:
        _add(made, dict(others), autocast_adapter_dtype)
    except BaseException:
        made.unload()
        for parameter, requires_grad in switches:
            parameter.requires_grad_(requires_grad)
        for module, training in modes:
            module.training = training
        raise
    return made


def _add(model: PeftModel, contents: Mapping[str, Content], autocast_adapter_dtype: bool) -> None:
    """Put adapters on a model that has some, all or none."""
    base, done = model.get_base_model(), list[str]()
    try:
        for name, content in track(list(contents.items()), "Loading adapters", unit="adapter"):
            config, fill = _checkpoint(base, name, content)
            add_checkpoint(model, name, config, fill, autocast_adapter_dtype=autocast_adapter_dtype)
            done.append(name)
    except BaseException:
        for name in reversed(done):
            model.delete_adapter(name)
        raise


def _is_mixed(own: Collection[PeftType], later: Collection[str]) -> bool:
    """Return whether a model is to mix methods: its adapters have several, or it can be shared with
    those of other methods that may come later.
    """
    can_mix = PEFT_TYPE_TO_MIXED_MODEL_MAPPING.keys()
    others = {PeftType(method) for method in later} & can_mix - set(own)
    return len(own) > 1 or (bool(others) and set(own) <= can_mix)


def _with_first(
    base: nn.Module, name: str, content: Content, autocast_adapter_dtype: bool, is_mixed: bool
) -> PeftModel:
    """Return a `PeftModel` of a base model with an adapter."""
    config, fill = _checkpoint(base, name, content)
    config.inference_mode = True
    cls = PeftMixedModel if is_mixed else PeftModel
    made = cls.class_for(config.task_type)(
        base, config, name, autocast_adapter_dtype, initialize=False, fill=fill
    )
    made.base_model.method_of(config).note_loaded(made, name)
    return made.eval()


def _checkpoint(base: nn.Module, name: str, content: Content) -> tuple[PeftConfig, CheckpointFill]:
    """Return an adapter's config, and its tensors to fill in, under present names of modules."""
    adapter = content.adapter()
    config, state = named_as_now(base, adapter.config, adapter.tensors)
    return config, CheckpointFill(base, state, name)


def check_one_base(entries: Sequence[AdapterEntry]) -> None:
    """Raise `PeftValueError` if adapters are for several base models. Folders of one model may
    differ in all but the last part.
    """
    names = Counter(entry.base_model for entry in entries if entry.base_model)
    if len({name.rstrip("/").rpartition("/")[2] for name in names}) > 1:
        listed = ", ".join(f"{name!r} ({count})" for name, count in names.most_common(6))
        raise PeftValueError(
            f"The adapters are for several base models: {listed}. Choose those of yours: "
            "`names=library.filter(base_model=…)`."
        )


def adapter_sizes(model: nn.Module, names: Names | None = None) -> dict[str, int]:
    """Return the bytes of each adapter's own tensors on a model, by name.

    What adapters share (a VB-LoRA bank in a file of its own) is counted with none of them.

    Args:
        model: A `PeftModel`, or a model that adapters were injected into.
        names: Which adapters, by default all. One that the model lacks has no bytes.

    Raises:
        PeftTypeError: `model` is not a torch module, or `names` are not names.

    Example:
        >>> from peft import LoraConfig, get_peft_model
        >>> config = LoraConfig(r=2, target_modules=["0"])
        >>> adapter_sizes(get_peft_model(nn.Sequential(nn.Linear(8, 8)), config))
        {'default': 128}
    """
    if not isinstance(model, nn.Module):
        raise PeftTypeError(f"Sizes are those of adapters on a model, got {type(model)}.")
    wanted: list[str] | None = None if names is None else [*map(name_of, listed(names))]
    for name in wanted or ():
        check_adapter(name)
    seen: dict[int, Tensor] = {}  # holds views, whose ids would be given again
    sizes = dict.fromkeys(wanted or (), 0)
    for name, tensor in _tensors(model, wanted):
        if id(tensor) not in seen:
            seen[id(tensor)] = tensor
            sizes[name] = sizes.get(name, 0) + tensor.nbytes
    return sizes


def _tensors(model: nn.Module, names: Collection[str] | None) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of adapters with the adapters' names."""
    for _, module in walk(model):
        if isinstance(module, BaseTunerLayer):
            for name in module.scaling if names is None else names:
                yield from ((name, tensor) for tensor in module.adapter_tensors(name))
        elif isinstance(module, AuxiliaryTrainingWrapper):
            for name in module.adapters if names is None else names:
                if module.has(name):
                    yield from ((name, tensor) for tensor in module.parameters_of(name))
    tuner = tuner_of(model)
    for container in () if tuner is None else tuner.shared_containers().values():
        for name in container if names is None else names:
            if tuner is not None and name in tuner.peft_config and name in container:
                yield name, container[name]
