# SPDX-License-Identifier: Apache-2.0
"""Break everything that an adapter's files and states go through, and see that nothing is lost."""
