# SPDX-License-Identifier: Apache-2.0
"""Training of the small model: a Qwen2.5-VL from scratch, then GlimpsePrune's modules on top of it."""
