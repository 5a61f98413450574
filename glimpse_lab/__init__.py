# SPDX-License-Identifier: Apache-2.0
"""Synthetic pictures with known answers, and the training of the small model shipped in ``models/tiny``."""
