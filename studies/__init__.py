# SPDX-License-Identifier: Apache-2.0
"""Studies with a pretrained language model and real texts. Each has a protocol in `protocols/`,
written before its first result.
"""
