# SPDX-License-Identifier: Apache-2.0
"""An adapter on disk, and the keys of its state dict."""
