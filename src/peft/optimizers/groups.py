# SPDX-License-Identifier: Apache-2.0
"""Parameter groups by role: each method says what its parameters are for and how its papers train
them; the user may say otherwise.

Beside the roles of the methods there are those of what is trained with any adapter:
"modules_to_save" (heads), "tokens" (rows of embeddings), "biases" and "base" (whatever else of the
base model was unfrozen).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import nn

from ..base.errors import PeftNotSupportedError, PeftRuntimeError, PeftTypeError, PeftValueError
from ..base.registry import PEFT_TYPE_TO_TUNER_MAPPING, lookup
from ..core.parameter_roles import Role, role_of
from ..integrations.distributed import is_distributed, unwrap_model, unwrapped_name

_ADAPTER = "adapter"  # for a method that names no roles
_COMPANIONS = {name: Role(()) for name in ("modules_to_save", "tokens", "biases", "base")}


class Trained(NamedTuple):
    """A trainable parameter of a model.

    Args:
        parameter: The parameter.
        role: Its role's name.
        published: The rate that the method's papers give it, if any.
        decays: Whether weight decay suits it: to a role that it does not suit, to biases and to
            normalisation it does not.
    """

    parameter: nn.Parameter
    role: str
    published: float | None
    decays: bool


def parameter_groups(
    model: nn.Module,
    lr: float | None = None,
    *,
    rates: Mapping[str, float] | None = None,
    ratios: Mapping[str, float] | None = None,
    weight_decay: float = 0.0,
) -> list[dict[str, Any]]:
    """A model's trainable parameters in groups by role, for any torch optimiser.

    The roles and their published rates are: VB-LoRA's "bank" (1e-3) and "logits" (1e-2), Poly's
    "router" (0.1) and "skills" (1e-3). Without a published rate: "A", "B", "embedding" and
    "magnitude" of LoRA; "A" (input side), "B" (output side), "full" and "magnitude" of LoKr;
    "input_router" of Poly; "gate" of VB-LoRA; for any method "modules_to_save", "tokens", "biases"
    and "base".

    Args:
        model: A `PeftModel`, or a model that adapters were injected into; also inside DDP, FSDP or
            `torch.compile`.
        lr: The rate of roles that have neither a published one nor an entry in `rates`. None leaves
            it to the optimiser.
        rates: Rates by role, in place of the published ones.
        ratios: Factors on rates, by role: `{"B": 16}` is LoRA+.
        weight_decay: For parameters that it suits. It does not suit biases, normalisation,
            VB-LoRA's bank and logits, and DoRA's lengths.

    Returns:
        Groups `{"params", "name", "lr", "weight_decay"}`, without "lr" where the optimiser's own is
        meant. Roles come in the order that the methods have them in.

    Raises:
        PeftValueError: Nothing is trainable, or a role is unknown, or a number is not allowed.
        PeftRuntimeError: FSDP1 has made one flat parameter of all.

    Example:
        >>> from peft import VBLoRAConfig, get_peft_model
        >>> config = VBLoRAConfig(r=2, num_vectors=6, vector_length=4, target_modules=["0"])
        >>> model = get_peft_model(torch.nn.Sequential(torch.nn.Linear(8, 8)), config)
        >>> [(group["name"], group["lr"]) for group in parameter_groups(model)]
        [('bank', 0.001), ('logits', 0.01)]
        >>> optimiser = torch.optim.AdamW(parameter_groups(model, rates={"bank": 5e-4}))

    Source: arXiv:2405.15179 (VB-LoRA); arXiv:2211.03831 (Poly, MHR); arXiv:2402.12354 (LoRA+)
    """
    rates, ratios = dict(rates or {}), dict(ratios or {})
    _check_numbers(lr, rates, ratios, weight_decay)
    order = _declared(model)
    if unknown := sorted((rates.keys() | ratios.keys()) - order.keys()):
        raise PeftValueError(
            f"This model has no role {unknown[0]!r}; it has {', '.join(map(repr, order))}."
        )
    groups: dict[Any, dict[str, Any]] = {}
    for trained in trained_parameters(model):
        rate = rates.get(trained.role, lr if trained.published is None else trained.published)
        ratio = ratios.get(trained.role)
        if ratio is not None and rate is None:
            raise PeftValueError(
                f"`ratios`[{trained.role!r}] needs a rate to multiply; pass `lr`, or one in "
                "`rates`."
            )
        rate = rate if ratio is None else rate * ratio  # type: ignore[operator]
        # What is in pieces and what is not can't be stepped together by optimisers that work on
        # whole lists.
        key = trained.role, trained.decays, rate, is_distributed(trained.parameter)
        if key not in groups:
            groups[key] = {
                "params": [],
                "name": trained.role,
                "lr": rate,
                "weight_decay": weight_decay if trained.decays else 0.0,
            }
            if rate is None:
                del groups[key]["lr"]
        groups[key]["params"].append(trained.parameter)
    roles = list(order)
    return [
        groups[key] for key in sorted(groups, key=lambda key: (roles.index(key[0]), not key[1]))
    ]


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
    """An optimiser over a model's `parameter_groups`.

    Args:
        model, lr, rates, ratios, weight_decay: As for `parameter_groups`.
        optimizer_cls: Any torch optimiser.
        **options: For the optimiser (`betas`, `momentum`, …).

    Raises:
        As `parameter_groups`.

    Example:
        >>> from peft import LoraConfig, get_peft_model
        >>> model = get_peft_model(torch.nn.Sequential(torch.nn.Linear(8, 8)), LoraConfig(r=2, target_modules=["0"]))
        >>> optimiser = create_optimizer(model, lr=1e-4, ratios={"B": 16})
        >>> [group["lr"] for group in optimiser.param_groups]
        [0.0001, 0.0016]
    """
    if not isinstance(optimizer_cls, type) or not issubclass(optimizer_cls, torch.optim.Optimizer):
        raise PeftTypeError(
            f"`optimizer_cls`={optimizer_cls!r} must be a class of torch optimisers, such as "
            "`torch.optim.AdamW`."
        )
    groups = parameter_groups(model, lr, rates=rates, ratios=ratios, weight_decay=weight_decay)
    given: dict[str, Any] = options if lr is None else {"lr": lr, **options}
    optimiser = optimizer_cls(groups, **given)
    keep_embeddings_wide(model, optimizer_cls)
    return optimiser


def trainer_optimizer(
    optimizer_cls: type[torch.optim.Optimizer] = torch.optim.AdamW,
    lr: float | None = None,
    **options: Any,
) -> tuple[Any, dict[str, Any]]:
    """What `Trainer(optimizer_cls_and_kwargs=…)` takes, so that it trains with `create_optimizer`.

    The optimiser is made when Trainer asks for it, from the model as it is then: placed, and
    sharded by FSDP. The scheduler changes all rates by the same factor.

    Args:
        optimizer_cls, lr, **options: As for `create_optimizer`. Say them here: Trainer does not
            hand down the `learning_rate` and `weight_decay` of its arguments.

    Example:
        >>> optimizer_cls_and_kwargs = trainer_optimizer(lr=1e-4, rates={"logits": 5e-3})
    """
    return _TrainerOptimizer, {"optimizer_cls": optimizer_cls, "lr": lr, **options}


class _TrainerOptimizer:
    """How Trainer makes an optimiser that is to know the model: `cls()(model, **options)`."""

    def __init__(self, *args: Any, **options: Any) -> None:
        if args or options:
            raise PeftNotSupportedError(
                "This version of transformers makes optimisers without showing them the model; "
                "update it, or pass "
                "`optimizers=(peft.optimizers.create_optimizer(model, …), None)` to the Trainer."
            )

    def __call__(self, model: nn.Module, **options: Any) -> torch.optim.Optimizer:
        return create_optimizer(model, **options)


def trained_parameters(model: nn.Module) -> Iterator[Trained]:
    """The trainable parameters of a model with adapters, with the role of each.

    Raises:
        PeftValueError: There are none, or no adapters.
        PeftRuntimeError: FSDP1 has made one flat parameter of all.
    """
    methods = _methods(model)
    found = False
    for raw, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if "_flat_param" in raw:
            raise PeftRuntimeError(
                "FSDP1 has made one flat parameter of many roles; wrap the model with "
                "`use_orig_params=True`."
            )
        found = True
        name = unwrapped_name(raw)
        owner = model.get_submodule(raw.rpartition(".")[0])
        plain = name.endswith(".bias") or "norm" in type(owner).__name__.lower()
        role_name, role = _role(name, methods)
        yield Trained(parameter, role_name, role.lr, role.decays and not plain)
    if not found:
        raise PeftValueError(
            "The model has no trainable parameters; make an adapter trainable with `set_adapter`."
        )


def keep_embeddings_wide(model: nn.Module, optimizer_cls: type[torch.optim.Optimizer]) -> None:
    """Have bitsandbytes' optimisers keep the state of embeddings in 32 bits, as Trainer does: with
    8 their training is unstable.
    """
    if optimizer_cls.__module__.startswith("bitsandbytes"):
        import bitsandbytes

        manager = bitsandbytes.optim.GlobalOptimManager.get_instance()
        for module in model.modules():
            if isinstance(module, nn.Embedding):
                manager.register_module_override(module, "weight", {"optim_bits": 32})


def _methods(model: Any) -> dict[str, Any]:
    """The tuner class of each adapter."""
    configs = getattr(unwrap_model(model), "peft_config", None)
    if not isinstance(configs, dict) or not configs:
        raise PeftValueError("The model has no adapters; make some with `get_peft_model`.")
    return {
        name: lookup(PEFT_TYPE_TO_TUNER_MAPPING, config.peft_type)
        for name, config in configs.items()
    }


def _declared(model: nn.Module) -> dict[str, None]:
    """All roles there can be in a model, in order."""
    methods = _methods(model).values()
    own = [role for tuner in methods for role in tuner.parameter_roles or (_ADAPTER,)]
    return dict.fromkeys([*own, *_COMPANIONS])


def _role(name: str, methods: Mapping[str, Any]) -> tuple[str, Role]:
    """The role of the parameter of this name."""
    parts = name.split(".")
    for i, (holder, adapter_name) in enumerate(pairwise(parts)):
        tuner = methods.get(adapter_name)
        if tuner is None:
            continue
        if (
            holder in tuner.tuner_layer_cls.container_names
            or holder in tuner.shared_parameter_names
        ):
            own = role_of(tuner.parameter_roles, holder, ".".join(parts[i + 2 :]))
            return (_ADAPTER, Role(())) if own is None else (own, tuner.parameter_roles[own])
        if holder in ("modules_to_save", "trainable_tokens_delta"):
            role = "tokens" if holder == "trainable_tokens_delta" else holder
            return role, _COMPANIONS[role]
    role = "biases" if name.endswith(".bias") else "base"
    return role, _COMPANIONS[role]


def _check_numbers(
    lr: Any, rates: Mapping[str, Any], ratios: Mapping[str, Any], weight_decay: Any
) -> None:
    entries = {f"`rates`[{k!r}]": v for k, v in rates.items()} | {
        f"`ratios`[{k!r}]": v for k, v in ratios.items()
    }
    for name, value in {
        "`lr`": 0.0 if lr is None else lr,
        "`weight_decay`": weight_decay,
        **entries,
    }.items():
        if (
            isinstance(value, bool)
            or not isinstance(value, (int, float))
            or not (0 <= value < math.inf)
        ):
            raise PeftValueError(f"{name}={value!r} must be a finite number of at least 0.")
