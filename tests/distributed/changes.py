# SPDX-License-Identifier: Apache-2.0
"""Changes of a model that an engine has sharded, beside the same changes of one that is whole."""

import warnings
from contextlib import nullcontext
from typing import ClassVar

import pytest
import torch
import torch.distributed as dist
from helpers.methods import METHODS
from torch import nn

import peft
from peft import get_peft_model, get_peft_model_state_dict
from peft.utils import load_peft_weights
from peft.utils.hotswap import hotswap_adapter


def two_adapters(method):
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 4))
    config = METHODS[method].config(target_modules=["0", "2"])
    model = get_peft_model(base, config).train()
    model.add_adapter("other", config)
    return model


def inputs(step, rank):
    return torch.randn(2, 8, generator=torch.Generator().manual_seed(10 * step + rank))


class Whole:
    """A model in one process, which sees the batches of all."""

    def __init__(self, method, momentum=0.5):
        self.call, self.model, self.momentum = METHODS[method].call, two_adapters(method), momentum
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        self.wrap()

    def wrap(self):
        self.outer = self.model
        self.optimiser = torch.optim.SGD(self.trained, lr=0.3, momentum=self.momentum)

    def logits(self):
        self.model.eval()
        with torch.no_grad():
            found = self.outer(inputs(9, 0), **self.call).clone()
        self.model.train()
        return found

    def step(self, number):
        for rank in range(2):
            torch.manual_seed(number + rank)
            (self.outer(inputs(number, rank), **self.call).square().mean() / 2).backward()
        self.optimiser.step()
        self.optimiser.zero_grad()

    def state(self, name):
        found = get_peft_model_state_dict(self.outer, adapter_name=name).items()
        return {k: (t.full_tensor() if hasattr(t, "full_tensor") else t).clone() for k, t in found}


class Sharded(Whole):
    """A model that is spread over the processes, each of which sees its own batches."""

    def step(self, number):
        torch.manual_seed(number + dist.get_rank())
        self.backward(self.outer(inputs(number, dist.get_rank()), **self.call).square().mean())

    def backward(self, loss):
        loss.backward()
        self.optimiser.step()
        self.optimiser.zero_grad()

    def after_gathering(self):
        """What an engine needs after its parameters were changed while they were gathered."""


class Fsdp2(Sharded):
    def wrap(self):
        from torch.distributed.fsdp import fully_shard

        self.outer = fully_shard(self.model)
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimiser = torch.optim.SGD(self.trained, lr=0.3, momentum=self.momentum)


class Fsdp1(Sharded):
    def wrap(self):
        from torch.distributed.fsdp import FullyShardedDataParallel

        self.outer = FullyShardedDataParallel(
            self.model, device_id=torch.device("cpu"), use_orig_params=True
        )
        self.trained = [p for p in self.outer.parameters() if p.requires_grad]
        self.optimiser = torch.optim.SGD(self.trained, lr=0.3, momentum=self.momentum)

    def gathered(self):
        return type(self.outer).summon_full_params(self.outer)


class Zero3(Sharded):
    """ZeRO-3 by its defaults, which leave a full copy of each small parameter after a forward."""

    fields: ClassVar = {}

    def wrap(self):
        from jobs import with_deepspeed

        super().wrap()
        config = {
            "train_micro_batch_size_per_gpu": 2,
            "zero_optimization": {"stage": 3},
            "zero_allow_untested_optimizer": True,
            "gradient_clipping": 0.0,
            **self.fields,
        }
        self.outer = with_deepspeed().initialize(
            model=self.model,
            model_parameters=self.trained,
            optimizer=self.optimiser,
            config=config,
        )[0]

    def backward(self, loss):
        self.outer.backward(loss)
        self.outer.step()

    def gathered(self):
        import deepspeed

        return deepspeed.zero.GatheredParameters(list(self.model.parameters()), modifier_rank=0)

    def after_gathering(self):
        self.outer.optimizer.refresh_fp32_params()

    def state(self, name):
        with self.gathered():
            return super().state(name)


class HalfZero3(Zero3):
    """ZeRO-3 in 16 bits, whose optimizer has copies of the parameters in 32."""

    fields: ClassVar = {"bf16": {"enabled": True}}


ENGINES = {"fsdp2": Fsdp2, "fsdp1": Fsdp1, "zero3": Zero3}


def config_of(method):
    return METHODS[method].config(target_modules=["0", "2"])


def merge(subject, method, folder):
    """A state dict makes FSDP2 take back what the forward left."""
    subject.model.merge_adapter(**METHODS[method].merge)
    subject.model.state_dict()
    merged = subject.logits()
    subject.model.unmerge_adapter()
    return merged


def delete(subject, method, folder):
    """FSDP puts the parameters back, where new ones would be lost."""
    subject.model.delete_adapter("other")
    if isinstance(subject, Fsdp1 | Fsdp2):
        with pytest.raises(peft.PeftError, match="other, which was deleted; choose another"):
            subject.model.add_adapter("other", config_of(method))


def add(subject, method, folder):
    subject.model.add_adapter("new", config_of(method))


def mix(subject, method, folder):
    """An adapter for each sample, scaled, while the other is frozen."""
    subject.model.base_model.model[0].set_scale("default", 0.5)
    subject.model.set_requires_grad("other", False)
    with torch.no_grad():
        names = ["other", "default"]
        mixed = subject.outer(inputs(9, 0), adapter_names=names, **subject.call).clone()
    with subject.model.disable_adapter():
        return mixed, subject.logits()


def delta(subject, method, folder):
    layer = subject.model.base_model.model[0]
    return layer.get_delta_weight("default").detach().clone()


def combine(subject, method, folder):
    names = ["default", "other"]
    subject.model.add_weighted_adapter(names, [0.5, 1.0], "sum", combination_type="cat")


def tasks(subject, method, folder):
    subject.model.add_tasks(["more"])


def bank(subject, method, folder):
    vectors = torch.randn(12, 4, generator=torch.Generator().manual_seed(0))
    peft.VectorBank(vectors).put_into(subject.model)


def skills(subject, method, folder):
    weights = subject.model.get_router_weights()
    subject.model.set_router_weights({path: torch.ones_like(w) for path, w in weights.items()})


def load(subject, method, folder):
    subject.model.load_adapter(folder, "default")


def swap(subject, method, folder):
    hotswap_adapter(subject.outer, folder, "default")


def save(subject, method, folder):
    subject.model.save_pretrained(f"{folder}/new", is_main_process=dist.get_rank() == 0)


def save_gathered(subject, method, folder):
    is_main = dist.get_rank() == 0
    state = subject.outer.state_dict()
    place = f"{folder}/{type(subject).__name__}"
    subject.model.save_pretrained(place, is_main_process=is_main, state_dict=state)
    dist.barrier()
    return dict(load_peft_weights(place))


CHANGES = {
    "clip": lambda subject, method, folder: subject.model.clip_weight_norms(0.3),
    "switch": lambda subject, method, folder: subject.model.set_adapter("other"),
    "convert": lambda subject, method, folder: dict(
        peft.convert_to_lora(subject.model, 2).state_dict
    ),
    **{
        change.__name__: change
        for change in (
            *(merge, delete, add, mix, delta, combine, bank, skills, tasks),
            *(load, swap, save, save_gathered),
        )
    },
}


def changed(engine, method, change, folder, called=True, gather=False, momentum=0.5):
    """Change a sharded model and a whole one, after a call or before any, and train on; return the
    error, and what each of them gives.
    """
    if dist.get_rank() == 0:
        torch.manual_seed(5)
        base = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 4))
        get_peft_model(base, config_of(method)).save_pretrained(folder)
    dist.barrier()
    sharded, results, error = ENGINES[engine](method, momentum), [], ""
    for subject in (sharded, Whole(method, momentum)):
        found, is_whole = [], subject is not sharded
        if called:
            subject.step(0)
            found.append(subject.logits())
        if not error:
            try:
                with sharded.gathered() if gather and not is_whole else nullcontext():
                    found.append(CHANGES[change](subject, method, folder))
                if gather and not is_whole:
                    sharded.after_gathering()
            except peft.PeftError as refused:
                error = str(refused)
        found.append(subject.logits())
        subject.step(1)
        found.append(subject.logits())
        found += [subject.state(name) for name in subject.model.peft_config]
        results.append([part for part in found if part is not None])
    return error, *results


def loaded_in_half(folder):
    """How far parameters are from their values in a file that a model in 16 bits loads: before,
    after the load, and after a small step; with a refresh of the optimizer and without.
    """
    if dist.get_rank() == 0:
        torch.manual_seed(5)
        base = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 4))
        get_peft_model(base, config_of("LOKR")).save_pretrained(folder)
    dist.barrier()
    wanted, results = load_peft_weights(folder), []
    for refreshes in (True, False):
        subject, gaps = HalfZero3("LOKR"), []

        def note(subject=subject, gaps=gaps):
            state = subject.state("default")
            gaps.append(max(float((state[k].float() - wanted[k]).abs().max()) for k in wanted))

        note()
        with subject.gathered():
            load(subject, "LOKR", folder)
        if refreshes:
            subject.after_gathering()
        note()
        x = inputs(0, dist.get_rank()).bfloat16()
        subject.backward(subject.outer(x).square().mean() * 1e-3)
        note()
        results.append(gaps)
    return results


def status_of(engine):
    """The status of a sharded model and of a whole one, and what counting from inside warns of."""
    sharded, whole = ENGINES[engine]("LOKR"), Whole("LOKR")
    found = []
    for subject in (sharded, whole):
        subject.step(0)
        outer = subject.outer
        found.append((peft.get_model_status(outer), list(peft.get_layer_status(outer))))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        sharded.model.get_nb_trainable_parameters()
    return *found, [str(warning.message) for warning in caught]


def started_late():
    """The error of EVA in a sharded model, and whether anything changed."""
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 4))
    options = peft.EvaConfig(rho=1)
    config = peft.LoraConfig(r=2, target_modules=["0"], init_lora_weights="eva", eva_config=options)
    model = fully_shard(get_peft_model(base, config))
    model(inputs(0, 0))
    before = {n: p.full_tensor().clone() for n, p in model.state_dict().items()}
    try:
        peft.initialize_lora_eva_weights(model, eva_state_dict={"0": torch.eye(8)[:3]})
    except peft.PeftError as error:
        same = all(torch.equal(p.full_tensor(), before[n]) for n, p in model.state_dict().items())
        return str(error), same
    return "", False


def fleet(engine, folder):
    """The outputs of a fleet over a sharded base model and over a whole one."""
    from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

    def base():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 4))

    if dist.get_rank() == 0:
        for i, name in enumerate("abc"):
            torch.manual_seed(i)
            get_peft_model(base(), config_of("LOKR")).save_pretrained(f"{folder}/{name}")
        peft.AdapterLibrary(folder)
    dist.barrier()
    library, outputs = peft.AdapterLibrary(folder), []
    for is_sharded in (True, False):
        model = base().eval()
        if is_sharded and engine == "fsdp2":
            model = fully_shard(model)
        elif is_sharded:
            device = torch.device("cpu")
            model = FullyShardedDataParallel(model, device_id=device, use_orig_params=True)
        served, found = peft.AdapterFleet(model, library, max_adapters=2), []
        for names in (["a", "b"], ["c", "__base__"], ["a", "c"], ["b", "b"]):
            with served.using(names) as there, torch.no_grad():
                found.append(served.model(inputs(9, 0), adapter_names=there).clone())
        served.activate("a")
        with torch.no_grad():
            found.append(served.model(inputs(9, 0)).clone())
        outputs.append((found, sorted(served.status().sizes)))
    return outputs
