# SPDX-License-Identifier: Apache-2.0
"""Support for models that other libraries have changed: offloaded, sharded or quantized."""
