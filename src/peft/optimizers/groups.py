# SPDX-License-Identifier: Apache-2.0
"""Parameter groups by role. Each method declares the roles of its parameters, and the learning
rates that its papers give them; the user can set others.

Parameters beside an adapter have the roles "modules_to_save" (heads), "tokens" (rows of
embeddings), "biases", and "base" (other parameters of the base model that were unfrozen).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

from ..base.errors import PeftNotSupportedError, PeftRuntimeError, PeftTypeError, PeftValueError
from ..base.registry import PEFT_TYPE_TO_TUNER_MAPPING, lookup
from ..core.method_info import Role, role_of
from ..integrations.distributed import is_distributed, unwrap_model, unwrapped_name

if TYPE_CHECKING:
    from ..core.tuner import BaseTuner

ParameterGroup = dict[str, Any]  # as torch's optimizers take it

_ADAPTER = "adapter"  # the role of all parameters of a method that declares no roles
_COMPANIONS = {name: Role(()) for name in ("modules_to_save", "tokens", "biases", "base")}


class Trained(NamedTuple):
    """A trainable parameter of a model.

    Args:
        role: Its role's name.
        published: Learning rate that the method's papers give the role, None if they give none.
        decays: False if weight decay does not suit it: to biases, normalization, and roles that
            say so.
    """

    parameter: nn.Parameter
    role: str
    published: float | None
    decays: bool


class _GroupKey(NamedTuple):
    """Properties that the parameters of a group share."""

    role: str
    decays: bool
    rate: float | None
    distributed: bool  # optimizers that step lists of tensors can't mix DTensors with others


def parameter_groups(
    model: nn.Module,
    lr: float | None = None,
    *,
    rates: Mapping[str, float] | None = None,
    ratios: Mapping[str, float] | None = None,
    weight_decay: float = 0.0,
) -> list[ParameterGroup]:
    """Return a model's trainable parameters in groups by role, for any torch optimizer.

    Roles with a published rate: VB-LoRA's "bank" (1e-3) and "logits" (1e-2), Poly's "router" (0.1)
    and "skills" (1e-3). A routed model has "weights" (5e-2) and "gate" (5e-3). Roles without a
    rate: "A", "B", "embedding" and "magnitude" of LoRA; "A" (input side), "B" (output side) and
    "full" of LoKr and LoHa; "magnitude" of LoKr; "input_router" of Poly; "gate" of VB-LoRA;
    "modules_to_save", "tokens", "biases" and "base" of any method.

    Args:
        model: A `PeftModel`, or a model that adapters were injected into; also inside DDP, FSDP or
            `torch.compile`.
        lr: Rate of the roles that have neither a published rate nor an entry in `rates`. None
            leaves it to the optimizer.
        rates: Rates by role, in place of the published ones.
        ratios: Factors on rates, by role: `{"B": 16}` is LoRA+.
        weight_decay: Weight decay of the parameters that it suits. It does not suit biases,
            normalization, VB-LoRA's bank and logits, and DoRA's norms.

    Returns:
        Groups `{"params", "name", "lr", "weight_decay"}`, in the order in which the methods declare
        their roles. A group without "lr" has the optimizer's own rate.

    Raises:
        PeftValueError: Nothing is trainable, a role is unknown, or a number is not allowed.
        PeftRuntimeError: FSDP1 has made one flat parameter of all.

    Example:
        >>> from peft import VBLoRAConfig, get_peft_model
        >>> config = VBLoRAConfig(r=2, num_vectors=6, vector_length=4, target_modules=["0"])
        >>> model = get_peft_model(torch.nn.Sequential(torch.nn.Linear(8, 8)), config)
        >>> [(group["name"], group["lr"]) for group in parameter_groups(model)]
        [('bank', 0.001), ('logits', 0.01)]
        >>> optimizer = torch.optim.AdamW(parameter_groups(model, rates={"bank": 5e-4}))

    Source: arXiv:2405.15179 (VB-LoRA); arXiv:2211.03831 (Poly, MHR); arXiv:2402.12354 (LoRA+)
    """
    rates, ratios = dict(rates or {}), dict(ratios or {})
    _check_numbers(lr, rates, ratios, weight_decay)
    methods = _methods(model).values()
    declared = [role for tuner in methods for role in tuner.parameter_roles or (_ADAPTER,)]
    roles = list(dict.fromkeys([*declared, *_COMPANIONS]))
    if unknown := sorted((rates.keys() | ratios.keys()) - set(roles)):
        raise PeftValueError(
            f"This model has no role {unknown[0]!r}; it has {', '.join(map(repr, roles))}."
        )
    members: dict[_GroupKey, list[nn.Parameter]] = {}
    for trained in trained_parameters(model):
        rate = rates.get(trained.role, lr if trained.published is None else trained.published)
        if trained.role in ratios:
            if rate is None:
                raise PeftValueError(
                    f"`ratios`[{trained.role!r}] needs a rate to multiply; pass `lr`, or one in "
                    "`rates`."
                )
            rate *= ratios[trained.role]
        key = _GroupKey(trained.role, trained.decays, rate, is_distributed(trained.parameter))
        members.setdefault(key, []).append(trained.parameter)
    groups = []
    for key in sorted(members, key=lambda key: (roles.index(key.role), not key.decays)):
        decay = weight_decay if key.decays else 0.0
        rate_entry = {} if key.rate is None else {"lr": key.rate}
        group = {"params": members[key], "name": key.role, **rate_entry, "weight_decay": decay}
        groups.append(group)
    return groups


def create_optimizer(
    model: nn.Module,
    optimizer_cls: type[torch.optim.Optimizer] = torch.optim.AdamW,
    lr: float | None = None,
    *,
    rates: Mapping[str, float] | None = None,
    ratios: Mapping[str, float] | None = None,
    weight_decay: float = 0.0,
    **options: Any,
) -> torch.optim.Optimizer:
    """Make an optimizer over a model's `parameter_groups`.

    Args:
        model, lr, rates, ratios, weight_decay: As for `parameter_groups`.
        optimizer_cls: The class of a torch optimizer.
        **options: Options of the optimizer (`betas`, `momentum`, …).

    Raises:
        PeftTypeError: `optimizer_cls` is not a class of torch optimizers.
        PeftValueError, PeftRuntimeError: As for `parameter_groups`.

    Example:
        >>> from peft import LoraConfig, get_peft_model
        >>> base = torch.nn.Sequential(torch.nn.Linear(8, 8))
        >>> model = get_peft_model(base, LoraConfig(r=2, target_modules=["0"]))
        >>> optimizer = create_optimizer(model, lr=1e-4, ratios={"B": 16})
        >>> [group["lr"] for group in optimizer.param_groups]
        [0.0001, 0.0016]
    """
    if not isinstance(optimizer_cls, type) or not issubclass(optimizer_cls, torch.optim.Optimizer):
        raise PeftTypeError(
            f"`optimizer_cls`={optimizer_cls!r} must be a class of torch optimizers, for example "
            "`torch.optim.AdamW`."
        )
    groups = parameter_groups(model, lr, rates=rates, ratios=ratios, weight_decay=weight_decay)
    if lr is not None:
        options = {"lr": lr, **options}
    optimizer = optimizer_cls(groups, **options)
    keep_embedding_state_in_32_bits(model, optimizer_cls)
    return optimizer


def trainer_optimizer(
    optimizer_cls: type[torch.optim.Optimizer] = torch.optim.AdamW,
    lr: float | None = None,
    **options: object,
) -> tuple[Any, dict[str, object]]:
    """Return the value of `Trainer(optimizer_cls_and_kwargs=…)` with which it calls
    `create_optimizer`.

    Trainer makes the optimizer from the model as it is then: placed on its devices, and sharded by
    FSDP. The scheduler changes all rates by the same factor.

    Args:
        optimizer_cls, lr, **options: As for `create_optimizer`. Trainer does not hand down the
            `learning_rate` and `weight_decay` of its own arguments, so pass them here.

    Example:
        >>> optimizer_cls_and_kwargs = trainer_optimizer(lr=1e-4, rates={"logits": 5e-3})
    """
    return _TrainerOptimizer, {"optimizer_cls": optimizer_cls, "lr": lr, **options}


class _TrainerOptimizer:
    """Factory that Trainer calls with the model: `cls()(model, **options)`."""

    def __init__(self, *args: object, **options: object) -> None:
        if args or options:
            raise PeftNotSupportedError(
                "This version of transformers makes optimizers without showing them the model; "
                "update it, or pass "
                "`optimizers=(peft.optimizers.create_optimizer(model, …), None)` to the Trainer."
            )

    def __call__(self, model: nn.Module, **options: Any) -> torch.optim.Optimizer:
        return create_optimizer(model, **options)


def trained_parameters(model: nn.Module) -> Iterator[Trained]:
    """Yield the trainable parameters of a model with adapters, each with its role."""
    methods = _methods(model)
    is_trainable = False
    for wrapped_name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if "_flat_param" in wrapped_name:
            raise PeftRuntimeError(
                "FSDP1 has made one flat parameter of many roles; wrap the model with "
                "`use_orig_params=True`."
            )
        is_trainable = True
        name = unwrapped_name(wrapped_name)
        owner = model.get_submodule(wrapped_name.rpartition(".")[0])
        is_norm = "norm" in type(owner).__name__.lower()
        role_name, role = _role(name, methods)
        decays = role.decays and not is_norm and not name.endswith(".bias")
        yield Trained(parameter, role_name, role.lr, decays)
    if not is_trainable:
        raise PeftValueError(
            "The model has no trainable parameters; make an adapter trainable with `set_adapter`."
        )


def keep_embedding_state_in_32_bits(
    model: nn.Module, optimizer_cls: type[torch.optim.Optimizer]
) -> None:
    """Make bitsandbytes keep the state of embeddings in 32 bits; in 8 bits training is unstable."""
    if optimizer_cls.__module__.startswith("bitsandbytes"):
        import bitsandbytes

        manager = bitsandbytes.optim.GlobalOptimManager.get_instance()
        for module in model.modules():
            if isinstance(module, nn.Embedding):
                manager.register_module_override(module, "weight", {"optim_bits": 32})


def _methods(model: nn.Module) -> dict[str, type[BaseTuner]]:
    """Return the tuner class of each adapter."""
    configs = getattr(unwrap_model(model), "peft_config", None)
    if not isinstance(configs, dict) or not configs:
        raise PeftValueError("The model has no adapters; make some with `get_peft_model`.")
    return {
        name: lookup(PEFT_TYPE_TO_TUNER_MAPPING, config.peft_type)
        for name, config in configs.items()
    }


def _role(name: str, methods: Mapping[str, type[BaseTuner]]) -> tuple[str, Role]:
    """Return the role of the parameter of a name."""
    parts = name.split(".")
    for i, (container, adapter_name) in enumerate(pairwise(parts)):
        tuner = methods.get(adapter_name)
        if tuner is None:
            continue
        if container in (*tuner.tuner_layer_cls.container_names, *tuner.shared_parameter_names):
            inner = ".".join(parts[i + 2 :])
            role = role_of(tuner.parameter_roles, container, inner)
            return (_ADAPTER, Role(())) if role is None else (role, tuner.parameter_roles[role])
        if container == "modules_to_save":
            return container, _COMPANIONS[container]
        if container == "trainable_tokens_delta":
            return "tokens", _COMPANIONS["tokens"]
    companion = "biases" if name.endswith(".bias") else "base"
    return companion, _COMPANIONS[companion]


def _check_numbers(
    lr: float | None, rates: Mapping[str, float], ratios: Mapping[str, float], weight_decay: float
) -> None:
    """Check that all numbers are finite and not negative."""
    numbers = {"`lr`": 0.0 if lr is None else lr, "`weight_decay`": weight_decay}
    numbers |= {f"`rates`[{role!r}]": rate for role, rate in rates.items()}
    numbers |= {f"`ratios`[{role!r}]": ratio for role, ratio in ratios.items()}
    for name, value in numbers.items():
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not is_number or not 0 <= value < math.inf:
            raise PeftValueError(f"{name}={value!r} must be a finite number of at least 0.")
