# SPDX-License-Identifier: Apache-2.0
"""``python -m glimpse_lab.compare``: ``glimpse compare`` where nothing is installed."""

import sys

from glimpse_lab.compare.command import compare
from glimpse_runtime import cli

cli.add("compare", compare)
sys.exit(cli.run(["compare", *sys.argv[1:]]))
