# SPDX-License-Identifier: Apache-2.0
"""Initializations of LoRA that need more than random numbers: a file for each. `files`
has those that readers can't compute in an adapter's file, and `kinds` tells which these are.

| file | `init_lora_weights` | the factors come from |
|---|---|---|
| `weight` | "pissa", "olora" | the base weight |
| `loftq` | "loftq" | what a quantization of the base weight loses |
| `corda` | "corda" | the base weight and the covariance of the layer's inputs |
| `gradient` | "lora_ga" | the gradient of the base weight |
| `eva` | "eva" | the layer's inputs |

These are functions of tensors. The functions that run a model to collect what they need are one
floor up: `lora/corda.py`, `lora/loraga.py`, `lora/eva.py`, `lora/loftq.py`.
"""
