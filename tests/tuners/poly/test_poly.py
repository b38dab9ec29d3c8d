# SPDX-License-Identifier: Apache-2.0
"""Poly on models: task ids, generation, routing by input, merging a task, growing."""

import threading

import numpy
import pytest
import torch
from helpers.models import gpt2, llama, mlp, t5
from torch import nn
from torch.utils.checkpoint import checkpoint

from peft import PeftModel, PolyConfig, get_peft_model
from peft.tuners.poly.layer import Linear, PolyLayer

pytestmark = pytest.mark.quick
QV = ["q_proj", "v_proj"]


def config(**fields):
    return PolyConfig(**{"r": 2, "n_tasks": 3, "n_skills": 2, "init_weights": False, **fields})


def by_hand(layer, name, x, task):
    """`x·A_w·B_w / r` of one sample and task in float64, with a loop for every sum (methods:
    Polytropon, MHR).
    """
    A, B = layer.poly_lora_A[name].double(), layer.poly_lora_B[name].double()
    q, s, _, r = A.shape
    logits = layer.poly_router[name].module_logits.double()[task].view(q, s)
    left, right = [], []
    for split in range(q):
        gates = [1 / (1 + torch.exp(-logits[split, skill])) for skill in range(s)]
        weights = [gate / (sum(gates) + 1e-12) for gate in gates]
        left.append(sum(w * A[split, skill] for skill, w in enumerate(weights)))
        right.append(sum(w * B[split, skill] for skill, w in enumerate(weights)))
    return x.double() @ torch.cat(left, 0) @ torch.cat(right, 1) / r


@pytest.mark.parametrize("n_splits", [1, 4])
@pytest.mark.parametrize("leading", [(), (5,), (2, 3), (9, 2)])
def test_a_layer_against_the_formula(n_splits, leading):
    base = nn.Linear(8, 12)
    layer = Linear(base, "default", config(n_splits=n_splits)).eval()
    with torch.no_grad():
        layer.poly_router["default"].module_logits.normal_()
    x, tasks = torch.randn(4, *leading, 8), [2, 0, 1, 1]
    expected = torch.stack([by_hand(layer, "default", x[i], task) for i, task in enumerate(tasks)])
    torch.testing.assert_close(
        layer(x, task_ids=torch.tensor(tasks)) - base(x), expected.float(), atol=1e-5, rtol=1e-4
    )


def test_gradients_of_a_layer():
    layer = Linear(nn.Linear(4, 4).double(), "default", config(n_splits=2)).eval()
    inputs = (
        torch.randn(3, 2, 4, dtype=torch.double, requires_grad=True),
        *[p for p in layer.parameters() if p.requires_grad],
    )
    assert torch.autograd.gradcheck(lambda x, *_: layer(x, task_ids=[0, 2, 1]), inputs)


@pytest.mark.parametrize(("n_splits", "count"), [(1, 262_184), (4, 262_304)])
def test_the_documented_sizes(n_splits, count):
    with torch.device("meta"):
        base = nn.Sequential(nn.Linear(4096, 4096))
    model = get_peft_model(
        base, PolyConfig(r=8, n_tasks=10, n_skills=4, n_splits=n_splits, target_modules=["0"])
    )
    assert model.get_nb_trainable_parameters()[0] == count


def test_the_documented_gpt2_example():
    model = get_peft_model(
        gpt2(),
        PolyConfig(
            r=8,
            n_tasks=4,
            n_skills=8,
            n_splits=1,
            target_modules=["c_attn", "c_proj"],
            poly_type="poly",
        ),
    )
    names = [name for name, module in model.named_modules() if isinstance(module, PolyLayer)]
    assert len(names) == 2 * 3
    model(torch.randint(3, 48, (4, 5)), task_ids=torch.tensor([0, 3, 1, 2])).logits.sum().backward()
    assert "base_model.model.transformer.h.0.attn.c_attn.poly_router.default.module_logits" in dict(
        model.named_parameters()
    )


IDS = torch.tensor([2, 0, 1])
FORMS = [
    IDS,
    IDS[:, None],
    IDS.int(),
    IDS.to(torch.uint8),
    IDS.to(torch.uint16),
    [2, 0, 1],
    (2, 0, 1),
    IDS.numpy(),
    ["c", "a", "b"],
    numpy.array(["c", "a", "b"]),
]


@pytest.mark.parametrize(
    "form", FORMS, ids=lambda form: f"{type(form).__name__}-{getattr(form, 'dtype', '')}"
)
@pytest.mark.parametrize("task_type", [None, "CAUSAL_LM"])
def test_forms_of_task_ids(form, task_type):
    model = get_peft_model(
        llama(), config(target_modules=QV, task_names=["a", "b", "c"], task_type=task_type)
    ).eval()
    ids = torch.randint(3, 48, (3, 5))
    logits = model(input_ids=ids, task_ids=form).logits
    for i, task in enumerate([2, 0, 1]):
        torch.testing.assert_close(
            model(input_ids=ids[i : i + 1], task_ids=task).logits, logits[i : i + 1]
        )
    one = model(input_ids=ids, task_ids=torch.tensor([1])).logits
    torch.testing.assert_close(model(input_ids=ids, task_ids="b").logits, one)
    assert not torch.allclose(one, logits)


def test_a_model_with_task_ids_of_its_own_gets_them_too():
    class Biased(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.biases = nn.Linear(8, 8), nn.Embedding(3, 8)

        def forward(self, x, task_ids):
            return self.layer(x) + self.biases(task_ids)

    base, x = Biased(), torch.randn(3, 8)
    plain = base(x, IDS)
    model = get_peft_model(base, PolyConfig(n_tasks=3, target_modules=["layer"])).eval()
    torch.testing.assert_close(model(x, task_ids=IDS), plain)
    with model.disable_adapter():
        torch.testing.assert_close(model(x, task_ids=IDS), plain)


BAD_IDS = [
    (None, ValueError, "task_ids should not be None: the adapter has 3 tasks"),
    ([0, 1], ValueError, r"shape \[2\]; expected 3 ids"),
    ([[0, 1, 2]], ValueError, r"shape \[1, 3\]"),
    ([], ValueError, r"shape \[0\]; expected 3 ids"),
    ([0, 1, 3], ValueError, "Only 3 tasks available. Found task id = 3"),
    ([0, -1, 1], ValueError, "Found task id = -1"),
    (torch.tensor([0.0, 1.0, 2.0]), TypeError, "must be integers, not torch.float32"),
    (torch.tensor([True, False, True]), TypeError, "must be integers, not torch.bool"),
    ("nowhere", ValueError, "Unknown task names"),
    (torch.ones(3, dtype=torch.long, device="meta"), ValueError, "on the meta device"),
    (object(), TypeError, "must be integers"),
]


@pytest.mark.parametrize(
    ("task_ids", "error", "message"), BAD_IDS, ids=lambda value: str(value)[:20]
)
def test_bad_task_ids_are_refused_before_any_layer_runs(task_ids, error, message):
    base = mlp()
    calls = []
    base[0].register_forward_hook(lambda *_: calls.append(1))
    model = get_peft_model(base, config(target_modules=["0", "2"]))
    x = torch.randn(3, 8)
    with pytest.raises(error, match=message):
        model(x, task_ids=task_ids)
    assert not calls
    model(x, task_ids=[0, 1, 2])
    with model.disable_adapter():
        assert torch.equal(model(x, task_ids=[0, 1, 2]), model(x))


def test_a_forward_that_fails_leaves_nothing_behind():
    class Fragile(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second, self.broken = nn.Linear(8, 8), nn.Linear(8, 8), True

        def forward(self, x):
            x = self.first(x)
            if self.broken:
                raise RuntimeError("broken")
            return self.second(x)

    model = get_peft_model(Fragile(), config(target_modules=["first", "second"])).eval()
    x = torch.randn(2, 8)
    with pytest.raises(RuntimeError, match="broken"):
        model(x, task_ids=[0, 1])
    model.get_base_model().broken = False
    with pytest.raises(ValueError, match="should not be None"):
        model(x)
    torch.testing.assert_close(model(x, task_ids=[2, 2]), model(x, task_ids=2))


@pytest.mark.parametrize("mixed", [False, True])
def test_a_name_means_the_same_task_in_all_active_adapters(mixed):
    """Adapters that order their tasks differently do not share a call by names; once they agree,
    each adds the delta of its own task of that name, as a layer alone computes it.
    """
    fields = {"target_modules": ["0"], "n_tasks": 2}
    base = nn.Sequential(nn.Linear(8, 12))
    model = get_peft_model(base, config(task_names=["a", "b"], **fields), "p", mixed=mixed).eval()
    model.add_adapter("q", config(task_names=["b", "a"], **fields))
    model.add_adapter("unnamed", config(**fields))
    tuner, layer = model.base_model.method_of(model.peft_config["q"]), base[0]
    x = torch.randn(3, 8)
    with torch.no_grad():
        for name in "pq":
            layer.poly_router[name].module_logits.normal_()
    expected = layer.base_layer(x).double() + torch.stack(
        [
            by_hand(layer, "p", x[i], task) + by_hand(layer, "q", x[i], 1 - task)
            for i, task in enumerate([0, 1, 0])
        ]
    )
    model.set_adapter(["p", "q"])
    with pytest.raises(
        ValueError, match=r"'a' is task 0 of one active.*1 of another.*reorder_tasks"
    ):
        model(x, task_ids=["a", "b", "a"])
    if not mixed:
        with pytest.raises(ValueError, match="'a' is task 0 of one active"):
            model.fit_task("a", lambda: model(x, task_ids="a").sum(), adapter_name="q")
    model.set_adapter(["q", "unnamed"])
    with pytest.raises(ValueError, match="those of one active adapter are none, so use ids"):
        model(x, task_ids="a")
    model.set_adapter(["p", "q"])
    tuner.reorder_tasks(["a", "b"], adapter_name="q")
    torch.testing.assert_close(model(x, task_ids=["a", "b", "a"]), expected.float())


@pytest.mark.parametrize("name", ["task_id", "tasks"])
def test_a_call_that_misnames_its_task_ids_is_told_their_name(name):
    model = get_peft_model(mlp(), config(target_modules=["0"]))
    model.add_adapter("b", config(target_modules=["0"], n_tasks=2))
    message = f"The argument is called `task_ids`; this call has `{name}`"
    for more in ({}, {"adapter_names": ["default", "b"]}):
        with pytest.raises(ValueError, match=message):
            model(torch.randn(2, 8), **{name: 1}, **more)
    lm = get_peft_model(llama(), config(target_modules=QV, task_type="CAUSAL_LM"))
    for call in (lm, lm.generate):
        with pytest.raises(ValueError, match=message):
            call(input_ids=torch.tensor([[3, 4]]), **{name: 1})


def test_a_message_lists_the_first_of_many_tasks():
    names = [f"task{i}" for i in range(1000)]
    model = get_peft_model(mlp(), config(n_tasks=1000, task_names=names, target_modules=["0"]))
    with pytest.raises(
        ValueError, match="'task15'\\] and 984 more. Did you mean 'task777'"
    ) as error:
        model(torch.randn(2, 8), task_ids="Task_777")
    assert len(str(error.value)) < 400


def test_one_task_needs_no_ids():
    model = get_peft_model(mlp(), config(n_tasks=1, target_modules=["0"]))
    model(torch.randn(2, 8)).sum().backward()


def test_training_draws_for_every_sample():
    model = get_peft_model(mlp(), config(target_modules=["0", "2"])).train()
    x = torch.randn(1, 8).expand(4, -1)
    drawn = model(x, task_ids=1)
    assert len({tuple(row) for row in drawn.tolist()}) == 4
    model.eval()
    torch.testing.assert_close(model(x, task_ids=1), model(x, task_ids=1))


def test_two_threads_with_different_tasks():
    model = get_peft_model(llama(), config(target_modules=QV)).eval()
    ids = torch.randint(3, 48, (2, 5))
    with torch.no_grad():
        expected = [model(input_ids=ids, task_ids=task).logits for task in range(3)]
    wrong = []

    def work(task):
        with torch.no_grad():
            for _ in range(20):
                if not torch.allclose(model(input_ids=ids, task_ids=task).logits, expected[task]):
                    wrong.append(task)

    threads = [threading.Thread(target=work, args=(task,)) for task in range(3)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert not wrong


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoints_of_a_module_of_ones_own(reentrant):
    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = mlp()
            self.on = False

        def forward(self, x):
            return checkpoint(self.body, x, use_reentrant=reentrant) if self.on else self.body(x)

    model = get_peft_model(Checkpointed(), config(target_modules=["body.0", "body.2"])).train()
    x = torch.randn(3, 8, requires_grad=True)
    gradients = []
    for model.get_base_model().on in (False, True):
        torch.manual_seed(1)
        (model(x, task_ids=[0, 1, 2]) + 3 * model(x, task_ids=[2, 2, 0])).square().sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.requires_grad])
        model.zero_grad()
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(recomputed, plain)


@pytest.mark.compile
def test_out_of_range_ids_fail_in_a_compiled_model_too():
    model = get_peft_model(mlp(), config(target_modules=["0"])).eval()
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 8)
    torch.testing.assert_close(
        compiled(x, task_ids=torch.tensor([0, 2])), model(x, task_ids=[0, 2])
    )
    for bad in ([0, 3], [-1, 0]):
        with pytest.raises((RuntimeError, IndexError)):
            compiled(x, task_ids=torch.tensor(bad))


@pytest.mark.compile
def test_lists_of_task_ids_fit_batches_of_any_size_in_a_compiled_model():
    """The number of ids is a constant of the graph, that of samples a symbol."""
    model = get_peft_model(mlp(), config(target_modules=["0"])).eval()
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    for tasks in ([1, 0, 2, 1], [0, 1, 2], [2, 2]):
        x = torch.randn(len(tasks), 8)
        expected = [model(x[i : i + 1], task_ids=task) for i, task in enumerate(tasks)]
        torch.testing.assert_close(compiled(x, task_ids=tasks), torch.cat(expected))


# Merging and growing


def test_merging_one_task():
    model = get_peft_model(
        mlp(), config(n_splits=2, target_modules=["0", "2"], task_names=["a", "b", "c"])
    ).eval()
    x = torch.randn(4, 8)
    expected = model(x, task_ids=2)
    with pytest.raises(ValueError, match="Pass `task_id`: the adapter has 3 tasks"):
        model.merge_adapter()
    with pytest.raises(ValueError, match="Only 3 tasks available"):
        model.merge_adapter(task_id=3)
    model.merge_adapter(task_id="c")
    torch.testing.assert_close(model(x), expected, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(model(x, task_ids=[2] * 4), expected, atol=1e-5, rtol=1e-4)
    with pytest.raises(ValueError, match="Task 2 is merged"):
        model(x, task_ids=[2, 2, 0, 2])
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(
        compiled(x, task_ids=torch.tensor([2] * 4)), expected, atol=1e-5, rtol=1e-4
    )
    with pytest.raises(RuntimeError, match="Task 2 is merged"):
        compiled(x, task_ids=torch.tensor([2, 2, 0, 2]))
    model.unmerge_adapter()
    torch.testing.assert_close(model.merge_and_unload(task_id=2)(x), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("init", "expected"), [("mean", "mean"), ("uniform", "uniform"), (1, 1), ("b", 1)]
)
def test_adding_tasks(init, expected, tmp_path):
    model = get_peft_model(
        mlp(), config(n_splits=2, target_modules=["0", "2"], task_names=["a", "b", "c"])
    ).eval()
    with torch.no_grad():
        [p.normal_() for n, p in model.named_parameters() if "logits" in n]
    x = torch.randn(3, 8)
    before, weights = model(x, task_ids=[0, 1, 2]), model.get_router_weights()
    logits = {n: p.clone() for n, p in model.named_parameters() if "logits" in n}
    model.add_tasks(["d", "e"], init=init)
    assert all(torch.equal(p[:3], logits[n]) for n, p in model.named_parameters() if n in logits)
    torch.testing.assert_close(model(x, task_ids=["a", "b", "c"]), before)
    for name, table in model.get_router_weights().items():
        assert table.shape == (5, 2, 2)
        torch.testing.assert_close(table[:3], weights[name])
        torch.testing.assert_close(table.sum(-1), torch.ones(5, 2))
        if expected == 1:
            torch.testing.assert_close(table[3], table[1])
        elif expected == "uniform":
            torch.testing.assert_close(table[3], torch.full((2, 2), 0.5))
    if expected == "mean":
        for name, parameter in model.named_parameters():
            if name in logits:
                torch.testing.assert_close(parameter[4].sigmoid(), logits[name].sigmoid().mean(0))
    output = model(x, task_ids=["d", "e", "a"])
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(model.unload(), tmp_path)
    assert loaded.peft_config["default"].n_tasks == 5
    assert torch.equal(loaded(x, task_ids=["d", "e", "a"]), output)


@pytest.mark.parametrize("bad", [0, True, "d", ["a"], ["d", "d"], [1], 2])
def test_tasks_that_cannot_be_added(bad):
    model = get_peft_model(mlp(), config(target_modules=["0"], task_names=["a", "b", "c"]))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises((ValueError, TypeError)):
        model.add_tasks(bad)
    assert model.peft_config["default"].n_tasks == 3
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())


def test_progressive_training(tmp_path):
    model = get_peft_model(
        mlp(), config(n_skills=2, n_tasks=5, n_splits=2, target_modules=["0", "2"])
    ).eval()
    with torch.no_grad():
        [p.normal_() for n, p in model.named_parameters() if "logits" in n]
    x, tasks = torch.randn(5, 8), list(range(5))
    before = model(x, task_ids=tasks)
    with torch.inference_mode():  # parameters made here can be trained
        model.add_skills(2)
        model.add_tasks(5)
    torch.testing.assert_close(model(x, task_ids=tasks), before, atol=1e-5, rtol=1e-5)
    assert (model.peft_config["default"].n_skills, model.peft_config["default"].n_tasks) == (4, 10)
    model.train()
    model(x, task_ids=[0, 3, 6, 8, 9]).square().sum().backward()
    for layer in model.base_model.tuner_layers():
        for parameter in (layer.poly_lora_A["default"], layer.poly_lora_B["default"]):
            assert parameter.shape[1] == 4
            assert (parameter.grad.abs().sum((0, 2, 3)) > 0).all()
        assert (layer.poly_router["default"].module_logits.grad[:, :].abs().sum(0) > 0).all()
    model.eval().save_pretrained(tmp_path)
    grown = model(x, task_ids=[0, 3, 6, 8, 9])
    assert torch.equal(
        PeftModel.from_pretrained(model.unload(), tmp_path)(x, task_ids=[0, 3, 6, 8, 9]), grown
    )


# Routing by input


def mope(base, **fields):
    model = get_peft_model(base, config(poly_type="mope", n_tasks=1, n_skills=3, **fields)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "poly_router" in name:
                parameter.mul_(1000)  # so that what decides is seen
    return model


@pytest.mark.parametrize("level", ["sample", "token"])
@torch.no_grad()
def test_input_routing_of_a_causal_model(level, tmp_path):
    model = mope(llama(), target_modules=QV, routing_level=level)
    ids, padding = torch.randint(3, 48, (3, 6)), torch.zeros(3, 3, dtype=torch.long)
    ones = torch.ones_like(ids)
    logits = model(input_ids=ids).logits
    for i in range(3):  # no sample sees its neighbours
        torch.testing.assert_close(
            model(input_ids=ids[i : i + 1]).logits, logits[i : i + 1], atol=1e-5, rtol=1e-4
        )
    left = model(
        input_ids=torch.cat([padding, ids], 1), attention_mask=torch.cat([padding, ones], 1)
    ).logits[:, 3:]
    right = model(
        input_ids=torch.cat([ids, padding], 1), attention_mask=torch.cat([ones, padding], 1)
    ).logits[:, :6]
    torch.testing.assert_close(left, logits, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(right, logits, atol=1e-5, rtol=1e-4)
    # What comes after the prompt does not reach back.
    labels, later = ids.clone(), ids.clone()
    labels[:, :3] = -100
    later[:, 4:] = 7
    first = model(input_ids=ids, labels=labels).logits
    second = model(input_ids=later, labels=torch.where(labels == -100, labels, later)).logits
    torch.testing.assert_close(first[:, :4], second[:, :4])
    masked = model(input_ids=later, routing_mask=labels == -100).logits
    torch.testing.assert_close(masked, second)
    # Generation decides as training did, beams and padding or not.
    options = {"max_new_tokens": 4, "do_sample": False}
    written = model.generate(input_ids=ids[:, :3], **options)
    labels = written.clone()
    labels[:, :3] = -100
    assert torch.equal(
        model(input_ids=written, labels=labels).logits[:, 2:-1].argmax(-1), written[:, 3:]
    )
    padded = model.generate(input_ids=torch.cat([padding, ids[:, :3]], 1), **options)
    assert torch.equal(padded[:, 6:], written[:, 3:])
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(model.unload(), tmp_path)
    assert torch.equal(loaded(input_ids=ids).logits, logits)


@pytest.mark.parametrize("level", ["sample", "token"])
@torch.no_grad()
def test_input_routing_of_an_encoder_and_decoder(level):
    model = mope(t5(), target_modules=["q", "k", "v", "wi"], routing_level=level)
    ids = torch.randint(3, 48, (3, 5))
    written = model.generate(input_ids=ids, max_new_tokens=4, do_sample=False)
    forced = model(input_ids=ids, labels=written[:, 1:].contiguous()).logits.argmax(-1)
    assert torch.equal(forced, written[:, 1:])


def test_input_routing_trains_and_is_not_merged():
    model = mope(mlp(), target_modules=["0", "2"], n_splits=2).train()
    model(torch.randn(4, 8)).square().sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in model.parameters() if p.requires_grad)
    with pytest.raises(NotImplementedError, match="routes by input can't be merged"):
        model.merge_adapter()
    with pytest.raises(NotImplementedError, match="routes by input"):
        model.get_router_weights()


class Packed(nn.Linear):
    """A quantised linear layer: int8 values and a scale, in a shape of its own."""

    def __init__(self, linear):
        super().__init__(linear.in_features, linear.out_features)
        self.scale = linear.weight.detach().abs().max() / 127
        values = (linear.weight.detach() / self.scale).round().to(torch.int8)
        self.weight = nn.Parameter(values.view(-1, 1), requires_grad=False)
        self.bias = linear.bias

    def forward(self, x):
        return nn.functional.linear(
            x, self.weight.view(self.out_features, -1) * self.scale, self.bias
        )


def test_quantised_layers():
    base = nn.Sequential(Packed(nn.Linear(8, 8)), nn.ReLU(), Packed(nn.Linear(8, 4)))
    model = get_peft_model(base, config(target_modules="all-linear")).eval()
    x = torch.randn(3, 8)
    output = model(x, task_ids=[0, 1, 2])
    output.sum().backward()
    layer = model.base_model.model[0]
    torch.testing.assert_close(
        layer(x, task_ids=1) - layer.base_layer(x),
        by_hand(layer, "default", x, 1).float(),
        atol=1e-5,
        rtol=1e-4,
    )
    with pytest.raises(
        NotImplementedError, match="Packed keeps its weight in a quantized storage format"
    ):
        model.merge_adapter(task_id=0)
    assert torch.equal(model(x, task_ids=[0, 1, 2]), output)
