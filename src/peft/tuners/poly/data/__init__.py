# SPDX-License-Identifier: Apache-2.0
"""Data of several tasks: a collator, a sampler, metrics by task, and labels side by side."""
