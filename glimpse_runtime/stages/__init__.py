# SPDX-License-Identifier: Apache-2.0
"""What the stages of a plan are made of.

places: where tokens may leave. scorers, rater_attention: how they are judged. selection, selectors, budget, shares, ratios: which of them
stay, and how many. mergers: what becomes of the others. views: what all of these look at. outcome: what a stage kept.
"""
