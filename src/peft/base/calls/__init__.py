# SPDX-License-Identifier: Apache-2.0
"""The sample that each row of a layer's input belongs to, for options that differ from sample to
sample (`adapter_names`, Poly's `task_ids`).

A model passes activations to its layers, but not the samples they belong to. Seven files solve
this:

- `stack`: `CallStack` keeps a call's arguments while it runs, for the layers to read.
- `arguments`: names and shapes of a call's arguments, which tell how many samples and tokens it
  has.
- `layout`: `RowLayout`, which tells from a layer's place in the model where its input has the
  samples. It is made once, when the layer gets an adapter.
- `rows`: `CallRows` puts the two together: for a layer's input it returns the `RowOwners`, the
  sample of each row, or None where they are unknown.
- `adapter_batch`: `AdapterBatch`, the adapter that each sample of a call runs with.
- `token_values`: values of tokens as values of the rows that a layer sees.
- `wrapped_methods`: `WrappedMethod` takes such options out of the calls of a model's own methods.

Beside them, `running` has `RunningCalls`: the calls of a model in all threads, and the changes of
its adapters, which wait for them.
"""
