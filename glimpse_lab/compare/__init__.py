# SPDX-License-Identifier: Apache-2.0
"""Every registered pruning plan on the small model and its drawn world: ``glimpse compare``, ``python -m glimpse_lab.compare``."""
