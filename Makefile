# `make demo` and `make test` set up what they need; see README.md.
.DEFAULT_GOAL := help
SHELL := /bin/bash

VENV := .venv
BASE_PYTHON ?= python3
PYTHON := $(VENV)/bin/python
# On a machine without a GPU, the CPU build of torch and the real NCCL library beside it.
ifeq ($(shell command -v nvidia-smi),)
TORCH ?= torch==2.13.0
EXTRAS := test,lint,bench,cu12
else
TORCH ?= torch>=2.11
EXTRAS := test,lint,bench
endif

NATIVE := distcomm/libdistcomm_native.so
NATIVE_SOURCES := $(wildcard distcomm/csrc/*)
JOBS ?= 2
BENCH ?= host
NUM_GPUS ?= 2

.PHONY: help setup build demo test test-csrc test-gpu test-simulated memcheck lint format bench clean

help:  ## Show this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

setup: $(VENV)/.ready  ## Make .venv with all that demo, test and lint need

$(VENV)/.ready: pyproject.toml
	$(BASE_PYTHON) -m venv $(VENV)
	$(PYTHON) -m pip install --quiet "$(TORCH)"
	$(PYTHON) -m pip install --quiet --editable ".[$(EXTRAS)]" --config-settings=wheel.cmake=false
	touch $@

build: $(NATIVE)  ## Build the C++ library in place; needs a C++ compiler and cmake, no network

$(NATIVE): $(NATIVE_SOURCES)
	cmake -S distcomm/csrc -B build/native -DCMAKE_BUILD_TYPE=Release
	cmake --build build/native --parallel $(JOBS)
	cmake --install build/native --prefix .

demo: setup build  ## A small transformer over 8 processes, compared with one; ARGS="--help"
	$(PYTHON) scripts/demo.py $(ARGS)

test: setup build  ## The CPU test suite
	$(PYTHON) -m pytest -n 2 --dist loadfile $(ARGS)

test-csrc:  ## The C++ tests, under AddressSanitizer and ThreadSanitizer
	cmake -S tests/csrc/sanitized -B build/test-csrc
	cmake --build build/test-csrc --parallel $(JOBS)
	build/test-csrc/test_segment_heap_asan
	build/test-csrc/test_segment_heap_tsan
	build/test-csrc/test_sleep_heap_asan
	build/test-csrc/test_sleep_heap_tsan

test-gpu: build  ## The GPU test suite with the current python3, on all GPUs of the machine
	PYTHONPATH=. $(BASE_PYTHON) -m pytest tests/gpu -m gpu -p no:cacheprovider $(ARGS)

test-simulated:  ## The GPU test suite on simulated GPUs, NUM_GPUS=2; see tests/simulated_gpu/README.md
	scripts/simulated_gpu.sh $(NUM_GPUS) python -m pytest tests/gpu -m gpu -p no:cacheprovider $(ARGS)

memcheck: build  ## compute-sanitizer's memcheck of the kernels, on NUM_GPUS=2 GPUs
	PYTHONPATH=. $(BASE_PYTHON) -m torch.distributed.run --standalone --nproc-per-node $(NUM_GPUS) \
	  --no-python compute-sanitizer --tool memcheck --report-api-errors no --error-exitcode 9 \
	  $(BASE_PYTHON) scripts/memcheck_kernels.py

lint: setup  ## ruff, mypy, and the direction of imports
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports

format: setup  ## Rewrite the sources in ruff's format
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

bench: build  ## A benchmark on all GPUs, with the current python3; BENCH=host or symmetric
	PYTHONPATH=. $(BASE_PYTHON) -m torch.distributed.run --standalone --nproc-per-node gpu \
	  -m distcomm.bench $(BENCH) $(ARGS)

clean:  ## Remove what was built; keeps .venv
	rm -rf build dist $(NATIVE) .pytest_cache .mypy_cache .ruff_cache .hypothesis
