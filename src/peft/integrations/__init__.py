# SPDX-License-Identifier: Apache-2.0
"""What this package does for models that other libraries have changed."""
