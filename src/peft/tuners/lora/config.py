# SPDX-License-Identifier: Apache-2.0
"""Configuration of LoRA."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, ClassVar, Literal

from ...base.errors import PeftNotSupportedError, warn
from ...base.placeholders import placeholders
from ...base.plain_values import JsonObject, is_empty
from ...base.registry import WAY_BACK, PeftType
from ...base.validation import LayerIndices, TokenIndices
from ...config import (
    TargetedConfig,
    at_least,
    boolean,
    choice,
    is_int,
    number,
    pattern_dict,
    probability,
)
from ...core.replication import problems as replication_problems
from ...core.targets import pattern_value
from .starts.configs import CordaConfig, EvaConfig, LoftQConfig, LoraGAConfig, StartConfig
from .starts.kinds import (
    FROM_DATA,
    IN_FILE,
    REPEATABLE,
    check_readable,
    is_in_file,
    is_random,
    with_own_rank,
)

# Values of `init_lora_weights`, in addition to "pissa_niter_<n>".
INITIALIZATIONS = (
    *(True, False, "gaussian", "orthogonal", "olora", "pissa"),
    *("loftq", "eva", "corda", "lora_ga"),
)
_SWITCHES = ("fan_in_fan_out", "use_rslora", "use_dora", "lora_bias", "ensure_weight_tying")

# Names of the interface that this package does not implement, as placeholders.
ArrowConfig: type
BdLoraConfig: type
KasaConfig: type
MontecloraConfig: type
VeloraConfig: type

if not TYPE_CHECKING:
    __getattr__ = placeholders(__name__)


@dataclass
class LoraRuntimeConfig:
    """Settings of a process that runs adapters; not part of a file.

    Args:
        ephemeral_gpu_offload: Where the base weights are on the CPU, compute an adapter's start on
            the accelerator: DoRA's norms, and decompositions of the weight ("pissa", "olora").
            Weights and results stay on the CPU.
    """

    ephemeral_gpu_offload: bool = False


# Fields of features that are not implemented, with what to use instead. Values that turn the
# feature off are accepted.
_NOT_PROVIDED = {
    "megatron_config": "adapts layers of Megatron; load the model with transformers, whose tensor "
    "parallelism adapters follow",
    "velora_config": "trades exact gradients for memory; `gradient_checkpointing_enable` saves "
    "memory with exact ones",
    "use_qalora": "adapts GPTQ layers with pooled inputs; without it they get plain LoRA",
    "monteclora_config": "samples the adapter's weights in training; train several adapters, and "
    "combine them by `add_weighted_adapter`",
    "use_bdlora": "makes factors of blocks for tensor-parallel serving; every server reads plain "
    "LoRA",
    "arrow_config": "routes tokens among LoRA adapters; `create_arrow_model` and "
    "`get_routed_model` do so",
    "kasa_config": "takes small singular values from the base weight; `init_lora_weights='pissa'` "
    "starts from the large ones",
}
# Settings of an initialization, without effect for another one.
_OF_STARTS: dict[str, tuple[str, type[StartConfig]]] = {
    "loftq_config": ("loftq", LoftQConfig),
    "eva_config": ("eva", EvaConfig),
    "corda_config": ("corda", CordaConfig),
    "lora_ga_config": ("lora_ga", LoraGAConfig),
}


@dataclass
class LoraConfig(TargetedConfig):
    """Configuration of LoRA, `ΔW = s · B·A` with `A [r, in]`, `B [out, r]` and
    `s = lora_alpha / r`.

    Args:
        r: Rank.
        target_modules: Names (or ends of paths), a regular expression for whole paths,
            "all-linear", or None for the model type's defaults.
        exclude_modules: Names or a regular expression; takes precedence over `target_modules`.
        lora_alpha: The delta is scaled by `lora_alpha / r`.
        lora_dropout: Dropout on the input, in training; embeddings have none.
        fan_in_fan_out: Expected layout of the adapted layers' weights: True for `[in, out]`
            (Conv1D). The layers themselves decide.
        bias: Biases to train: "none", "all" of the model's, or "lora_only", those of adapted
            layers.
        use_rslora: Scale by `lora_alpha / √r` (rank-stabilized LoRA).
        modules_to_save: Modules to train in full and save with the adapter.
        init_lora_weights: Initialization. True: without effect, `A` uniform and `B` zero (`A` for
            embeddings). "gaussian": the same with `A` normal. "orthogonal": without effect, with
            both nonzero; even ranks only. "pissa": the `r` largest singular values of the weight,
            `B₀·A₀`, without effect since they are subtracted: `ΔW = s · (B·A - B₀·A₀)`;
            "pissa_niter_<n>" computes them by `n` rounds of subspace iteration. "olora": the same
            with the first `r` columns of the weight's QR decomposition. "corda" and "lora_ga":
            the same with components chosen by data, which `preprocess_corda` or
            `preprocess_loraga` has collected. "loftq": quantize the weight, and start from what
            that loses; the base weight changes. "eva": as True, until
            `initialize_lora_eva_weights` starts `A` from data. All but the first four are for
            linear layers; embeddings start as with True. False: at random, with an effect.
        layers_to_transform: Index or indices of the layers to adapt.
        layers_pattern: Name of the list of layers, "layers" or "h" for example; by default the
            outermost list.
        rank_pattern: Rank for modules by name or regular expression, in place of `r`. A key matches
            the whole module path or its end; a key that begins with `^` also matches all modules
            below the path (in a file of other writers, only the module itself).
        alpha_pattern: `lora_alpha` for modules by name or regular expression, as in `rank_pattern`.
        trainable_token_indices: Tokens whose rows of the embedding are trained beside the adapter
            (and those of the output head, where it shares the weight); a dictionary names other
            modules: name → tokens.
        use_dora: Train the norm of each row of the weight apart from its direction (DoRA).
        lora_bias: Give `B` a bias. Not for embeddings, and not with `use_dora`.
        alora_invocation_tokens: Token ids of an invocation. The adapter acts only on the tokens
            from the last invocation in a text on, so that the base model's key-value cache of what
            lies before stays valid (activated LoRA). A text without one is computed as by the base
            model. For linear layers and embeddings of decoders; the adapter can't be merged.
        loftq_config: Settings of "loftq", a `LoftQConfig` or its fields.
        eva_config: Settings of "eva".
        corda_config: Settings of "corda".
        lora_ga_config: Settings of "lora_ga".
        runtime_config: A `LoraRuntimeConfig`, which is not saved.
        megatron_config, megatron_core, velora_config, use_qalora, qalora_group_size,
        monteclora_config, use_bdlora, arrow_config, kasa_config: Not provided;
            only values that turn the feature off are accepted.
        layer_replication: Ranges `[start, end]` of the model's layers, the end not included, that
            take the place of the layers: [[0, 4], [2, 5]] makes seven of five. The copies share the
            base weights, and each has an adapter of its own.
        target_parameters: Parameters to adapt, by the ends of their paths
            ("experts.gate_up_proj"): matrices, and stacks of experts' matrices `[experts, …]`,
            where each expert gets factors of rank `r`. Without `lora_dropout`, `lora_bias` and
            `use_dora`.
        ensure_weight_tying: Where a target, or a module to save, shares its weight with others (the
            embedding with the output head), tie the adapter or the copy of all of them too.
        start: Set by this package if readers can't compute the start ("pissa_niter_<n>", "corda",
            "lora_ga"): the file holds a plain adapter of twice the rank, and this field tells how
            to separate the start.

    Raises:
        PeftValueError: A value is not allowed.
        PeftNotSupportedError: A field asks for a feature that is not implemented.

    Example:
        >>> LoraConfig(r=8, target_modules=["q_proj", "v_proj"], use_dora=True).peft_type.value
        'LORA'

    Source: arXiv:2106.09685, section 4.1; `use_rslora`: arXiv:2312.03732; `use_dora`:
    arXiv:2402.09353; `alora_invocation_tokens`: arXiv:2504.12397; "pissa": arXiv:2404.02948;
    "olora": arXiv:2406.01775; "loftq": arXiv:2310.08659; "eva": arXiv:2410.07170; "corda":
    arXiv:2406.05223; "lora_ga": arXiv:2407.05000
    """

    r: int = 8
    target_modules: list[str] | str | set[str] | None = None
    exclude_modules: list[str] | str | set[str] | None = None
    lora_alpha: float = 8
    lora_dropout: float = 0.0
    fan_in_fan_out: bool = False
    bias: Literal["none", "all", "lora_only"] = "none"
    use_rslora: bool = False
    modules_to_save: list[str] | None = None
    init_lora_weights: bool | str = True
    layers_to_transform: LayerIndices | None = None
    layers_pattern: list[str] | str | None = None
    rank_pattern: dict | None = field(default_factory=dict)
    alpha_pattern: dict | None = field(default_factory=dict)
    megatron_config: dict | None = None
    megatron_core: str | None = "megatron.core"
    trainable_token_indices: TokenIndices | None = None
    loftq_config: dict = field(default_factory=dict)
    eva_config: EvaConfig | None = None
    corda_config: CordaConfig | None = None
    lora_ga_config: LoraGAConfig | None = None
    use_dora: bool = False
    velora_config: dict | None = None
    alora_invocation_tokens: list[int] | None = None
    use_qalora: bool = False
    qalora_group_size: int = 16
    monteclora_config: dict | None = None
    layer_replication: list[tuple[int, int]] | None = None
    runtime_config: LoraRuntimeConfig = field(default_factory=LoraRuntimeConfig)
    lora_bias: bool = False
    target_parameters: list[str] | None = None
    use_bdlora: dict | None = None
    arrow_config: dict | None = None
    kasa_config: dict | None = None
    ensure_weight_tying: bool = False

    start: dict[str, object] | str | None = None

    no_effect: ClassVar[frozenset[str]] = TargetedConfig.no_effect | {
        "lora_dropout", "fan_in_fan_out", "bias", "start", "eva_config", "corda_config",
        "lora_ga_config",
    }  # fmt: skip
    sizes: ClassVar[tuple[str, ...]] = ("r", "rank_pattern")
    patterns: ClassVar[tuple[str, ...]] = ("rank_pattern", "alpha_pattern")
    absent_values: ClassVar[dict[str, object]] = {"start": None}
    unsaved: ClassVar[tuple[str, ...]] = ("runtime_config",)

    def __post_init__(self) -> None:
        self.peft_type = PeftType.LORA
        if isinstance(self.init_lora_weights, str):
            self.init_lora_weights = self.init_lora_weights.lower()  # papers write "OLoRA"
        if is_random(self.init_lora_weights) and self.peft_version is None:
            self.start = REPEATABLE
        elif self.start in (REPEATABLE, IN_FILE) and not is_in_file(self.init_lora_weights):
            self.start = None
        for name, (start, settings) in _OF_STARTS.items():
            if self.init_lora_weights == start:
                given = settings.of(getattr(self, name), name)
                setattr(self, name, vars(given) if start == "loftq" else given)
            elif getattr(self, name):
                warn(
                    f"`{name}` is ignored, since `init_lora_weights` is {self.init_lora_weights!r} "
                    f"and not {start!r}."
                )
                setattr(self, name, None)
        super().__post_init__()

    @property
    def trained_biases(self) -> str:  # noqa: D102
        return self.bias

    @property
    def starts_from_weight(self) -> bool:
        """True if the adapter starts with a part of the base weight."""
        start = self.init_lora_weights
        return isinstance(start, str) and (
            start.startswith(("pissa", "olora")) or start in FROM_DATA or start == "loftq"
        )

    def rank_at(self, path: str) -> int:
        """Return the rank of the adapter on the module at a path."""
        return pattern_value(self.rank_pattern or {}, path, self.r)

    def alpha_at(self, path: str) -> float:
        """Return `lora_alpha` of the adapter on the module at a path."""
        return pattern_value(self.alpha_pattern or {}, path, self.lora_alpha)

    @property
    def offloads_ephemerally(self) -> bool:
        """True if starts are computed on the accelerator where the weights are on the CPU."""
        return self.runtime_config.ephemeral_gpu_offload

    @property
    def quantizes_weight(self) -> bool:
        """True if the adapter starts with what a quantization of the base weight loses."""
        return self.init_lora_weights == "loftq"

    def affects_output(self, name: str) -> bool:  # noqa: D102
        if name == "init_lora_weights":
            return self.starts_from_weight
        return self.quantizes_weight if name == "loftq_config" else super().affects_output(name)

    def validate(self) -> None:
        """Check every field, first those of features that are not implemented."""
        asked = [name for name in _NOT_PROVIDED if getattr(self, name)]
        if asked:
            named = "; ".join(
                f"`{name}`={getattr(self, name)!r} asks for what this package does not provide: it "
                f"{_NOT_PROVIDED[name]}"
                for name in asked
            )
            raise PeftNotSupportedError(f"LoraConfig: {named}. {WAY_BACK}")
        runtime, known = self.runtime_config, {"ephemeral_gpu_offload"}
        if isinstance(runtime, dict) and runtime.keys() <= known:
            self.runtime_config = LoraRuntimeConfig(**runtime)
        super().validate()

    def _problems(self) -> Iterator[str]:
        yield from super()._problems()
        runtime = self.runtime_config
        if isinstance(runtime, LoraRuntimeConfig):
            name = "runtime_config.ephemeral_gpu_offload"
            yield from boolean(name, runtime.ephemeral_gpu_offload)
        else:
            yield f"`runtime_config`={runtime!r} must be a LoraRuntimeConfig."
        yield from at_least("r", self.r)
        yield from number("lora_alpha", self.lora_alpha)
        yield from probability("lora_dropout", self.lora_dropout)
        for name in _SWITCHES:
            yield from boolean(name, getattr(self, name))
        yield from choice("bias", self.bias, ("none", "all", "lora_only"))
        yield from pattern_dict("rank_pattern", self.rank_pattern, at_least)
        yield from pattern_dict("alpha_pattern", self.alpha_pattern, partial(number))
        yield from replication_problems("layer_replication", self.layer_replication)
        start, tokens = self.init_lora_weights, self.alora_invocation_tokens
        if not (isinstance(start, str) and re.fullmatch(r"pissa_niter_\d+", start)):
            yield from choice("init_lora_weights", start, (*INITIALIZATIONS, "pissa_niter_<n>"))
        if not is_empty(tokens) and not (isinstance(tokens, list) and all(map(is_int, tokens))):
            yield (
                f"`alora_invocation_tokens`={tokens!r} must be a list of token ids, as "
                "`tokenizer.encode(text, add_special_tokens=False)` returns; None turns it off."
            )

    def _contradictions(self) -> Iterator[str]:
        yield from super()._contradictions()
        yield from self._start_contradictions()
        if self.use_dora and self.lora_bias:
            yield (
                "The argument lora_bias=True is not supported together with `use_dora`=True; "
                "choose one of them."
            )
        if self.lora_bias and isinstance(self.init_lora_weights, str):
            yield (
                "The argument lora_bias=True is for `init_lora_weights` True or False, found "
                f"{self.init_lora_weights!r}."
            )
        if isinstance(self.target_modules, str) and self.target_modules != "all-linear":
            for name in ("layers_to_transform", "layers_pattern"):
                if not is_empty(getattr(self, name)):
                    yield (
                        f"`{name}` cannot be used when `target_modules` is a str; put the layers "
                        "into the regular expression."
                    )

    def _start_contradictions(self) -> Iterator[str]:
        """Yield a sentence for each field that does not go with the start or the invocation."""
        start, has_invocation = self.init_lora_weights, not is_empty(self.alora_invocation_tokens)
        if self.starts_from_weight and self.lora_alpha <= 0:
            yield f"`init_lora_weights`={start!r} needs a positive `lora_alpha`."
        if has_invocation and self.use_dora:
            yield "`alora_invocation_tokens` is not supported together with `use_dora`=True."
        if has_invocation and self.starts_from_weight:
            yield (
                f"`alora_invocation_tokens` is for adapters that leave the base weight as it is, "
                f"and `init_lora_weights`={start!r} changes it for other readers."
            )

    @classmethod
    def _upgrade(cls, content: JsonObject) -> JsonObject:
        """Check that a file has what its adapter started from."""
        check_readable(content)
        return content

    def as_loaded(self) -> LoraConfig:
        """Return the config of an adapter of its own rank, where a file has its start in it."""
        if not isinstance(self.start, dict):
            return self
        result = LoraConfig(**with_own_rank(self.to_dict()), runtime_config=self.runtime_config)
        if self.source is not None:
            result.source = self.source
        return result
