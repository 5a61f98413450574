# SPDX-License-Identifier: Apache-2.0
"""One page per pruning method, all under a name.

plans.names()                                      # what there is
plans.make("vispruner", ratio=0.2)                 # or vispruner(0.2)
plans.cascade(divprune(0.5), glimpse(modules))     # one behind the other
plans.from_file("sweep.yaml")
plans.at_budget("fastv", 0.33, 28)                 # a common budget, in a decoder of 28 layers
"""

from glimpse_runtime.plans.budgets import at_budget, kept_share
from glimpse_runtime.plans.cascades import ENDINGS, cascade, from_file
from glimpse_runtime.plans.cdpruner import cdpruner
from glimpse_runtime.plans.divprune import divprune
from glimpse_runtime.plans.fastv import fastv
from glimpse_runtime.plans.glimpse import glimpse
from glimpse_runtime.plans.gprune import gprune
from glimpse_runtime.plans.pyramiddrop import pyramiddrop
from glimpse_runtime.plans.registry import make, names, register, resolve
from glimpse_runtime.plans.sparsevlm import sparsevlm
from glimpse_runtime.plans.visionzip import visionzip
from glimpse_runtime.plans.vispruner import fastervlm, vispruner
from glimpse_runtime.plans.vscan import vscan

__all__ = [
    "ENDINGS",
    "at_budget",
    "cascade",
    "cdpruner",
    "divprune",
    "fastervlm",
    "fastv",
    "from_file",
    "glimpse",
    "gprune",
    "kept_share",
    "make",
    "names",
    "pyramiddrop",
    "register",
    "resolve",
    "sparsevlm",
    "visionzip",
    "vispruner",
    "vscan",
]

for _method in (cdpruner, divprune, fastervlm, fastv, glimpse, gprune, vispruner, vscan):
    register(_method.__name__, _method)
# Schedules keep a published shape at every budget: PyramidDrop leaves the same share at each stage, SparseVLM has its list of
# 300, 200 and 118 tokens, VisionZip (on LLaVA) 54 + 10, 108 + 20 or about that of 162 + 30.
register("pyramiddrop", pyramiddrop, scaled=lambda scale: {"ratios": (scale, scale**2, scale**3)})
register("sparsevlm", sparsevlm, scaled=lambda scale: {"shares": (scale, scale * 2 / 3, scale * 118 / 300)})
register(
    "visionzip", visionzip, scaled=lambda scale: {"dominant": scale * 54 / 64, "contextual": scale * 10 / 64}
)
