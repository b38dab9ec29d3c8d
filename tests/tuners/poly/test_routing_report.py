# SPDX-License-Identifier: Apache-2.0
"""Measures, terms for the loss, the report and the callback, against loops over numbers."""

import itertools
import json
import math
import sys

import pytest
import torch
from helpers.models import mlp
from helpers.poly import task_routers
from transformers import EvalPrediction

from peft import PolyConfig, get_peft_model
from peft.ops.clustering import linkage
from peft.tuners.poly import (
    RoutingWatch,
    TaskSampler,
    metrics_by_task,
    recorded_routing,
    routing_callback,
    routing_loss,
    routing_report,
)
from peft.tuners.poly.analysis import metrics

TARGETS = ["0", "2"]


def poly(**fields):
    options = {
        "r": 2,
        "n_tasks": 5,
        "n_skills": 3,
        "n_splits": 2,
        "init_weights": False,
        "target_modules": TARGETS,
        **fields,
    }
    model = get_peft_model(mlp(), PolyConfig(**options)).eval()
    with torch.no_grad():
        [p.normal_().mul_(2) for n, p in model.named_parameters() if "router" in n]
    return model


def test_measures_one_number_at_a_time():
    gates = torch.rand(4, 2, 3, dtype=torch.float64)
    weights = gates / gates.sum(-1, keepdim=True)
    flat = [float(g) for g in gates.flatten()]
    bits = [-(g * math.log2(g) + (1 - g) * math.log2(1 - g)) for g in flat]
    assert math.isclose(float(metrics.discreteness(gates)), sum(bits) / 24, rel_tol=1e-12)
    assert math.isclose(float(metrics.sparsity(gates)), sum(g > 0.5 for g in flat) / 24)
    use = [sum(float(weights[t, q, s]) for t in range(4) for q in range(2)) / 8 for s in range(3)]
    torch.testing.assert_close(metrics.usage(weights).tolist(), use)
    for t, q in itertools.product(range(4), range(2)):
        expected = -sum(float(w) * math.log(float(w)) for w in weights[t, q]) / math.log(3)
        assert math.isclose(float(metrics.entropy(weights)[t, q]), expected, rel_tol=1e-12)
    uneven = []
    for q in range(2):
        u = [sum(float(weights[t, q, s]) for t in range(4)) / 4 for s in range(3)]
        mean = sum(u) / 3
        uneven.append(
            sum((v - mean) ** 2 for v in u) / 3 / mean**2
        )  # squared coefficient of variation
    assert math.isclose(float(metrics.balance(weights)), sum(uneven) / 2, rel_tol=1e-9)
    one = torch.zeros(4, 2, 3)
    one[..., 1] = 1
    assert (
        float(metrics.balance(one)) == 2
        and float(metrics.entropy(one).max()) == float(metrics.discreteness(one)) == 0
    )


def test_terms_are_means_over_routers_and_have_gradients():
    model = poly()
    weights = list(model.get_router_weights().values())
    torch.testing.assert_close(
        routing_loss(model, entropy=0.5),
        0.5 * torch.stack([metrics.entropy(w).mean() for w in weights]).mean(),
    )
    torch.testing.assert_close(
        routing_loss(model, balance=2.0),
        2 * torch.stack([metrics.balance(w) for w in weights]).mean(),
    )
    before = float(routing_loss(model, entropy=1.0).detach())
    optimizer = torch.optim.Adam([p for n, p in model.named_parameters() if "router" in n], lr=0.1)
    for _ in range(60):
        optimizer.zero_grad()
        routing_loss(model, entropy=1.0, balance=1.0).backward()
        optimizer.step()
    assert float(routing_loss(model, entropy=1.0).detach()) < before / 2
    model.train_only(tasks=[1])
    optimizer.zero_grad()
    routing_loss(model, entropy=1.0).backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("level", ["sample", "token"])
def test_terms_on_routing_by_input(level):
    model = poly(poly_type="mope", routing_level=level, n_tasks=1)
    x = torch.randn(4, 5, 8)
    with pytest.raises(ValueError, match="pass the weights of `recorded_routing`"):
        routing_loss(model, balance=1.0)
    with recorded_routing(model) as record:
        model(x).sum().backward()
    assert len(record) == 2
    shape = (4, 2, 3) if level == "sample" else (4, 5, 2, 3)
    assert all(weights.shape == shape for (weights,) in record.values())
    with recorded_routing(model) as record:
        loss = model(x).square().mean()
    model.zero_grad()
    (loss * 0 + routing_loss(model, balance=1.0, entropy=0.1, record=record)).backward()
    assert all(p.grad.abs().sum() > 0 for n, p in model.named_parameters() if "router" in n)
    assert not any(
        module._forward_hooks
        for module in model.modules()
        if type(module).__name__ == "InputRouter"
    )
    with pytest.raises(ValueError, match="no adapter 'other' of Poly"):
        routing_loss(model, adapter_name="other")


@pytest.mark.parametrize(
    ("argument", "reason"),
    [("ibp", "no argument `ibp`.* Indian buffet process was removed"), ("entropi", r"in use\)\.$")],
)
def test_terms_that_are_not_offered(argument, reason):
    with pytest.raises(TypeError, match=reason):
        routing_loss(poly(), **{argument: 1.0})


def test_the_only_adapter_is_looked_at():
    config = {"n_tasks": 3, "n_skills": 2, "target_modules": TARGETS}
    model = get_peft_model(mlp(), PolyConfig(**config), "a")
    model.add_adapter("b", PolyConfig(**config))
    with torch.no_grad():
        [p.normal_() for n, p in model.named_parameters() if "router" in n]
    uses = (routing_report, routing_loss, lambda model: RoutingWatch().look(model, 1))
    for active in ("a", "b"):
        model.set_adapter(active)
        assert torch.equal(
            routing_report(model).similarity, routing_report(model, active).similarity
        )
        assert routing_loss(model, entropy=1.0) == routing_loss(
            model, entropy=1.0, adapter_name=active
        )
        assert RoutingWatch().look(model, 1) == RoutingWatch(active).look(model, 1)
    model.base_model.set_adapter(["a", "b"])
    for use in uses:
        with pytest.raises(
            ValueError, match="no adapter 'default' of Poly, and several could be meant.* a, b"
        ):
            use(model)
    by_input = get_peft_model(
        mlp(), PolyConfig(n_skills=2, poly_type="mope", target_modules=TARGETS)
    )
    with pytest.raises(ValueError, match="Adapter default routes by input .*`recorded_routing`"):
        routing_report(by_input)


def test_the_tree_joins_the_clusters_with_the_least_mean_distance():
    rows = torch.randn(12, 7, dtype=torch.float64)
    similarity = metrics.task_similarity(rows)
    torch.testing.assert_close(similarity, _cosines(rows))
    merges, order = linkage(similarity)
    clusters = {task: [task] for task in range(12)}

    def distance(a, b):
        pairs = list(itertools.product(clusters[a], clusters[b]))
        return sum(1 - float(similarity[pair]) for pair in pairs) / len(pairs)

    for step, (left, right, least, size) in enumerate(merges):
        assert math.isclose(least, distance(left, right), rel_tol=1e-9)
        assert all(distance(*pair) >= least - 1e-9 for pair in itertools.combinations(clusters, 2))
        clusters[12 + step] = clusters.pop(left) + clusters.pop(right)
        assert len(clusters[12 + step]) == size
    assert list(clusters.values()) == [order]
    assert linkage(torch.ones(1, 1)) == ([], [0])
    assert sorted(linkage(torch.full((3, 3), torch.nan))[1]) == [0, 1, 2]


def test_without_scipy_tasks_are_in_their_own_order(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "scipy", None)
    monkeypatch.setattr("peft.ops.clustering.find_spec", lambda name: None)
    report = routing_report(poly())
    assert report.order == list(range(5)) and report.merges == []
    assert report.plot(tmp_path / "routing.png").axes and "task_4" in str(report)


def _cosines(rows):
    centred = rows - rows.mean(0)
    return torch.stack(
        [torch.stack([a @ b / (a.norm() * b.norm()) for b in centred]) for a in centred]
    )


@pytest.fixture(scope="module")
def reported():
    """A model whose first and fourth task route nearly alike, and its report."""
    torch.manual_seed(0)
    model = poly(task_names=["a", "b", "c", "d", "e"])
    with torch.no_grad():
        for router in task_routers(model).values():
            router.module_logits[3] = router.module_logits[0] + 0.01
    return model, routing_report(model)


def test_a_report_has_each_layers_weights_and_measures(reported):
    model, report = reported
    assert report.tasks == ["a", "b", "c", "d", "e"] and list(report.weights) == ["0", "2"]
    for path, table in report.weights.items():
        torch.testing.assert_close(table, model.get_router_weights()[path])
        torch.testing.assert_close(sum(report.layers[path]["usage"]), 1.0)
        assert math.isclose(
            report.layers[path]["entropy"], float(metrics.entropy(table).mean()), rel_tol=1e-5
        )
    with pytest.raises(ValueError, match="no adapter 'x' of Poly"):
        routing_report(model, "x")


def test_a_report_joins_tasks_that_route_alike(reported):
    _, report = reported
    assert (
        report.merges[0][:2] == (0, 3) and abs(report.order.index(0) - report.order.index(3)) == 1
    )
    assert float(report.similarity[0, 3]) > 0.99


def test_a_report_as_frames(reported):
    _, report = reported
    frames = report.to_pandas()
    assert len(frames["weights"]) == 2 * 5 * 2 * 3 and list(frames["layers"].index) == ["0", "2"]
    row = frames["weights"].query("layer == '2' and task == 'c' and split == 1 and skill == 2")
    assert math.isclose(row["weight"].item(), float(report.weights["2"][2, 1, 2]))
    assert list(frames["similarity"].columns) == [report.tasks[i] for i in report.order]
    assert frames["usage"].shape == (2, 3)


def test_a_report_as_a_file_and_as_a_figure(reported, tmp_path):
    _, report = reported
    report.save_json(tmp_path / "routing.json")
    saved = json.loads((tmp_path / "routing.json").read_text())
    assert saved["order"] == report.order and len(saved["weights"]["0"]) == 5
    figure = report.plot(tmp_path / "routing.png")
    assert (tmp_path / "routing.png").read_bytes().startswith(b"\x89PNG") and len(figure.axes) == 5


def test_a_report_of_one_task_and_one_router():
    shared = routing_report(poly(router_granularity="model", n_tasks=1))
    assert list(shared.weights) == ["0"] and shared.merges == [] and shared.plot().axes


def test_printing_a_report_gives_short_tables():
    report = routing_report(poly(task_names=["a", "b", "c", "d", "e"]))
    assert repr(report) == "RoutingReport(5 tasks, 2 layers)"
    head, *tasks = str(report).split("\n\n")[1].split("\n")
    assert head.split() == ["task", "most", "alike", "cosine"] and [
        line.split()[0] for line in tasks
    ] == [report.tasks[i] for i in report.order]
    for line in tasks:
        task, alike, cosine = line.split()
        others = {
            name: float(report.similarity[report.tasks.index(task), i])
            for i, name in enumerate(report.tasks)
            if name != task
        }
        assert alike == max(others, key=others.get) and cosine == f"{others[alike]:.2f}"
    head, *layers, means = str(report).split("\n\n")[2].split("\n")
    names = head.split()[1:-2]
    assert means.split()[1:] == [
        f"{sum(layer[n] for layer in report.layers.values()) / 2:.3f}" for n in names
    ]
    for path, line in zip(("0", "2"), layers, strict=True):
        usage = report.layers[path]["usage"]
        best = [f"skill {usage.index(max(usage))}", f"({max(usage):.0%})"]
        assert " ".join(line.split()) == " ".join(
            [path, *(f"{report.layers[path][n]:.3f}" for n in names), *best]
        )
    base = torch.nn.Sequential(*(torch.nn.Linear(4, 4) for _ in range(60)))
    large = str(
        routing_report(get_peft_model(base, PolyConfig(r=1, n_tasks=500, target_modules=r"\d+")))
    )
    assert "… 480 more tasks" in large and "… 40 more layers" in large and len(large) < 4000


def test_how_far_tasks_differ_one_number_at_a_time():
    weights = torch.rand(4, 2, 3, dtype=torch.float64)
    means = [
        [sum(float(weights[t, q, s]) for t in range(4)) / 4 for s in range(3)] for q in range(2)
    ]
    furthest = max(
        abs(float(weights[t, q, s]) - means[q][s])
        for t, q, s in itertools.product(range(4), range(2), range(3))
    )
    assert math.isclose(float(metrics.spread(weights)), 3 * furthest, rel_tol=1e-12)
    assert float(metrics.spread(weights[:1].expand(4, -1, -1))) < 1e-12


def test_a_watch_warns_once_of_routing_that_does_not_move(recwarn):
    model = get_peft_model(mlp(), PolyConfig(r=2, n_tasks=3, target_modules=TARGETS))
    watch = RoutingWatch()
    watch.look(model, 99)
    assert not [w for w in recwarn if issubclass(w.category, UserWarning)]
    with pytest.warns(
        UserWarning, match="After 120 steps all tasks still mix .*peft.optimizers.trainer_optimizer"
    ):
        watch.look(model, 120)
    recwarn.clear()
    watch.look(model, 140)
    RoutingWatch(flat_after=500).look(model, 140)
    moved = poly()
    RoutingWatch(dead_below=0).look(moved, 140)
    for still in (
        PolyConfig(n_tasks=1),
        PolyConfig(n_tasks=3, routing="fixed"),
        PolyConfig(n_tasks=3, inference_mode=True),
    ):
        still.target_modules = {"0"}
        RoutingWatch().look(get_peft_model(mlp(), still), 140)
    model.train_only(skills=True)
    RoutingWatch().look(model, 140)
    assert not [w for w in recwarn if issubclass(w.category, UserWarning)]


# Sampling


def test_tasks_are_drawn_as_asked():
    tasks = ["a"] * 900 + ["b"] * 90 + ["c"] * 10
    for temperature, power in ((1, 1.0), (2, 0.5), (math.inf, 0.0)):
        sampler = TaskSampler(tasks, temperature, num_samples=20000)
        shares = {t: n**power for t, n in (("a", 900), ("b", 90), ("c", 10))}
        drawn = [tasks[i] for i in sampler]
        for task, share in shares.items():
            p = share / sum(shares.values())
            assert math.isclose(sampler.probabilities[task], p)
            assert abs(drawn.count(task) / 20000 - p) < 4 * math.sqrt(p * (1 - p) / 20000)
    few = [i for i in TaskSampler(tasks, math.inf, num_samples=24, seed=3) if tasks[i] == "c"]
    assert len(set(few[:10])) == min(len(few), 10)  # none again before all were seen
    sampler = TaskSampler(torch.tensor([0, 0, 1]), seed=1)
    first, second = list(sampler), list(sampler)
    sampler.set_epoch(0)
    assert list(sampler) == first and len(sampler) == 3 and sorted(sampler.groups) == [0, 1]
    sampler.set_epoch(1)
    assert list(sampler) == second


def test_samples_of_a_data_set_in_torch_format():
    """Their tasks are tensors, which are equal by their numbers."""
    tasks = [torch.tensor(task) for task in (0, 0, 0, 1)]
    assert TaskSampler(tasks, math.inf).probabilities == {0: 0.5, 1: 0.5}
    for wrong in (3, [[0], [1]], [torch.tensor([0, 1])]):
        with pytest.raises(TypeError, match="`tasks"):
            TaskSampler(wrong)


@pytest.mark.parametrize(
    ("tasks", "options"),
    [
        ([], {}),
        ([1], {"temperature": 0.5}),
        ([1], {"temperature": math.nan}),
        ([1], {"num_samples": 0}),
    ],
)
def test_samplers_that_are_refused(tasks, options):
    with pytest.raises(ValueError, match="`"):
        TaskSampler(tasks, **options)


# In transformers' Trainer


class Regression(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.body = mlp()

    def forward(self, x, labels=None):
        out = self.body(x)
        return {"loss": (out - labels).square().mean(), "logits": out}


def closeness(prediction):
    return {"closeness": -float(((prediction.predictions - prediction.label_ids) ** 2).mean())}


def arguments(folder, **more):
    from transformers import TrainingArguments

    options = {
        "max_steps": 4,
        "logging_steps": 2,
        "report_to": [],
        "disable_tqdm": True,
        "per_device_train_batch_size": 4,
    }
    return TrainingArguments(
        str(folder), remove_unused_columns=False, use_cpu=True, **options, **more
    )


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A trainer whose batches are drawn evenly over tasks, after training; its callback and data."""
    from transformers import Trainer

    torch.manual_seed(0)
    config = PolyConfig(
        r=2, n_tasks=3, n_skills=2, task_names=["x", "y", "z"], target_modules=["body.0", "body.2"]
    )
    model = get_peft_model(Regression(), config)
    data = [{"x": torch.randn(8), "labels": torch.randn(8), "task_ids": i % 3} for i in range(12)]

    class Balanced(Trainer):
        def _get_train_sampler(self, *args):
            return TaskSampler([sample["task_ids"] for sample in self.train_dataset], math.inf)

    callback = routing_callback()
    trainer = Balanced(
        model,
        arguments(tmp_path_factory.mktemp("trained"), label_names=["labels", "task_ids"]),
        train_dataset=data,
        eval_dataset=data,
        compute_metrics=metrics_by_task(closeness, config.task_names),
        callbacks=[callback],
    )
    trainer.train()
    return trainer, callback, data


def test_a_trainer_logs_routing(trained):
    trainer, callback, _ = trained
    logged = [entry for entry in trainer.state.log_history if "routing/entropy" in entry]
    assert logged[0]["step"] == 2 and logged[0]["routing/entropy"] > 0.99
    measures = ("usage_entropy", "discreteness", "sparsity", "spread", "least_used", "most_used")
    assert {f"routing/{name}" for name in measures} <= set(logged[0])
    assert [entry["step"] for entry in callback.watch.history][:2] == [2, 4]
    assert set(callback.watch.history[0]["layers"]) == {"body.0", "body.2"}


def test_a_trainer_evaluates_by_task(trained, tmp_path):
    trainer, _, data = trained
    found, model = trainer.evaluate(), trainer.model.eval()
    each = {}
    for i, name in enumerate("xyz"):
        mine = [sample for sample in data if sample["task_ids"] == i]
        with torch.no_grad():
            out = model(
                torch.stack([s["x"] for s in mine]),
                task_ids=[i] * 4,
                labels=torch.stack([s["labels"] for s in mine]),
            )
        each[name] = -float(out["loss"])
        assert math.isclose(found[f"eval_closeness_{name}"], each[name], rel_tol=1e-5)
    assert math.isclose(found["eval_closeness_worst"], min(each.values()), rel_tol=1e-5)
    assert math.isclose(found["eval_closeness"], sum(each.values()) / 3, rel_tol=1e-5)
    plain = type(trainer)(
        model, arguments(tmp_path), eval_dataset=data, compute_metrics=metrics_by_task(closeness)
    )
    with pytest.raises(TypeError, match="set `label_names="):
        plain.evaluate()


def test_metrics_over_tasks_go_before_tasks_of_their_names():
    def of(names):
        values, tasks = torch.tensor([3.0, 5.0, 1.0, 2.0]), torch.tensor([0, 0, 1, 2])
        compute = metrics_by_task(lambda p: {"m": float(p.predictions.mean())}, names)
        return compute(EvalPrediction(values, (values, tasks), values))

    assert of(["mean", "worst", "x"]) == {
        "m": 2.75, "m_task_0": 4.0, "m_task_1": 1.0, "m_x": 2.0, "m_mean": 7 / 3, "m_worst": 1.0
    }  # fmt: skip
    with pytest.raises(ValueError, match="`names` has no name for task 2; it has 2"):
        of(["a", "b"])
    with pytest.raises(TypeError, match="`names`='abc' must be a list"):
        of("abc")


def test_a_watch_warns_of_skills_that_nobody_uses_and_of_one_that_all_use():
    model = get_peft_model(
        Regression(), PolyConfig(r=2, n_tasks=3, n_skills=2, target_modules=["body.0", "body.2"])
    )
    with pytest.warns(UserWarning, match=r"skills \[0\] are hardly used by any task"):
        _judged(model, RoutingWatch(collapsed_above=0.99), [0.02, 0.98])
    with pytest.warns(UserWarning, match="skill 1 has 98% of the use"):
        _judged(model, RoutingWatch(), [0.02, 0.98])
    with pytest.raises(ValueError, match="`dead_below`=1"):
        RoutingWatch(dead_below=1)


def _judged(model, watch, weights):
    """The warnings where every task of a layer has the same weights."""
    model.set_router_weights({"body.2": [weights] * 3})
    assert math.isclose(watch.look(model, 9)["least_used"], min(weights), rel_tol=1e-4)
