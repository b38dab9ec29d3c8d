# SPDX-License-Identifier: Apache-2.0
"""Saved adapters of every method for one base model, beside their dense deltas."""

import copy

import torch
from helpers.methods import METHODS

import peft

# The experts that `saved_adapters` give, by name; a Poly adapter gives one for each task.
NAMES = ["LOHA", "LOKR", "LORA", "VBLORA", "POLY.task_0", "POLY.task_1", "POLY.task_2"]


def saved_adapters(base, folder, targets, methods=METHODS):
    """Folders of adapters by name, and `{expert: {path: dense delta [out, in]}}`."""
    places, dense = {}, {}
    for seed, method in enumerate(methods):
        torch.manual_seed(seed)
        config = METHODS[method].config(target_modules=targets)
        model = peft.get_peft_model(copy.deepcopy(base), config)
        with torch.no_grad():  # deltas of one size
            for name, parameter in model.named_parameters():
                if parameter.requires_grad and "lora_A" in name:
                    parameter.mul_(2)
        places[method] = str(folder / method)
        model.save_pretrained(places[method])
        layers = dict(model.base_model.named_tuner_layers())
        tasks = range(3) if method == "POLY" else [None]
        for task in tasks:
            option = {} if task is None else {"task_id": task}
            name = method if task is None else f"{method}.task_{task}"
            dense[name] = {
                path: layer.geometry.as_stored(layer.get_delta_weight("default", **option)).detach()
                for path, layer in layers.items()
            }
    return places, dense


def layer_norm(x):
    return (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, correction=0) + 1e-5).sqrt()


def chosen_weights(kind, x, deltas, gates, top_k, temperature):
    """The weights `[experts]` for one input `[in]`, as the papers have them."""
    if kind == "arrow":
        vectors = torch.stack([torch.linalg.svd(delta).Vh[0] for delta in deltas])
        scores = (vectors @ x).abs()
    elif kind == "activation":
        scores = torch.nn.functional.cosine_similarity(gates, x[None], dim=1)
    elif kind == "phatgoose":
        scores = layer_norm(gates) @ layer_norm(x) / len(x) ** 0.5
    else:
        scores = gates @ x
    best = sorted(range(len(scores)), key=lambda e: -float(scores.detach()[e]))[:top_k]
    weights = torch.zeros(len(scores), dtype=x.dtype)
    if kind == "input":
        weights[best] = torch.exp(scores / temperature).div(torch.exp(scores / temperature).sum())[
            best
        ]
    else:
        powers = torch.exp(scores[best] / temperature)
        weights[best] = powers / powers.sum()
    return weights
