# SPDX-License-Identifier: Apache-2.0
"""The methods' formulas, written down as the papers have them: dense, slow, and from an adapter's
parameters alone.
"""

import torch


def adapted_weight(layer, x, task=None, adapter="default"):
    """The weight `[out, in // groups, *kernel]` that a layer with one adapter has for a sample, and
    what is added to its bias.

    Args:
        layer: The adapted layer, in evaluation.
        x: The sample's input, of which routing by input takes the mean over all but the last
            dimension.
        task: The sample's task.
        adapter: The adapter's name.
    """
    base = layer.get_base_layer()
    method = type(layer).__module__.split(".")[-2]
    W = base.weight.T if layer.geometry.transposed else base.weight
    own = {
        key: holder[adapter]
        for key in layer.container_names
        if adapter in (holder := getattr(layer, key))
    }
    if method == "poly":
        return W + poly(layer, own, x, task, adapter), 0.0
    delta = DELTAS[method](layer, own, adapter).reshape(W.shape) * layer.scaling[adapter]
    if "lokr_scalar" in own:
        delta = delta * own["lokr_scalar"]
    if "vblora_gate" in own:
        delta = delta * own["vblora_gate"]
    changed, rows = W + delta, (1, *range(2, W.dim()))
    if "lora_magnitude_vector" in own or ("lokr_magnitude" in own and layer.wd_on_output[adapter]):
        m = (
            own["lokr_magnitude"]
            if "lokr_magnitude" in own
            else own["lora_magnitude_vector"].weight
        )
        lengths = changed.detach().square().sum(rows, keepdim=True).sqrt()
        changed = m.reshape(lengths.shape) * changed / lengths
    elif "lokr_magnitude" in own:
        lengths = changed.detach().square().sum((0, *rows[1:]), keepdim=True).sqrt()
        changed = own["lokr_magnitude"].reshape(lengths.shape) * changed / lengths
    extra = (
        own["lora_B"].bias * layer.scaling[adapter]
        if method == "lora" and layer.lora_bias[adapter]
        else 0.0
    )
    return changed, extra


def lora(layer, own, adapter):
    if "lora_embedding_A" in own:
        return (own["lora_embedding_B"] @ own["lora_embedding_A"]).T
    A, B = (own[name].weight.flatten(1) for name in ("lora_A", "lora_B"))
    if adapter in layer.lora_start:
        return B @ A - layer.lora_start[adapter].B @ layer.lora_start[adapter].A
    return B @ A


def loha(layer, own, adapter):
    if "hada_t1" not in own:
        return (own["hada_w1_a"] @ own["hada_w1_b"]) * (own["hada_w2_a"] @ own["hada_w2_b"])
    one, two = (
        torch.einsum(
            "ijkl,ip,jq->pqkl", own[f"hada_t{i}"], own[f"hada_w{i}_a"], own[f"hada_w{i}_b"]
        )
        for i in (1, 2)
    )
    return one * two


def lokr(layer, own, adapter):
    W1 = own["lokr_w1"] if "lokr_w1" in own else own["lokr_w1_a"] @ own["lokr_w1_b"]
    if "lokr_t2" in own:
        W2 = torch.einsum("ijkl,ip,jq->pqkl", own["lokr_t2"], own["lokr_w2_a"], own["lokr_w2_b"])
    else:
        W2 = own["lokr_w2"] if "lokr_w2" in own else own["lokr_w2_a"] @ own["lokr_w2_b"]
    a, b = W1.shape
    W2 = W2.reshape(layer.geometry.out_features // a, layer.geometry.in_features // b, -1)
    return torch.cat([torch.cat([W1[i, j] * W2 for j in range(b)], dim=1) for i in range(a)])


def vblora(layer, own, adapter):
    bank, topk = layer.bank(adapter), layer.topk[adapter]

    def tile(logits):
        values, chosen = logits.topk(topk)
        weights = values.exp() / values.exp().sum()
        return sum(w * bank[i] for w, i in zip(weights, chosen.tolist(), strict=True))

    A = torch.stack(
        [torch.cat([tile(position) for position in row]) for row in own["vblora_logits_A"]]
    )
    B = torch.cat(
        [
            torch.stack([tile(position) for position in tiles], dim=1)
            for tiles in own["vblora_logits_B"]
        ]
    )
    return B[: layer.geometry.out_features] @ A[:, : layer.geometry.in_features]


def poly(layer, own, x, task, adapter):
    A, B, router = own["poly_lora_A"], own["poly_lora_B"], layer.router(adapter)
    n_splits, n_skills = A.shape[:2]
    if hasattr(router, "module_logits"):
        logits = router.module_logits[task]
    else:
        logits = router.weight @ x.reshape(-1, x.shape[-1]).mean(0)
    gates = logits.reshape(n_splits, n_skills).sigmoid()
    weights = gates / gates.sum(1, keepdim=True)
    if not router.training and router.gating.top_k is not None:
        values, chosen = weights.topk(router.gating.top_k)
        weights = torch.zeros_like(weights).scatter(1, chosen, values / values.sum(1, keepdim=True))
    A_w = torch.cat(
        [sum(weights[q, s] * A[q, s] for s in range(n_skills)) for q in range(n_splits)]
    )
    B_w = torch.cat(
        [sum(weights[q, s] * B[q, s] for s in range(n_skills)) for q in range(n_splits)], dim=1
    )
    delta = (A_w @ B_w).T * layer.alpha[adapter] / layer.r[adapter]
    if "poly_task_skills" in own:
        skills = own["poly_task_skills"]
        delta = (
            delta
            + (skills.A.values[task] @ skills.B.values[task]).T * layer.alpha[adapter] / skills.rank
        )
    return delta


DELTAS = {"lora": lora, "loha": loha, "lokr": lokr, "vblora": vblora}
