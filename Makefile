# SPDX-License-Identifier: Apache-2.0
# Everything runs in .venv, made on first use. Repeats are instant: a stamp file remembers what was installed.
#
#   PYTHON=python3.12      another interpreter for the environment
#   PIP_FLAGS="..."        extra flags for pip, such as an index with CPU builds of torch
#   GPU_PYTHON=python3     the Python of gpu-check and gpu-e2e, with a torch that sees the GPU; GPU_CHECK="...", GPU_E2E="..." pass flags on
#   WORKERS=4              parallel test processes (default: the number of CPUs, at most 8)

PYTHON    ?= python3
PIP_FLAGS ?=
GPU_PYTHON ?= python3
CPUS      := $(shell nproc 2>/dev/null || getconf _NPROCESSORS_ONLN 2>/dev/null || echo 2)
WORKERS   ?= $(shell n=$(CPUS); [ $$n -gt 8 ] && n=8; echo $$n)
THREADS   := $(shell t=$$(( $(CPUS) / $(WORKERS) )); [ $$t -lt 1 ] && t=1; echo $$t)

VENV  := .venv
BIN   := $(VENV)/bin
STAMP := $(VENV)/.installed
DEPS  := $(VENV)/.dependencies
PIP   := $(BIN)/python -m pip install --disable-pip-version-check --progress-bar off $(PIP_FLAGS)

NATIVE := CMakeLists.txt $(shell find cmake csrc -type f 2>/dev/null)

export HF_HUB_OFFLINE = 1
export TOKENIZERS_PARALLELISM = false

.DEFAULT_GOAL := help
.PHONY: help venv demo test lint unit gpu-check gpu-e2e compare compare-quick train-tiny clean distclean

help: ## this list
	@echo "Glimpse: make targets"
	@grep -hE '^[a-z0-9-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  %-12s %s\n", $$1, $$2}'

venv: $(STAMP) ## make .venv, install the dependencies, build csrc

demo: $(STAMP) ## answer questions about the sample pictures, unpruned and pruned; pictures go to demo_out/
	$(BIN)/python -m glimpse_lab.demo --out demo_out

test: lint unit ## ruff, mypy and all tests

lint: $(STAMP) ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/mypy

unit: $(STAMP) ## all tests (PYTEST="..." passes flags on)
	OMP_NUM_THREADS=$(THREADS) $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal $(PYTEST)

# No .venv: machines with GPUs bring a torch of their own. Nothing is installed; the extension is built into build/gpu for that Python.
gpu-check: ## build, tests, benchmark and report of the GPU kernels, with the python3 that is there; under nine minutes
	@$(GPU_PYTHON) -c 'import torch, typer, rich, pytest' || { \
	  echo "make: gpu-check needs a Python with torch, typer, rich and pytest: GPU_PYTHON=..." >&2; exit 1; }
	$(GPU_PYTHON) -m bench.gpu_check $(GPU_CHECK)

gpu-e2e: ## whole requests on a GPU beside transformers and the original's path, 7B shapes; behind gpu-check; under nine minutes
	$(GPU_PYTHON) -m bench.gpu_e2e $(GPU_E2E)

# COMPARE=--resume goes on with one that was stopped; without it old records go, they are of other kernels.
compare: $(STAMP) ## all pruning methods on models/tiny, into docs/methods.md; ten minutes on two idle cores (COMPARE="..." passes flags on)
	$(if $(findstring --resume,$(COMPARE)),,rm -rf runs/compare)
	$(BIN)/python -m glimpse_lab.compare --output runs/compare --markdown docs/methods.md $(COMPARE)

compare-quick: $(STAMP) ## a first look at the same, in a minute; the page stays as it is
	rm -rf runs/compare-quick
	$(BIN)/python -m glimpse_lab.compare --quick --output runs/compare-quick $(COMPARE)

train-tiny: $(STAMP) ## train models/tiny anew, into runs/tiny; an interrupted run goes on (hours on two cores)
	$(BIN)/python -m glimpse_lab.train all --folder runs/tiny --to runs/tiny/model

clean: ## remove build results and caches, keep .venv
	rm -rf build dist demo_out .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info $(STAMP)
	find . -name __pycache__ -type d -not -path './$(VENV)/*' -prune -exec rm -rf {} +

distclean: clean ## clean, and remove .venv
	rm -rf $(VENV)

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	  echo "make: $(PYTHON) is missing or older than 3.10; install Python >= 3.10 or say PYTHON=..." >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	  echo "make: this Python cannot make virtual environments; on Debian and Ubuntu: apt-get install python3-venv" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

# Builds of torch with CUDA ask for one exact triton of their own, so torch comes before, and without, our pin of it;
# builds for CPUs bring none and get ours, for the tests that interpret and compile the GPU kernels.
# Build tools are pinned too: the package is built in this environment instead of an isolated one.
$(DEPS): $(BIN)/python constraints.txt
	grep -v '^triton' constraints.txt > $(VENV)/constraints.txt
	$(PIP) --constraint $(VENV)/constraints.txt torch scikit-build-core pybind11 cmake ninja
	@$(BIN)/python -c 'import triton' 2>/dev/null || grep '^triton' constraints.txt >> $(VENV)/constraints.txt
	@touch $@

# GLIMPSE_EMULATED: the CUDA kernels once more, for the host, where the tests run them.
$(STAMP): $(DEPS) pyproject.toml $(NATIVE)
	CMAKE_BUILD_PARALLEL_LEVEL=$(CPUS) $(PIP) --constraint $(VENV)/constraints.txt \
	  --no-build-isolation --config-settings=cmake.define.GLIMPSE_EMULATED=ON --editable ".[test]"
	@$(BIN)/python -c 'from glimpse_kernels import _C; print("make: CUDA kernels:", _C.cuda_build)' 2>/dev/null || \
	  echo "make: csrc was not built (no C++ compiler?): everything runs on the PyTorch definitions, slower" >&2
	@touch $@
