# SPDX-License-Identifier: Apache-2.0
"""Random orders of evaluating, training, switching, growing, merging, loading and deleting: after
each step a model gives what one gives that is loaded afresh from what it saves, and that has never
computed anything before.
"""

import copy
import os
import pickle
import warnings
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from helpers.methods import METHODS
from helpers.variants import Case
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import nn

from peft import PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.base.errors import (
    CheckpointError,
    PeftNotSupportedError,
    PeftRuntimeError,
    PeftValueError,
)
from peft.utils.hotswap import hotswap_adapter

NAMES = ["a", "b", "c"]
CASES = {
    **{name: Case(name) for name in METHODS},
    "VBLORA compact": Case("VBLORA", {"save_only_topk_weights": True, "output_gate": True}),
    "POLY one head": Case("POLY", {"n_splits": 1}),
    "POLY own skills": Case("POLY", {"task_rank": 1, "n_splits": 1}),
    "POLY one router": Case(
        "POLY", {"n_skills": 3, "eval_top_k": 2, "router_granularity": "model"}
    ),
}


class Base(nn.Sequential):
    """Two layers that start with the same numbers each time, and what `PeftModel.generate` asks
    for.
    """

    def __init__(self):
        super().__init__(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8))
        generator = torch.Generator().manual_seed(1)
        for p in self.parameters():
            p.data = torch.randn(p.shape, generator=generator) * 0.5
        self.eval()

    def generate(self, x, between, **kwargs):
        """Two forwards, between which something is done; the second one's output."""
        self(x, **kwargs)
        between()
        return self(x, **kwargs)


class Walk:
    """A model on its way, and the steps it can take. One that is impossible where it stands is
    passed over.

    Args:
        case: The method.
        folder: Where models are saved.
    """

    def __init__(self, case, folder):
        self.case, self.folder = case, folder
        self.by_task = bool(case.call(0))
        self.model = get_peft_model(Base(), case.config(), adapter_name="a").eval()
        self.model.add_adapter("b", case.config())
        self.model.save_pretrained(folder / "start")
        self.x = torch.randn(2, 8)

    # --- the two models that are compared
    # -----------------------------------------------------------------------------

    @property
    def active(self):
        return self.model.active_adapters[0]

    @property
    def merged(self):
        return bool(self.model.base_model.merged_adapters)

    def tasks(self):
        """The tasks that can be asked for now."""
        if self.merged:
            return [self.task_merged]
        return range(
            min(self.model.peft_config[name].n_tasks for name in self.model.active_adapters)
        )

    def outputs(self, run):
        """What a model gives for all tasks."""
        if not self.by_task:
            return run(self.x)
        return torch.cat(
            [run(self.x, task_ids=torch.full((len(self.x),), task)) for task in self.tasks()]
        )

    def fresh(self):
        """What a model gives that is loaded from what this one saves."""
        active, folder = self.model.active_adapters, self.folder / "now"
        self.model.save_pretrained(folder, selected_adapters=active)
        model = PeftModel.from_pretrained(Base(), folder / active[0], adapter_name=active[0])
        for name in active[1:]:
            model.load_adapter(folder / name, name)
        model.set_adapter(active)
        with torch.no_grad():
            return self.outputs(model.eval())

    def compare(self):
        with torch.no_grad():
            torch.testing.assert_close(self.outputs(self.model), self.fresh(), rtol=1e-4, atol=1e-5)

    def _has_rows(self):
        """Whether rows of a table are open, whose memory is the table's."""
        return any(".rows." in name for name, _ in self.model.named_parameters())

    def parameters(self):
        """The active adapters' parameters."""
        wanted = set(self.model.active_adapters)
        named = (
            (set(name.split(".")), p)
            for name, p in self.model.named_parameters()
            if ".rows." not in name
        )
        return [p for parts, p in named if p.is_floating_point() and parts & wanted]

    # --- steps of all methods
    # -----------------------------------------------------------------------------------------

    def evaluate_in_inference_mode(self):
        with torch.inference_mode():
            self.outputs(self.model)

    def evaluate_with_gradients(self):
        self.outputs(self.model)

    def evaluate_without_adapters(self):
        with self.model.disable_adapter(), torch.no_grad():
            self.outputs(self.model)

    def evaluate_by_sample(self):
        if not self.merged:
            names = [
                list(self.model.peft_config)[i % len(self.model.peft_config)]
                for i in range(len(self.x))
            ]
            with torch.no_grad():
                self.model(
                    self.x,
                    adapter_names=names,
                    **(
                        {"task_ids": torch.zeros(len(self.x), dtype=torch.long)}
                        if self.by_task
                        else {}
                    ),
                )

    def train(self):
        trained = [p for p in self.model.parameters() if p.requires_grad]
        if trained and not self.merged:
            optimizer = torch.optim.SGD(trained, lr=0.1)
            with suppress(PeftRuntimeError):  # what came from a compact file is not trained
                loss = self.outputs(self.model.train()).square().mean()
                if loss.requires_grad:
                    loss.backward()
            optimizer.step()
            self.model.eval()

    def _write(self, write):
        if not self.merged:
            for p in self.parameters():
                with torch.no_grad():
                    write(p, p.detach() * 0.75 + torch.linspace(0, 0.2, p.numel()).view_as(p))

    def write_in_place(self):
        self._write(lambda p, values: p.copy_(values))

    def write_past_torch(self):
        self._write(lambda p, values: p.data.copy_(values))

    def write_through_numpy(self):
        self._write(lambda p, values: p.detach().numpy().__setitem__(..., values.numpy()))

    def move_elsewhere(self):
        self._write(lambda p, values: None if self._has_rows() else setattr(p, "data", values))

    def swap_tensors(self):
        def swap(p, values):
            if not self._has_rows():
                torch.utils.swap_tensors(p, nn.Parameter(values, p.requires_grad))

        self._write(swap)

    def change_while_generating(self):
        """What trains is changed between two forwards of one call."""
        call = {"task_ids": self.tasks()[-1]} if self.by_task else {}

        def change():
            for p in self.model.parameters():
                if p.requires_grad:
                    p.mul_(0.75)

        if not self.merged:
            with torch.no_grad():
                output = self.model.generate(self.x, between=change, **call)
            torch.testing.assert_close(output, self.fresh()[-len(self.x) :], rtol=1e-4, atol=1e-5)

    def load_values(self):
        if not self.merged:
            state = get_peft_model_state_dict(self.model, adapter_name=self.active)
            state = {
                key: value * 0.5 if value.is_floating_point() else value
                for key, value in state.items()
            }
            set_peft_model_state_dict(self.model, state, adapter_name=self.active)

    def load_state_dict(self):
        if not self.merged:
            own = {id(p) for p in self.parameters()}
            names = {name for name, p in self.model.named_parameters() if id(p) in own}
            self.model.load_state_dict(
                {k: v * 0.5 if k in names else v for k, v in self.model.state_dict().items()}
            )

    def load_into_the_same_name(self):
        if not self.merged:
            with suppress(
                PeftValueError
            ):  # refused where it has been grown, or its routing is held
                self.model.load_adapter(self.folder / "start" / "b", self.active, is_trainable=True)

    def hotswap(self):
        if not self.merged:
            with suppress(CheckpointError):  # of other sizes than this one has grown to
                hotswap_adapter(self.model, str(self.folder / "start" / "a"), self.active)

    def switch(self):
        names = list(self.model.peft_config)
        self.model.set_adapter(names[(names.index(self.active) + 1) % len(names)])

    def activate_two(self):
        self.model.set_adapter(list(self.model.peft_config)[:2])

    def add(self):
        name = next((name for name in NAMES if name not in self.model.peft_config), None)
        if name is not None:
            self.model.add_adapter(name, self.case.config())

    def load_new(self):
        if "c" not in self.model.peft_config:
            self.model.load_adapter(self.folder / "start" / "b", "c")

    def delete(self):
        if not self.merged and len(self.model.peft_config) > 1:
            with warnings.catch_warnings(action="ignore"):
                self.model.delete_adapter(self.active)

    def add_anew(self):
        name = self.active
        if not self.merged and len(self.model.peft_config) > 1 and name in NAMES:
            self.delete()
            self.model.add_adapter(name, self.case.config())
            self.model.set_adapter(name)

    def merge(self):
        if not self.merged:
            self.task_merged = self.tasks()[-1] if self.by_task else None
            self.model.merge_adapter(**({"task_id": self.task_merged} if self.by_task else {}))

    def unmerge(self):
        if self.merged:
            self.model.unmerge_adapter()

    def copy(self):
        self.model = copy.deepcopy(self.model)

    def pickle(self):
        self.model = pickle.loads(pickle.dumps(self.model))

    def convert_and_back(self):
        if not self.merged:
            self.model.double()
            with torch.no_grad():
                self.outputs(lambda x, **kwargs: self.model(x.double(), **kwargs))
            self.model.float()


class PolyWalk(Walk):
    """The steps that Poly adds."""

    @property
    def config(self):
        return self.model.peft_config[self.active]

    def _alone(self, at_least=1):
        """Whether one adapter is active, not merged, and has as many tasks."""
        return (
            not self.merged
            and len(self.model.active_adapters) == 1
            and self.config.n_tasks >= at_least
        )

    def train_rows(self):
        if self._alone():
            self.model.train_only(tasks=[self.config.n_tasks - 1])
            self.train()

    def train_all_rows(self):
        if self._alone():
            self.model.train_only(tasks="all", skills=True)
            self.train()

    def fit(self):
        if self._alone(2):
            task = self.config.n_tasks - 1
            self.model.fit_task(
                task,
                lambda: self.model(self.x, task_ids=task).square().mean(),
                steps=2,
                init="best",
            )

    def regime_z(self):
        if self._alone():
            self.model.begin_regime("Z", tasks=[0])
            self.train()

    def regime_mu_z(self):
        if self._alone():
            self.model.begin_regime("mu-Z", tasks=[0])
            self.train()

    def regime_mu(self):
        if self._alone() and "c" not in self.model.peft_config:
            with suppress(PeftNotSupportedError):
                self.model.begin_regime("mu", new_adapter="c")

    def add_tasks(self):
        if self._alone():
            self.model.add_tasks(1)

    def remove_a_task(self):
        if self._alone(2):
            self.model.remove_tasks([0])

    def reorder_tasks(self):
        if self._alone(2):
            self.model.reorder_tasks(list(range(self.config.n_tasks))[::-1])

    def add_skills(self):
        if self._alone():
            with suppress(PeftNotSupportedError):  # where weights can't be shared out
                self.model.add_skills(1)

    def extract(self):
        if self._alone() and "c" not in self.model.peft_config:
            self.model.extract_tasks("c", [0])

    def set_router_weights(self):
        if self._alone():
            self.model.set_router_weights(torch.rand(self.config.n_tasks, self.config.n_skills))


def steps_of(kind):
    """The names of the steps."""
    return [name for name in dir(kind) if name[0] != "_" and name not in NO_STEPS]


NO_STEPS = ("active", "merged", "tasks", "config", "outputs", "fresh", "compare", "parameters")


@pytest.fixture(autouse=True, scope="module")
def _no_waiting_for_disks():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda file: None)
        yield


@pytest.mark.parametrize("name", sorted(CASES))
@settings(
    max_examples=8,
    deadline=None,
    derandomize=True,
    database=None,
    phases=[Phase.generate, Phase.shrink],
)
@given(data=st.data())
def test_any_order(name, data):
    torch.manual_seed(0)
    kind = PolyWalk if CASES[name].method == "POLY" else Walk
    with TemporaryDirectory() as folder, warnings.catch_warnings(action="ignore"):
        model = kind(CASES[name], Path(folder))
        for step in data.draw(st.lists(st.sampled_from(steps_of(kind)), min_size=4, max_size=12)):
            model.compare()
            getattr(model, step)()
        model.compare()
