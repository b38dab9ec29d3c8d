# SPDX-License-Identifier: Apache-2.0
"""The example from start to end: train adapters of four methods, index their folder, compare and
cluster them, route over them, and compose a new task from few examples.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from time import perf_counter

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from examples.multitask_digits.base import Base, make_base
from examples.multitask_digits.data import Data, Images, Shape, load_data
from examples.multitask_digits.late import few
from examples.multitask_digits.training import accuracy, predict
from torch import nn
from transformers.utils import logging

from peft import (
    AdapterLibrary,
    PeftModel,
    adapter_similarity,
    get_routed_model,
    save_as_lora,
)
from peft.clustering import clusters_of

from .members import train_lora, train_members
from .views import View, eight_views, new_views

Scores = dict[str, float]
# Pictures of each view that a router learns from.
_SEEN = 160


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m examples.library_of_adapters",
        description="Turn a folder of LoRA, LoKr, VB-LoRA and LoHa adapters into one model.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--pretrain-epochs", type=int, default=40, help="epochs over the pictures for the base")
    add("--epochs", type=int, default=12, help="epochs over each view's pictures")
    add("--gate-steps", type=int, default=200, help="training steps of the learned router")
    add("--shots", type=int, default=16, help="labeled pictures of a new view")
    add("--steps", type=int, default=80, help="steps, or evaluations, of a composition")
    add("--clusters", type=int, help="number of clusters; None: chosen by silhouette")
    add("--seed", type=int, default=0, help="seed of the split, the base and all training")
    add("--output", type=Path, default=Path("library_output"), help="folder for all results")
    add("--quick", action="store_true", help="run a few steps of each part, to check the example")
    options = parser.parse_args(arguments)
    if options.quick:
        options.pretrain_epochs, options.epochs = 2, 1
        options.gate_steps, options.steps = 3, 4
    return options


def by_view(base: Base, model: nn.Module, views: Sequence[View], images: Images) -> Scores:
    """Return a model's accuracy on each view, which it is not told."""
    return {view.key: accuracy(predict(base, model, view, images), images) for view in views}


def routes(
    base: Base,
    places: Mapping[str, Path],
    views: Sequence[View],
    data: Data,
    options: argparse.Namespace,
) -> dict[str, Scores]:
    """Return the accuracies by view of ways to route over the library's adapters."""

    def routed(**fields: object) -> PeftModel:
        return get_routed_model(copy.deepcopy(base.model), places, **fields)

    def score(model: nn.Module) -> Scores:
        return by_view(base, model, views, data.test)

    results = {"frozen base": score(base.model), "mean of all": score(routed(routing="fixed"))}
    for top_k in (1, 2):
        results[f"Arrow, top {top_k}"] = score(routed(routing="arrow", top_k=top_k))
    model = routed(routing="activation", routing_level="sample", top_k=1)
    seen = few(data.adapt, _SEEN, torch.Generator().manual_seed(options.seed))
    model.collect_prototypes(
        {view.key: [{"pixel_values": base.prepare(view(seen.pixels))}] for view in views}
    )
    results["mean inputs, top 1"] = score(model)
    model = routed(routing="input", routing_level="sample")
    batches = [
        {
            "pixel_values": torch.cat([base.prepare(view(some)) for view in views]),
            "labels": labels.repeat(len(views)),
        }
        for some, labels in zip(seen.pixels.split(16), seen.labels.split(16), strict=True)
    ]
    model.fit_gates(batches, options.gate_steps, lr=2e-2)
    results["learned gate"] = score(model)
    results["named by a rule"] = by_name(routed(routing="task"), base, views, data)
    return results


def by_name(model: PeftModel, base: Base, views: Sequence[View], data: Data) -> Scores:
    """Return the accuracies where a rule outside the model names each picture's expert: the view
    whose mean picture is nearest.
    """
    names = model.named_experts()
    means = {view.key: view(data.adapt.pixels).mean(0).flatten() for view in views}
    table = torch.stack([means[name] for name in names])
    model.eval()
    result = {}
    for view in views:
        pixels = view(data.test.pixels)
        nearest = torch.cdist(pixels.flatten(1), table).argmin(1)
        with torch.no_grad():
            logits = model(pixel_values=base.prepare(pixels), task_ids=nearest).logits
        result[view.key] = accuracy(logits, data.test)
    return result


def compose(
    base: Base,
    places: Mapping[str, Path],
    views: Sequence[View],
    data: Data,
    options: argparse.Namespace,
) -> tuple[dict[str, dict[str, object]], bool]:
    """Fit weights of the library's adapters to a few examples of each new view.

    Returns:
        Accuracies and weights by view, and True if the exported blends predict the same.
    """
    results: dict[str, dict[str, object]] = {}
    same = True
    for view in views:
        examples = few(data.adapt, options.shots, torch.Generator().manual_seed(options.seed))
        batch = {"pixel_values": base.prepare(view(examples.pixels)), "labels": examples.labels}
        before = accuracy(predict(base, base.model, view, data.test), data.test)
        fresh = train_lora(base, view, examples, options.steps, options.seed)
        alone = accuracy(predict(base, fresh, view, data.test), data.test)
        results[view.key] = {"frozen base": before, "new LoRA": alone}
        for method in ("gradient", "search"):
            model = get_routed_model(copy.deepcopy(base.model), places, routing="fixed")
            fit = model.fit_weights([batch], options.steps, init="best", method=method)
            logits = predict(base, model, view, data.test)
            results[view.key][method] = accuracy(logits, data.test)
            results[view.key][f"{method} fit"] = fit.to_dict()
            print(f"\n{view.key}, from {options.shots} pictures, by {method}:\n{fit}")
            print(
                f"accuracy {accuracy(logits, data.test):.1%}; the frozen base {before:.1%}, a new "
                f"LoRA from the same pictures {alone:.1%}"
            )
            folder = options.output / "composed" / f"{view.key}-{method}"
            save_as_lora(folder, model)
            exported = PeftModel.from_pretrained(copy.deepcopy(base.model), folder)
            again = predict(base, exported, view, data.test)
            same = same and torch.allclose(again, logits, atol=1e-3)
    print(f"\nThe blends as LoRA adapters predict {'the same' if same else 'OTHERWISE'}.")
    return results, same


def table(results: Mapping[str, Scores], views: Sequence[View]) -> str:
    """Return accuracies in per cent as a Markdown table."""
    lines = [["", *(view.key for view in views), "mean"], ["---", *["---:"] * (len(views) + 1)]]
    for name, scores in results.items():
        values = [scores[view.key] for view in views]
        values.append(sum(values) / len(values))
        lines.append([name, *(f"{100 * value:.1f}" for value in values)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def index(folder: Path, members: Mapping[str, tuple[str, float]]) -> AdapterLibrary:
    """Index the adapters with their methods and scores."""
    library = AdapterLibrary(folder)
    for name, (method, score) in members.items():
        library.tag(name, method)
        library.score(name, accuracy=score)
    return library


def group(base: Base, library: AdapterLibrary, options: argparse.Namespace) -> dict[str, object]:
    """Compare and cluster the adapters, draw both, and write the clusters' experts."""
    similarity = adapter_similarity(base.model, library)
    clusters = clusters_of(similarity, options.clusters)
    print(f"\n{similarity}\n\n{clusters}")
    similarity.save_json(options.output / "similarity.json")
    similarity.plot(options.output / "similarity.png")
    clusters.plot(options.output / "clusters.png")
    errors = clusters.save_experts(options.output / "experts", 0.9)
    return {**clusters.to_dict(), "errors": errors}


def main(arguments: list[str] | None = None) -> int:
    """Run the example. Return 0 if the check passed."""
    options, start = parse(arguments), perf_counter()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(1)  # more are slower with a model this small
    torch.manual_seed(options.seed)
    for part in ("adapters", "experts", "composed"):
        shutil.rmtree(options.output / part, ignore_errors=True)
    data = load_data(None, Shape(8, 1, {}), options.seed)
    if options.quick:
        data = replace(data, test=few(data.test, 40, torch.Generator().manual_seed(0)))
    base = make_base(None, data, options.pretrain_epochs)
    views, folder = eight_views(), options.output / "adapters"
    members = train_members(base, views, data, options.epochs, options.seed, folder)

    library = index(folder, members)
    print(f"\n{library}")
    clusters = group(base, library, options)
    places = {entry.name: folder / entry.place.path for entry in library}
    results = {"its own adapter": {name: score for name, (_, score) in members.items()}}
    results |= routes(base, places, views, data, options)
    text = table(results, views)
    print(f"\nAccuracy in per cent; only the first row is told the view:\n\n{text}")
    composed, same = compose(base, places, new_views(), data, options)

    content = {"routing": results, "composition": composed, "clusters": clusters}
    (options.output / "results.json").write_text(json.dumps(content, indent=2) + "\n")
    (options.output / "results.md").write_text(text + "\n")
    print(f"\nAll results are in {options.output}/ ({perf_counter() - start:.0f} seconds in all)")
    return 0 if same else 1
