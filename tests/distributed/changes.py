# SPDX-License-Identifier: Apache-2.0
"""Changes of a model that an engine has sharded, beside the same changes of one that is whole."""

from contextlib import nullcontext

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

    def __init__(self, method):
        self.call, self.model = METHODS[method].call, two_adapters(method)
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        self.wrap()

    def wrap(self):
        self.outer = self.model
        self.optimiser = torch.optim.SGD(self.trained, lr=0.3, momentum=0.5)

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


class Fsdp2(Sharded):
    def wrap(self):
        from torch.distributed.fsdp import fully_shard

        self.outer = fully_shard(self.model)
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimiser = torch.optim.SGD(self.trained, lr=0.3, momentum=0.5)


class Fsdp1(Sharded):
    def wrap(self):
        from torch.distributed.fsdp import FullyShardedDataParallel

        self.outer = FullyShardedDataParallel(
            self.model, device_id=torch.device("cpu"), use_orig_params=True
        )
        self.trained = [p for p in self.outer.parameters() if p.requires_grad]
        self.optimiser = torch.optim.SGD(self.trained, lr=0.3, momentum=0.5)

    def gathered(self):
        return type(self.outer).summon_full_params(self.outer)


class Zero3(Sharded):
    """ZeRO-3 by its defaults, which leave a full copy of each small parameter after a forward."""

    def wrap(self):
        from jobs import with_deepspeed

        super().wrap()
        config = {
            "train_micro_batch_size_per_gpu": 2,
            "zero_optimization": {"stage": 3},
            "zero_allow_untested_optimizer": True,
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

    def state(self, name):
        with self.gathered():
            return super().state(name)


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
    """The engine puts the parameters back, where new ones would be lost."""
    subject.model.delete_adapter("other")
    if type(subject) is not Whole:
        with pytest.raises(peft.PeftError, match="other, which was deleted; choose another"):
            subject.model.add_adapter("other", config_of(method))


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
        for change in (merge, delete, bank, skills, load, swap, save, save_gathered)
    },
}


def changed(engine, method, change, folder, called=True, gather=False):
    """Change a sharded model and a whole one, after a call or before any, and train on; return the
    error, and what each of them gives.
    """
    if dist.get_rank() == 0:
        torch.manual_seed(5)
        base = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 4))
        get_peft_model(base, config_of(method)).save_pretrained(folder)
    dist.barrier()
    sharded, results, error = ENGINES[engine](method), [], ""
    for subject in (sharded, Whole(method)):
        found, is_whole = [], subject is not sharded
        if called:
            subject.step(0)
            found.append(subject.logits())
        if not error:
            try:
                with sharded.gathered() if gather and not is_whole else nullcontext():
                    found.append(CHANGES[change](subject, method, folder))
            except peft.PeftError as refused:
                error = str(refused)
        found.append(subject.logits())
        subject.step(1)
        found.append(subject.logits())
        found += [subject.state(name) for name in subject.model.peft_config]
        results.append([part for part in found if part is not None])
    return error, *results
