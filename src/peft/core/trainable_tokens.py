# SPDX-License-Identifier: Apache-2.0
"""Train single rows of a token embedding beside an adapter (`trainable_token_indices`).

The rows are parameters of their own, and the weight stays as it is. An embedding's output is
replaced where one of the tokens is looked up, and an output head's logits where they belong to one.
A head that shares the embedding's weight shares the rows.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..base.calls.adapter_batch import ADAPTER_BATCHES
from ..base.errors import PeftValueError
from ..base.geometry import Placement
from ..config import TargetedConfig
from . import targets as _targets
from . import tying
from .adapters import AdapterParameterDict
from .auxiliary import AuxiliaryTrainingWrapper
from .computed_weights import make_plain
from .unmatched_names import with_near_misses


class TokenRows(NamedTuple):
    """The rows of an embedding that one adapter trains.

    Args:
        indices: The tokens.
        rows: Their rows `[tokens, features]`.
    """

    indices: list[int]
    rows: nn.Parameter


class TrainableTokensLayer(nn.Module):
    """An embedding or output head with rows of its own for each adapter.

    Args:
        base_layer: The `nn.Embedding` or `nn.Linear`.

    Attributes:
        trainable_tokens_delta: The rows `[tokens, features]` used in place of the weight's, by
            adapter name.
        token_indices: The tokens, by adapter name.
    """

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.trainable_tokens_delta = AdapterParameterDict()
        self.token_indices: dict[str, list[int]] = {}
        self.train(base_layer.training)

    @property
    def trainable_tokens_original(self) -> dict[str, Tensor]:
        """The weight's own rows of the tokens, by adapter name."""
        weight = _weight(self.base_layer).detach()
        return {name: weight[indices] for name, indices in self.token_indices.items()}


class TrainableTokensWrapper(AuxiliaryTrainingWrapper):
    """A token embedding, or an output head, with trainable rows for each adapter.

    Args:
        module: The original module.
        tied_to: The wrapper of an embedding with the same weight, whose rows this one uses; by
            default it has its own.
    """

    __module__ = "peft.utils.other"  # where pickles look for it

    adapter_layer_names: ClassVar[tuple[str, ...]] = ("token_adapter.trainable_tokens_delta",)
    other_param_names: ClassVar[tuple[str, ...]] = (
        "token_adapter.token_indices",
        "token_adapter.trainable_tokens_original",
    )

    def __init__(self, module: nn.Module, tied_to: TrainableTokensWrapper | None = None) -> None:
        super().__init__(module)
        self.token_adapter = TrainableTokensLayer(module)
        owner = self if tied_to is None else tied_to
        self._owner = (owner.token_adapter,)  # in a tuple, not to be registered

    @staticmethod
    def rows_of(
        module: nn.Module, indices: list[int], place: Placement, initialize: bool
    ) -> TokenRows:
        """Return an adapter's rows: those of the module's weight, or memory for them."""
        if isinstance(module, TrainableTokensWrapper):
            module = module.original_module
        weight = _weight(module)
        if weight.is_meta or not initialize:
            size = len(indices), weight.shape[1]
            rows = torch.empty(size, device=place.device, dtype=place.dtype)
        else:
            rows = weight.detach()[indices].to(*place, copy=True)
        return TokenRows(indices, nn.Parameter(rows))

    @property
    def original_module(self) -> nn.Module:
        """The original module."""
        return self.token_adapter.base_layer

    @property
    def adapters(self) -> list[str]:
        """Names of the adapters that train some of its rows."""
        return list(self._owner[0].token_indices)

    def has(self, adapter_name: str) -> bool:
        """Return whether an adapter trains some of its rows."""
        return adapter_name in self._owner[0].token_indices

    def check_one_of(self, adapter_names: Iterable[str]) -> None:
        """Raise `PeftValueError` if several of some adapters train the same row."""
        names = self.among(adapter_names)
        rows = [row for name in names for row in {*self._owner[0].token_indices[name]}]
        if len({*rows}) < len(rows):
            super().check_one_of(names)

    @property
    def weight(self) -> Tensor:
        """The weight with the active adapters' rows in place."""
        names = self._in_use()
        base = _weight(self.original_module)
        return self._replaced(base, names) if names else base

    def add_rows(self, adapter_name: str, tokens: TokenRows) -> None:
        """Add an adapter's rows."""
        self.token_adapter.trainable_tokens_delta[adapter_name] = tokens.rows
        self.token_adapter.token_indices[adapter_name] = list(tokens.indices)

    def parameters_of(self, adapter_name: str) -> list[nn.Parameter]:
        """Return an adapter's rows in a list."""
        rows = self.token_adapter.trainable_tokens_delta
        return [rows[adapter_name]] if adapter_name in rows else []

    def remove(self, adapter_name: str) -> None:
        """Remove an adapter's rows."""
        if adapter_name in self.token_adapter.trainable_tokens_delta:
            del self.token_adapter.trainable_tokens_delta[adapter_name]
            del self.token_adapter.token_indices[adapter_name]

    def forward(self, x: Tensor, *args: object, **kwargs: object) -> Tensor:
        """Run the module with the rows of the active adapters, or of each sample's adapter."""
        batch = ADAPTER_BATCHES.current
        if batch is None or self._disable_adapters:
            return self._run(self._in_use(), x, *args, **kwargs)

        def run(name: str, x: Tensor, *args: object, **kwargs: object) -> Tensor:
            return self._run([name] if self.has(name) else [], x, *args, **kwargs)

        return self._run_for_samples(batch, run, (x, *args), kwargs)

    def plain(self, adapter_names: Collection[str]) -> nn.Module:
        """Return the module with the rows of some adapters written into its weight."""
        for name in self.among(adapter_names):
            make_plain(self.original_module)
            weight = _weight(self.original_module)
            own = self._owner[0]
            rows = own.trainable_tokens_delta[name].data
            weight.data[own.token_indices[name]] = rows.to(weight)
        return self.original_module

    def _in_use(self) -> list[str]:
        return [] if self._disable_adapters else self.among(self._active_adapter)

    def _run(self, names: list[str], x: Tensor, *args: object, **kwargs: object) -> Tensor:
        base = self.original_module
        if not names:
            return base(x, *args, **kwargs)
        if type(base) is nn.Linear:
            result = base(x)
            logits = F.linear(x, self._rows(names).to(x.dtype))
            indices = self._indices(names, x.device)
            if base.bias is not None:
                logits = logits + base.bias[indices]
            return result.index_copy(-1, indices, logits.to(result.dtype))
        if type(base) is nn.Embedding and base.max_norm is None and not base.scale_grad_by_freq:
            result = base(x)
            looked_up = x.unsqueeze(-1) == self._indices(names, x.device)
            rows = F.embedding(looked_up.int().argmax(-1), self._rows(names)).to(result.dtype)
            return torch.where(looked_up.any(-1, keepdim=True), rows, result)
        # A subclass with its own forward (a scaled embedding) runs with the changed weight.
        weight = _weight(base)
        replaced = {"weight": self._replaced(weight, names)}
        return torch.func.functional_call(base, replaced, (x, *args), kwargs)

    def _replaced(self, weight: Tensor, names: list[str]) -> Tensor:
        indices = self._indices(names, weight.device)
        return weight.index_copy(0, indices, self._rows(names).to(weight))

    def _rows(self, names: list[str]) -> Tensor:
        rows = [self._owner[0].trainable_tokens_delta(name) for name in names]
        return rows[0] if len(rows) == 1 else torch.cat(rows)

    def _indices(self, names: list[str], device: torch.device) -> Tensor:
        indices = [row for name in names for row in self._owner[0].token_indices[name]]
        return torch.tensor(indices, device=device)

    def adapter_state_dict_load_map(self, adapter_name: str) -> dict[str, str]:
        """Return the name of an adapter's rows, by the key they are saved under."""
        if adapter_name not in self.token_adapter.token_indices:
            return {}
        name = "token_adapter.trainable_tokens_delta"
        return {name: f"{name}.{adapter_name}"}


class TokenPlan(NamedTuple):
    """The embeddings that get trainable rows for an adapter.

    Args:
        indices: The tokens, by module path.
        tied: For each path of a module that shares an embedding's weight, the embedding's path.
    """

    indices: dict[str, list[int]]
    tied: dict[str, str]


def plan(
    config: TargetedConfig,
    model: nn.Module,
    modules: Mapping[str, nn.Module],
    taken: Collection[str],
) -> TokenPlan:
    """Find the embeddings and tokens of a config's `trainable_token_indices`.

    `taken` are paths of modules that the adapter changes in another way.

    Raises:
        PeftValueError: A module is missing, no embedding or head, taken, or lacks a token.
    """
    wanted = config.trainable_token_indices
    if not wanted:
        return TokenPlan({}, {})
    by_name = wanted if isinstance(wanted, dict) else {_input_embedding(model, modules): wanted}
    indices: dict[str, list[int]] = {}
    problems = []
    for name, tokens in by_name.items():
        paths = [path for path in modules if _targets.named([name], path)]
        if not paths:
            shown = with_near_misses(
                [name],
                [path for path, module in modules.items() if isinstance(module, nn.Embedding)],
            )
            problems.append(
                f"`trainable_token_indices` names {shown}: the model has no such module."
            )
        for path in paths:
            problems += _problems(path, modules[path], tokens, taken)
            indices[path] = list(tokens)
    if tying.is_wanted(config):
        owners = tying.owners(modules)
        for path, tokens in list(indices.items()):
            owner = owners.get(path, path)
            if indices.setdefault(owner, tokens) != tokens:
                problems.append(
                    f"`ensure_weight_tying`=True: `{path}` and `{owner}` share a weight, and "
                    "`trainable_token_indices` has other tokens for each; name the same."
                )
            elif path != owner:
                del indices[path]
    if problems:
        raise PeftValueError(" ".join(problems))
    weights = {id(_original(modules[path]).weight): path for path in indices}
    tied = {
        path: weights[id(weight)]
        for path, module in modules.items()
        if path not in indices
        and (weight := _original(module)._parameters.get("weight")) is not None
        and id(weight) in weights
    }
    return TokenPlan(indices, tied)


def _problems(
    path: str, module: nn.Module, tokens: list[int], taken: Collection[str]
) -> Iterator[str]:
    module = _original(module)
    if path in taken:
        yield (
            f"`{path}`: The embedding layer is already marked to be trained fully or adapted; name "
            "it in one of `modules_to_save`, `target_modules` and `trainable_token_indices`."
        )
    elif not isinstance(module, (nn.Embedding, nn.Linear)) or not module.weight.is_floating_point():
        yield (
            f"`{path}`: {type(module).__name__} is not an nn.Embedding or nn.Linear with a "
            "floating-point weight."
        )
    elif wrong := [token for token in tokens if not 0 <= token < module.weight.shape[0]]:
        yield (
            f"`{path}`: `trainable_token_indices` has {wrong}; the tokens go from 0 to "
            f"{module.weight.shape[0] - 1}."
        )


def _weight(module: nn.Module) -> Tensor:
    """Return the weight of an embedding or output head."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight


def _original(module: nn.Module) -> nn.Module:
    return module.original_module if isinstance(module, TrainableTokensWrapper) else module


def _input_embedding(model: nn.Module, modules: Mapping[str, nn.Module]) -> str:
    """Return the path of the model's token embedding, by default its usual name."""
    try:
        embedding = model.get_input_embeddings()  # type: ignore[operator]
    except (AttributeError, NotImplementedError):
        return "embed_tokens"
    return next((path for path, module in modules.items() if module is embedding), "embed_tokens")
