# SPDX-License-Identifier: Apache-2.0
"""What the processes of the pool do; each function is run by all of them at the same time."""

import functools
import os
from contextlib import nullcontext

import torch
import torch.distributed as dist
from helpers.methods import METHODS
from helpers.models import llama
from torch import nn

import peft
from peft import get_peft_model, get_peft_model_state_dict
from peft.utils.other import fsdp_auto_wrap_policy

TARGETS = ["q_proj", "v_proj", "down_proj"]
STEPS = 3


def adapted(method, seed=0, dtype=torch.float32, checkpointing=False, shard=None, **fields):
    """A small model with an adapter, the same for the same seed; `shard` is called with the base."""
    torch.manual_seed(0)
    base = llama().to(dtype)
    if shard is not None:
        shard(base)
    torch.manual_seed(1 + seed)
    config = METHODS[method].config(target_modules=TARGETS, task_type="CAUSAL_LM", **fields)
    model = get_peft_model(base, config).train()
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model


def batch(method, step, rank):
    """A process's part of a step's batch: two samples, with other tasks than the other process has."""
    generator = torch.Generator().manual_seed(100 * step + rank)
    ids = torch.randint(2, 48, (2, 7), generator=generator)
    call = (
        {"task_ids": torch.tensor([[0, 0], [1, 0]][rank])}
        if "task_ids" in METHODS[method].call
        else {}
    )
    return {"input_ids": ids, "labels": ids, **call}


def seed_draws(step, rank):
    """Seed what a process draws in a step (Poly's routing, dropout)."""
    torch.manual_seed(1000 * step + rank)


def optimiser_of(model, lr=0.5):
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=lr, momentum=0.5)


def train(model, method, optimiser, steps=range(STEPS), plain=None):
    """Train on this process's part of each batch; the mean loss of all processes in each step. With
    `plain`, the `PeftModel`, its base is asked in between, as trainers do for a reference.
    """
    losses = []
    for step in steps:
        if plain is not None:
            with plain.disable_adapter(), torch.no_grad():
                model(**batch(method, step, dist.get_rank()))
        seed_draws(step, dist.get_rank())
        optimiser.zero_grad()
        loss = model(**batch(method, step, dist.get_rank())).loss
        loss.backward()
        optimiser.step()
        total = loss.detach().clone()
        dist.all_reduce(total)
        losses.append(total.item() / dist.get_world_size())
    return losses


def reference(method, steps=STEPS, **fields):
    """The same training in one process: (losses, adapter, the base's weights)."""
    model = adapted(method, **fields)
    optimiser = optimiser_of(model)
    losses = []
    for step in range(steps):
        optimiser.zero_grad()
        total = 0.0
        for rank in range(2):
            seed_draws(step, rank)
            loss = model(**batch(method, step, rank)).loss / 2
            loss.backward()
            total += loss.item()
        optimiser.step()
        losses.append(total)
    frozen = {name: p.detach() for name, p in model.named_parameters() if not p.requires_grad}
    return (
        losses,
        {key: tensor.detach().clone() for key, tensor in get_peft_model_state_dict(model).items()},
        frozen,
    )


def ddp(method, ask_base=False, fields=None):
    model = adapted(
        method, seed=dist.get_rank(), **(fields or {})
    )  # rank 0's adapter is what counts
    wrapped = nn.parallel.DistributedDataParallel(model)
    losses = train(wrapped, method, optimiser_of(wrapped), plain=model if ask_base else None)
    grads = [name for name, p in model.named_parameters() if p.grad is not None]
    return losses, dict(get_peft_model_state_dict(wrapped)), grads


def whole(state):
    """Copies of a state's tensors, gathered where they are sharded."""
    return {
        key: (t.full_tensor() if hasattr(t, "full_tensor") else t).detach().clone()
        for key, t in state.items()
    }


def fsdp2_model(method, per_layer=True, seed=0, fields=None, **options):
    from torch.distributed.fsdp import fully_shard

    model = adapted(method, seed=seed, **(fields or {}))
    if per_layer:
        for layer in model.get_base_model().model.layers:
            fully_shard(layer, **options)
    return fully_shard(model, **options)


def fsdp2(method, ask_base=False, **options):
    model = fsdp2_model(method, **options)
    losses = train(model, method, optimiser_of(model), plain=model if ask_base else None)
    grads = [name for name, p in model.named_parameters() if p.grad is not None]
    return losses, whole(get_peft_model_state_dict(model)), grads


def fsdp1_model(method, policy=None, seed=0, fields=None, **options):
    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.distributed.fsdp.wrap import ModuleWrapPolicy
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer

    model = adapted(method, seed=seed, **(fields or {}))
    if policy == "layers":
        options["auto_wrap_policy"] = ModuleWrapPolicy({LlamaDecoderLayer})
    elif policy == "peft":
        options["auto_wrap_policy"] = fsdp_auto_wrap_policy(model)
    return FullyShardedDataParallel(
        model, device_id=torch.device("cpu"), **{"use_orig_params": True, **options}
    )


def fsdp1(method, ask_base=False, **options):
    model = fsdp1_model(method, **options)
    losses = train(model, method, optimiser_of(model), plain=model if ask_base else None)
    grads = [name for name, p in model.named_parameters() if p.grad is not None]
    return losses, whole(get_peft_model_state_dict(model)), grads


def roundtrip(engine, method, **options):
    """Read an adapter out of a sharded model and write it into another; what each step gave."""
    make = {"fsdp1": fsdp1_model, "fsdp2": fsdp2_model}[engine]
    first, second = make(method, **options), make(method, seed=5, **options)
    before = whole(get_peft_model_state_dict(second))
    state = get_peft_model_state_dict(first)
    if options.pop("gathered", True):
        state = whole(state)
    result = peft.set_peft_model_state_dict(second, state, adapter_name=second.active_adapter)
    after = whole(get_peft_model_state_dict(second))
    outputs = []
    for model in (first, second):
        seed_draws(0, 0)
        outputs.append(model(**batch(method, 0, 0)).logits.detach())
    return before, whole(state), after, result, outputs


def accelerate_fsdp(
    method, folder, version, kind, adapter_only=True, seed=0, fields=None, steps=2, **options
):
    """Train with accelerate's FSDP, save as it does, load into a fresh model, and go on; the same
    without the break.
    """
    from accelerate import Accelerator, FullyShardedDataParallelPlugin
    from accelerate.state import AcceleratorState, PartialState
    from accelerate.utils import DistributedType
    from accelerate.utils.fsdp_utils import (
        load_fsdp_model,
        load_fsdp_optimizer,
        save_fsdp_model,
        save_fsdp_optimizer,
    )

    AcceleratorState._reset_state(True)
    PartialState(cpu=True)
    # It offers FSDP on GPUs only, which have numbers.
    PartialState._shared_state.update(
        distributed_type=DistributedType.MULTI_GPU, device=torch.device("cpu")
    )
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=version,
        state_dict_type=kind,
        use_orig_params=True,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["LlamaDecoderLayer"],
        **options,
    )
    accelerator = Accelerator(cpu=True, fsdp_plugin=plugin)
    assert accelerator.distributed_type == DistributedType.FSDP

    def prepared(seed):
        model = adapted(method, seed=seed)
        trained = [p for p in model.parameters() if p.requires_grad]
        # Of FSDP1, accelerate reads a sharded optimiser state into a fresh optimiser as empty, and
        # torch on CPU gathers both of Adam's moments into the same memory, with any model: without
        # moments, what is resumed is the adapter.
        optimiser = (
            torch.optim.SGD(trained, lr=0.5)
            if version == 1
            else torch.optim.AdamW(trained, lr=0.01)
        )
        return accelerator.prepare(model, optimiser)

    try:
        model, optimiser = prepared(0)
        losses = train(model, method, optimiser, range(steps))
        save_fsdp_model(plugin, accelerator, model, folder, adapter_only=adapter_only)
        save_fsdp_optimizer(plugin, accelerator, optimiser, model, folder)
        losses += train(model, method, optimiser, range(steps, steps + 2))
        again, optimiser = prepared(5)
        load_fsdp_model(plugin, accelerator, again, folder, adapter_only=adapter_only)
        load_fsdp_optimizer(
            plugin, accelerator, optimiser, again, folder, adapter_only=adapter_only
        )
        resumed = train(again, method, optimiser, range(steps, steps + 2))
        return type(model).__name__, losses, resumed
    finally:
        AcceleratorState._reset_state(True)


def holders(method):
    """Train with a unit around each container of adapter parameters."""
    from torch.distributed.fsdp import fully_shard

    from peft.tuners.tuners_utils import AdapterParameterDict

    model = adapted(method)
    for module in list(model.modules()):
        if isinstance(module, AdapterParameterDict) and len(module):
            fully_shard(module)
    model = fully_shard(model)
    losses = train(model, method, optimiser_of(model))
    return losses, whole(get_peft_model_state_dict(model))


def merging(method, engine, **options):
    """Logits while an adapter is merged into a sharded model, and after, beside those before; and
    what refuses it.
    """
    make = {"fsdp1": fsdp1_model, "fsdp2": fsdp2_model}[engine]
    model = make(method, **options).eval()
    options = METHODS[method].merge
    data = batch(method, 0, 0)
    data.update({name: 1 for name in data if name == "task_ids"})

    def logits():
        with torch.no_grad():
            return model(**data).logits.clone()

    inside = (
        functools.partial(type(model).summon_full_params, model)
        if engine == "fsdp1"
        else nullcontext
    )
    outputs = [logits()]
    if engine == "fsdp1":
        try:
            model.merge_adapter(**options)
        except Exception as error:
            outputs.append(f"{type(error).__name__}: {error}")
    with inside():
        model.merge_adapter(safe_merge=True, **options)
    outputs.append(logits())
    with inside():
        model.unmerge_adapter()
    outputs.append(logits())
    with inside():
        model.merge_adapter(**options)
        context = model.disable_adapter()
        context.__enter__()
    outputs.append(logits())
    context.__exit__(None, None, None)
    outputs.append(logits())
    return outputs


def save_from_all(method, folder, times=20):
    """Every process saves into the same folder, as scripts do that do not ask which one they are."""
    model = adapted(method)
    for _ in range(times):
        dist.barrier()
        model.save_pretrained(folder)


def save_sharded(method, folder, topk=False):
    fields = {"save_only_topk_weights": True} if topk else {}
    model = fsdp2_model(method, fields=fields)
    model.save_pretrained(folder, is_main_process=dist.get_rank() == 0)
    dist.barrier()
    again = fsdp2_model(method, seed=5, fields=fields)
    again.load_adapter(folder, "default")
    return whole(get_peft_model_state_dict(again))


def with_adapters(names):
    """A model with more adapters, whose values depend on their names alone."""
    model = adapted("LORA")
    for name in names:
        torch.manual_seed(ord(name))
        model.add_adapter(name, METHODS["LORA"].config(target_modules=TARGETS))
    return model


def save_others(folder):
    """Save adapters that each process has loaded in another order, or of which it names another;
    and after a forward, which leaves parameters full for a while.
    """
    from torch.distributed.fsdp import fully_shard

    rank, messages = dist.get_rank(), []
    for names, selected in ((["pq", "qp"][rank], "p"), ("pq", "pq"[rank]), ("pq", "pq")):
        model = fully_shard(with_adapters(names))
        with torch.no_grad():
            model(**batch("LORA", 0, rank))
        try:
            model.save_pretrained(
                folder, is_main_process=rank == 0, selected_adapters=list(selected)
            )
        except peft.PeftError as error:
            messages.append(str(error))
    return messages


def dcp(method, folder, adapter_only):
    """Train, checkpoint in shards, and go on; in another model, load the shards and go on."""
    import torch.distributed.checkpoint as checkpoint
    from torch.distributed.checkpoint.state_dict import (
        StateDictOptions,
        get_state_dict,
        set_state_dict,
    )

    options = StateDictOptions(ignore_frozen_params=adapter_only, strict=not adapter_only)

    def adamw(model):
        return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)

    model = fsdp2_model(method)
    optimiser = adamw(model)
    train(model, method, optimiser, range(2))
    state, moments = get_state_dict(model, optimiser, options=options)
    checkpoint.save({"model": state, "optimiser": moments}, checkpoint_id=folder)
    losses = train(model, method, optimiser, range(2, 4))
    again = fsdp2_model(method, seed=5)
    optimiser = adamw(again)
    state, moments = get_state_dict(again, optimiser, options=options)
    checkpoint.load({"model": state, "optimiser": moments}, checkpoint_id=folder)
    set_state_dict(
        again, optimiser, model_state_dict=state, optim_state_dict=moments, options=options
    )
    return losses, train(again, method, optimiser, range(2, 4)), sorted(state)


def dcp_adapter(method, folder):
    """An adapter's own state dict in shards."""
    import torch.distributed.checkpoint as checkpoint

    model, again = fsdp2_model(method), fsdp2_model(method, seed=5)
    checkpoint.save(get_peft_model_state_dict(model), checkpoint_id=folder)
    state = get_peft_model_state_dict(again)
    checkpoint.load(state, checkpoint_id=folder)
    result = peft.set_peft_model_state_dict(again, state)
    return result, whole(get_peft_model_state_dict(model)), whole(get_peft_model_state_dict(again))


def gathered(method, folder):
    """Whole tensors on the first process, saved; and broadcast from there into another model."""
    from torch.distributed.checkpoint.state_dict import (
        StateDictOptions,
        get_model_state_dict,
        set_model_state_dict,
    )

    model, again = fsdp2_model(method), fsdp2_model(method, seed=5)
    state = get_model_state_dict(
        model, options=StateDictOptions(full_state_dict=True, cpu_offload=True)
    )
    if dist.get_rank() == 0:
        model.save_pretrained(folder, state_dict=state)
    dist.barrier()
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True, strict=False)
    set_model_state_dict(again, state, options=options)
    return len(state), whole(get_peft_model_state_dict(again))


def meta(method):
    """A model whose adapter has no memory until it is loaded, after sharding."""
    torch.manual_seed(0)
    base = llama()
    config = METHODS[method].config(target_modules=TARGETS, task_type="CAUSAL_LM")
    model = get_peft_model(base, config, low_cpu_mem_usage=True)
    from torch.distributed.fsdp import fully_shard

    for layer in model.get_base_model().model.layers:
        fully_shard(layer)
    fully_shard(model)
    state = {
        key: tensor.detach() for key, tensor in get_peft_model_state_dict(adapted(method)).items()
    }
    result = peft.set_peft_model_state_dict(model, state)
    losses = train(model.train(), method, optimiser_of(model))
    return result, losses


class Rows(torch.utils.data.Dataset):
    """The samples of all steps, in an order that gives each process what `batch` does."""

    def __init__(self, method, steps=STEPS):
        self.rows = [
            row
            for step in range(steps)
            for rank in range(2)
            for row in self.split(batch(method, step, rank))
        ]

    @staticmethod
    def split(data):
        return [{name: tensor[i] for name, tensor in data.items()} for i in range(2)]

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return self.rows[index]


def prepared(method):
    """Train what `Accelerator.prepare` makes of model, optimiser and data."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(True)
    try:
        accelerator = Accelerator(cpu=True)
        model = adapted(method, seed=dist.get_rank())
        loader = torch.utils.data.DataLoader(Rows(method), batch_size=2)
        model, optimiser, loader = accelerator.prepare(model, optimiser_of(model), loader)
        losses = []
        for step, data in enumerate(loader):
            seed_draws(step, dist.get_rank())
            optimiser.zero_grad()
            loss = model(**data).loss
            accelerator.backward(loss)
            optimiser.step()
            losses.append(accelerator.gather(loss.detach().reshape(1)).mean().item())
        plain = accelerator.unwrap_model(model)
        state = accelerator.get_state_dict(model)
        return (
            type(model).__name__,
            losses,
            dict(get_peft_model_state_dict(plain, state_dict=state)),
        )
    finally:
        AcceleratorState._reset_state(True)


def trainer(method, folder, fsdp=None):
    """Train with transformers' Trainer, and once more from a checkpoint."""
    from accelerate.state import AcceleratorState, PartialState
    from accelerate.utils import DistributedType
    from transformers import Trainer, TrainerCallback, TrainingArguments

    class Seed(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            seed_draws(state.global_step, dist.get_rank())

    def make(seed):
        model = adapted(method, seed=seed)
        arguments = TrainingArguments(
            folder,
            use_cpu=True,
            ddp_backend="gloo",
            per_device_train_batch_size=2,
            num_train_epochs=1,
            learning_rate=0.01,
            lr_scheduler_type="constant",
            max_grad_norm=0.0,
            save_steps=2,
            logging_steps=1,
            report_to=[],
            disable_tqdm=True,
            remove_unused_columns=False,
            label_names=["labels"],
            **({"fsdp": True, "fsdp_config": fsdp} if fsdp else {}),
        )
        if fsdp:
            PartialState._shared_state.update(
                distributed_type=DistributedType.MULTI_GPU, device=torch.device("cpu")
            )
        made = Trainer(model, arguments, train_dataset=Rows(method, 4), callbacks=[Seed()])
        made._get_train_sampler = lambda *args: torch.utils.data.SequentialSampler(
            made.train_dataset
        )
        return made

    def losses(made):
        return [entry["loss"] for entry in made.state.log_history if "loss" in entry]

    AcceleratorState._reset_state(True)
    try:
        first = make(0 if fsdp else dist.get_rank())
        first.train()
        first.save_model(f"{folder}/last")
        second = make(5)
        second.train(resume_from_checkpoint=f"{folder}/checkpoint-2")
        states = [whole(get_peft_model_state_dict(made.model_wrapped)) for made in (first, second)]
        return losses(first), losses(second), *states
    finally:
        AcceleratorState._reset_state(True)
        for name in list(os.environ):
            if "FSDP" in name:
                del os.environ[name]


def with_deepspeed():
    """DeepSpeed over torch's collectives: those of its own it would compile first, for as long as
    it takes on the machine at hand.
    """
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed("gloo", verbose=False)
    return deepspeed


def engine_of(model, stage):
    deepspeed = with_deepspeed()
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        "zero_allow_untested_optimizer": True,
    }
    trained = [p for p in model.parameters() if p.requires_grad]
    return deepspeed.initialize(
        model=model, model_parameters=trained, optimizer=optimiser_of(model), config=config
    )[0]


def train_engine(engine, method, steps=range(STEPS)):
    losses = []
    for step in steps:
        seed_draws(step, dist.get_rank())
        loss = engine(**batch(method, step, dist.get_rank())).loss
        engine.backward(loss)
        engine.step()
        total = loss.detach().clone()
        dist.all_reduce(total)
        losses.append(total.item() / dist.get_world_size())
    return losses


def zero_init(method):
    """Adapt a base model whose weights ZeRO-3 has distributed as they were made; merge while it
    gathers them.
    """
    deepspeed = with_deepspeed()
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
    }
    shard = functools.partial(deepspeed.zero.Init, config_dict_or_path=config, dtype=torch.float32)
    model = adapted(method, shard=shard, modules_to_save=["lm_head"])
    engine = engine_of(model, 3)
    losses = train_engine(engine, method)
    with deepspeed.zero.GatheredParameters(list(model.parameters())):
        state = {key: tensor.clone() for key, tensor in get_peft_model_state_dict(model).items()}
        model.merge_adapter(**METHODS[method].merge)
        weight = model.get_base_model().model.layers[0].self_attn.q_proj.get_base_layer().weight
        merged = weight.detach().clone()
        model.unmerge_adapter()
        plain = weight.detach().clone()
    return losses, state, merged, plain


def zero(method, stage, folder):
    """Train with ZeRO; read the adapter, save and load it in each way there is."""
    import deepspeed

    model = adapted(method)
    engine = engine_of(model, stage)
    losses = train_engine(engine, method)
    refused = []
    if stage == 3:
        for call in (
            lambda: get_peft_model_state_dict(model),
            lambda: model.save_pretrained(f"{folder}/never"),
            lambda: peft.set_peft_model_state_dict(model, {}),
            lambda: model.merge_adapter(**METHODS[method].merge),
        ):
            try:
                call()
            except peft.PeftError as error:
                refused.append(str(error))
    context = (
        deepspeed.zero.GatheredParameters(list(model.parameters()), modifier_rank=0)
        if stage == 3
        else nullcontext()
    )
    with context:
        state = {key: tensor.clone() for key, tensor in get_peft_model_state_dict(engine).items()}
        peft.set_peft_model_state_dict(model, {key: tensor + 1 for key, tensor in state.items()})
        peft.set_peft_model_state_dict(model, state)
    whole_model = (
        engine._zero3_consolidated_16bit_state_dict() if stage == 3 else engine.module_state_dict()
    )
    model.save_pretrained(folder, is_main_process=dist.get_rank() == 0, state_dict=whole_model)
    engine.save_checkpoint(f"{folder}/engine", exclude_frozen_parameters=True)
    losses += train_engine(engine, method, range(STEPS, STEPS + 2))
    again = engine_of(adapted(method, seed=5), stage)
    again.load_checkpoint(f"{folder}/engine", load_module_strict=False)
    resumed = train_engine(again, method, range(STEPS, STEPS + 2))
    return losses, state, refused, resumed


def generation(method):
    """What a sharded model and a plain one generate."""
    from torch.distributed.fsdp import register_fsdp_forward_method

    tokens = batch(method, 0, 0)
    tokens.pop("labels")
    options = {"max_new_tokens": 5, "do_sample": False}
    expected = adapted(method).eval().generate(**tokens, **options)
    model = fsdp2_model(method).eval()
    register_fsdp_forward_method(model, "generate")
    return expected, model.generate(**tokens, **options)


def native(method, engine):
    """Adapters in a model of another class than `PeftModel`."""
    from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

    def make(seed):
        torch.manual_seed(0)
        base = llama()
        torch.manual_seed(1 + seed)
        model = peft.inject_adapter_in_model(METHODS[method].config(target_modules=TARGETS), base)
        if engine == "ddp":
            return nn.parallel.DistributedDataParallel(model)
        return (
            fully_shard(model)
            if engine == "fsdp2"
            else FullyShardedDataParallel(
                model, device_id=torch.device("cpu"), use_orig_params=True
            )
        )

    model, again = make(0), make(5)
    state = whole(get_peft_model_state_dict(model))
    result = peft.set_peft_model_state_dict(again, state)
    return result, state, whole(get_peft_model_state_dict(again))


def misfit(method, engine):
    """A checkpoint that does not fit, and slices seen from inside."""
    make = {"fsdp1": functools.partial(fsdp1_model, policy="layers"), "fsdp2": fsdp2_model}[engine]
    model = make(method)
    state = whole(get_peft_model_state_dict(model))
    bad = dict(state)
    bad[next(iter(bad))] = torch.zeros(3, 5, 7)
    messages = []
    calls = [lambda: peft.set_peft_model_state_dict(model, bad)]
    if engine == "fsdp1":
        calls += [
            lambda: get_peft_model_state_dict(model.module),
            lambda: model.module.save_pretrained("never"),
        ]
        calls += [lambda: peft.set_peft_model_state_dict(model.module, state)]
    for call in calls:
        try:
            call()
        except peft.PeftError as error:
            messages.append(f"{type(error).__name__}: {error}")
    return messages, state, whole(get_peft_model_state_dict(model))


def traffic(method):
    """How many numbers data parallelism averages in a step, and how many parameters are trainable."""
    from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

    model = adapted(method)
    wrapped = nn.parallel.DistributedDataParallel(model)
    sizes = []

    def hook(state, bucket):
        sizes.append(bucket.buffer().numel())
        return allreduce_hook(None, bucket)

    wrapped.register_comm_hook(None, hook)
    train(wrapped, method, optimiser_of(wrapped), range(1))
    return sum(sizes), model.get_nb_trainable_parameters()[0]


def roles(method):
    """The names of the parameters in each role, under every engine; and what a flat parameter
    gives.
    """
    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.nn.parallel import DistributedDataParallel

    from peft.integrations.distributed import unwrapped_name
    from peft.optimizers import parameter_groups

    found = {}
    plain, ddp_model = adapted(method), DistributedDataParallel(adapted(method))
    models = {
        "one": plain,
        "ddp": ddp_model,
        "fsdp2": fsdp2_model(method),
        "fsdp1": fsdp1_model(method, policy="layers"),
    }
    for engine, model in models.items():
        names = {
            id(parameter): unwrapped_name(name) for name, parameter in model.named_parameters()
        }
        found[engine] = {}
        for group in parameter_groups(model, 0.3):
            found[engine].setdefault((group["name"], group["lr"]), []).extend(
                names[id(p)] for p in group["params"]
            )
    try:
        flat = FullyShardedDataParallel(
            adapted(method).requires_grad_(True),
            device_id=torch.device("cpu"),
            use_orig_params=False,
        )
        parameter_groups(flat)
    except RuntimeError as error:
        return found, str(error)
    return found, ""


def change(job, *args, **options):
    """Run a job of `changes`."""
    import changes

    return getattr(changes, job)(*args, **options)


def rows_of_tasks():
    """Poly with single rows open, sharded by FSDP2 and plain, on the same batches."""
    from torch.distributed.fsdp import fully_shard

    fields = {"relaxed_bernoulli": False, "task_rank": 1}
    states = []
    for sharded in (False, True):
        model = adapted("POLY", **fields)
        start = whole(get_peft_model_state_dict(model))
        model.train_only(tasks=[1])
        if sharded:
            for layer in model.get_base_model().model.layers:
                fully_shard(layer)
            fully_shard(model)
        optimiser = torch.optim.AdamW(
            [p for p in model.parameters() if p.requires_grad], lr=0.1, weight_decay=0.5
        )
        for step in range(STEPS):
            optimiser.zero_grad()
            model(**batch("POLY", step, 1)).loss.backward()
            optimiser.step()
        states.append(whole(get_peft_model_state_dict(model)))
    return start, *states


def experts(sharded):
    """Gradients and outputs of adapted experts in stacks, which are sharded by themselves too."""
    from helpers.experts import TARGETS, mixture, tokens
    from torch.distributed.fsdp import fully_shard

    base = mixture("mixtral", "grouped_mm", num_hidden_layers=1)
    config = peft.LoraConfig(target_parameters=TARGETS, target_modules=["q_proj"], r=2)
    config.init_lora_weights = False
    torch.manual_seed(1)
    model = get_peft_model(base, config)
    if sharded:
        for layer in model.get_base_model().model.layers:
            fully_shard(layer.mlp.experts)
            fully_shard(layer)
        fully_shard(model)
    logits = model(tokens()).logits
    logits.square().sum().backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return {"logits": logits.detach(), **whole(gradients)}


def principal_directions(sizes):
    """EVA of a layer whose inputs this process sees a part of; `sizes` are the parts of a batch."""
    torch.manual_seed(0)
    batches = torch.randn(3, sum(sizes), 8) * 0.6 ** torch.arange(8)
    parts = list(batches.split(sizes, dim=1))[dist.get_rank()] if dist.is_initialized() else batches
    config = peft.LoraConfig(
        r=2, init_lora_weights="eva", eva_config=peft.EvaConfig(rho=1), target_modules=["0"]
    )
    found = peft.get_eva_state_dict(
        nn.Sequential(nn.Linear(8, 4)),
        list(parts),
        config,
        forward_fn=lambda model, batch: model(batch),
        prepare_model_inputs_fn=None,
        prepare_layer_inputs_fn=None,
    )
    return found["0"]
