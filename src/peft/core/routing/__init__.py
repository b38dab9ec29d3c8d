# SPDX-License-Identifier: Apache-2.0
"""Routing: a choice for each sample of a call, by a task id that the call passes or by the input.

- `task_ids`: ids and names of tasks in the forms that callers may pass, checked.
- `prompt_tokens`, `pooling`: the tokens that route a sample, and the mean over them.
- `calls`: `Routing` keeps these beside a call of the model, for its layers to read.
- `layer`, `tuner`: the base classes of methods that route.
"""
