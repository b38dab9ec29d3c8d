# SPDX-License-Identifier: Apache-2.0
"""LoRA on tied modules: layers that share an embedding's weight follow its adapter.

Other implementations have a LoRA layer in place of each follower, with the embedding's factors
transposed in it. So files have them, and they are left out when a file is read.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

from torch import Tensor, nn

from ...base.constants import MODEL_ROOT, ROOT
from ...base.containers import modules_of
from ...base.errors import PeftNotSupportedError
from ...base.modules import get_submodules
from ...core.base_layer import layer_of
from ...core.followers import Follower
from ...core.injection import Build
from ...core.plan import Plan
from .base import LoraLayer
from .config import LoraConfig
from .layer import Embedding

_FACTORS = ("lora_A.weight", "lora_B.weight")


def check(plan: Plan[LoraConfig]) -> None:
    """Raise `PeftNotSupportedError` for options that followers can't take over."""
    config = plan.config
    options = {name: getattr(config, name) for name in ("use_dora", "alora_invocation_tokens")}
    set_options = [name for name, value in options.items() if value]
    followers = [path for path, owner in plan.ties.items() if owner in plan.targets]
    if followers and set_options:
        raise PeftNotSupportedError(
            f"`{set_options[0]}` is not supported for `{followers[0]}`, which follows an "
            "embedding by `ensure_weight_tying`=True; leave out one of the two."
        )


def put(model: nn.Module, build: Build[LoraConfig]) -> None:
    """Let modules follow the layers of a new adapter that have their weight."""
    for path, owner in build.ties.items():
        if owner not in build.layers:
            continue
        layer = layer_of(model.get_submodule(owner), LoraLayer)
        assert isinstance(layer, Embedding)
        parent, module, name = get_submodules(model, path)
        if not isinstance(module, Follower):
            module = Follower(module, layer)
            setattr(parent, name, module)
        module.follow(build.adapter_name)


def with_followers(
    model: nn.Module, adapter_name: str, state: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Return an adapter's tensors for a file, with those that others have for the followers."""
    result = dict(state)
    for path, module in modules_of(model, Follower):
        if not module.has(adapter_name):
            continue
        owner = module.owner
        assert isinstance(owner, Embedding)
        A, B = (factor.detach() for factor in owner.factors(adapter_name))
        names = (
            {"lora_embedding_A": A, "lora_embedding_B": B}
            if isinstance(module.original_module, nn.Embedding)
            else {"lora_A.weight": B.mT.contiguous(), "lora_B.weight": A.mT.contiguous()}
        )
        result |= {f"{MODEL_ROOT}{path}.{name}": tensor for name, tensor in names.items()}
    return result


def without_followers(state: Mapping[str, Tensor], names: Collection[str]) -> dict[str, Tensor]:
    """Return a file's tensors without those of followers: transposed factors of an embedding that
    are none of `names`, the keys of the adapter in the model.
    """
    present = set(map(_plain, names))
    if not present:
        return dict(state)
    of_embeddings = [tuple(t.shape) for key, t in state.items() if "lora_embedding_" in key]
    shapes = {*of_embeddings, *(shape[::-1] for shape in of_embeddings)}

    def is_of_follower(key: str, tensor: Tensor) -> bool:
        is_factor = key.endswith(_FACTORS) or "lora_embedding_" in key
        return _plain(key) not in present and is_factor and tuple(tensor.shape) in shapes

    return {key: tensor for key, tensor in state.items() if not is_of_follower(key, tensor)}


def _plain(key: str) -> str:
    return key.removeprefix(MODEL_ROOT).removeprefix(ROOT)
