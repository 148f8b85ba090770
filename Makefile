PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.setup-$(shell cat pyproject.toml scripts/install.py 2>/dev/null | cksum | cut -d' ' -f1)

.PHONY: help setup lint format api figures demo ladder test test-fast test-slow storm fuzz gpu-check bench clean browser system-deps

help:
	@echo "make setup      make .venv and install everything"
	@echo "make demo       the whole path on a CPU: corpus, tokenizer, training, resume, evaluation, samples, report"
	@echo "make ladder     small runs, the prediction of a large one from them, and the large one: docs/scaling.md"
	@echo "make test       the tests (minutes)"
	@echo "make test-fast  those that start no process (under 90 seconds)"
	@echo "make test-slow  the long tests"
	@echo "make lint       ruff (lint, format), mypy --strict, and whether docs/api.md and the figures of docs/figures.yaml are up to date"
	@echo "make format     format the code, and take ruff's safe fixes"
	@echo "make api        write docs/api.md from the docstrings"
	@echo "make figures    write the measured figures of docs/figures.yaml into the pages that name them"
	@echo "make storm      training killed KILLS times (1000), at random instants and in saves; nothing may be lost"
	@echo "make fuzz       every kind of file that a command reads, damaged FUZZ times (100000): hours"
	@echo "make gpu-check  the kernel tests and benchmarks on a GPU, with the python3 of this shell"
	@echo "make bench      the benchmarks"
	@echo "make clean      remove .venv and caches (runs/ stays)"

setup: $(STAMP)

# The stamp is written last: a setup that was killed starts again and keeps what pip had finished.
$(STAMP): pyproject.toml scripts/install.py
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "error: Python 3.11 or newer is needed; give one with: make setup PYTHON=/path/to/python3"; exit 1; }
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || { echo "setup: making $(VENV)"; rm -rf $(VENV); $(PYTHON) -m venv $(VENV); }
	@$(BIN)/python scripts/install.py
	@rm -f $(VENV)/.setup-*; touch $@; echo "setup: done"

# All five run, so that one run shows every finding.
lint: setup
	@$(BIN)/ruff check; lint=$$?; $(BIN)/ruff format --check || lint=1; \
	$(BIN)/mypy || lint=1; $(BIN)/python scripts/api_docs.py --check || lint=1; \
	$(BIN)/python scripts/figures.py --check || lint=1; exit $$lint

format: setup
	@$(BIN)/ruff check --fix --exit-zero --quiet; $(BIN)/ruff format

api: setup
	@$(BIN)/python scripts/api_docs.py

figures: setup
	@$(BIN)/python scripts/figures.py

demo: setup
	@$(BIN)/nextpt demo

# One process more than cores, since some tests wait; more than four would want more memory than a laptop has.
# tests/conftest.py says which tests stay in one process.
PARALLEL := -n $(shell expr $$(getconf _NPROCESSORS_ONLN) + 1) --maxprocesses 4 --no-loadscope-reorder
test: setup
	@$(BIN)/python -m pytest -q -m "not slow and not gpu" $(PARALLEL)

# For the inner loop: no process starts, which tests/conftest.py checks.
test-fast: setup
	@NEXTPT_TEST_NO_PROCESSES=1 $(BIN)/python -m pytest -q $(PARALLEL) \
	  -m "not slow and not gpu and not process and not thorough"

test-slow: setup browser system-deps
	@$(BIN)/python -m pytest -q -rs -m "slow and not gpu" $(PARALLEL)

# Of the demo, and skipped where the demo has been: the rungs train on its corpus.
SHARDS := data/demo/shards
ladder: setup
	@[ -f $(SHARDS)/dataset.json ] || { $(BIN)/nextpt prep stdlib --output data/demo/corpus && \
	  $(BIN)/nextpt prep shards code=data/demo/corpus/code.jsonl prose=data/demo/corpus/prose.jsonl --output $(SHARDS) \
	    --sequence-length 256 --vocab-size 4096; }
	@CUDA_VISIBLE_DEVICES= $(BIN)/nextpt scaling sweep configs/ladders/demo.yaml --ranks 2

KILLS ?= 1000
storm: setup
	@$(BIN)/python -m tests.support.storm --kills $(KILLS) --launchers $$(($(KILLS) / 100)) $(if $(SEED),--seed $(SEED))

FUZZ ?= 100000
fuzz: setup
	@NEXTPT_FUZZ=$(FUZZ) $(BIN)/python -m pytest -q -m slow tests/faults/test_damaged_files.py -n 2 --dist load

# The report is tested in a real browser; without one those tests are skipped and say so.
browser:
	@command -v chromium >/dev/null && command -v chromedriver >/dev/null || { \
	  [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && echo "setup: Debian's Chromium for the browser tests" && \
	  { apt-get install -y -q chromium chromium-driver || { apt-get update -q && apt-get install -y -q chromium chromium-driver; }; } >/dev/null 2>&1; } || \
	  echo "note: chromium and chromium-driver are not there; the browser tests are skipped"

# A real Slurm, sshd, pdsh and network namespaces, for tests/cluster; without root and apt those tests are skipped and say so.
DEBS := slurmctld slurmd slurm-client munge openssh-server openssh-client pdsh iproute2
system-deps:
	@for c in slurmctld slurmd munged sshd pdsh ip; do command -v $$c >/dev/null || missing=1; done; [ -z "$$missing" ] || { \
	  [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && echo "setup: $(DEBS), for the cluster tests" && \
	  { export DEBIAN_FRONTEND=noninteractive RUNLEVEL=1; apt-get install -y -q --no-install-recommends $(DEBS) || \
	    { apt-get update -q && apt-get install -y -q --no-install-recommends $(DEBS); }; } >/dev/null 2>&1; } || \
	  echo "note: $(DEBS) cannot be installed; the cluster tests are skipped"

gpu-check:
	@python3 -c 'import torch, pytest; assert torch.cuda.is_available()' 2>/dev/null || \
	  { echo "error: gpu-check needs a GPU and a python3 with torch, triton, pytest and hypothesis"; exit 1; }
	@python3 -m pytest -q -m gpu tests/kernels
	@if command -v compute-sanitizer >/dev/null; then \
	  compute-sanitizer --tool memcheck --error-exitcode 1 python3 -m pytest -q -m gpu tests/kernels/test_attention_triton.py -k "nothing or views"; \
	else echo "note: compute-sanitizer is not there (it comes with the CUDA toolkit); memory accesses are not checked"; fi
	@device=$$(python3 -c 'import torch; print(torch.cuda.get_device_name().replace(" ", "-"))'); for kernel in attention cross_entropy; do \
	  python3 -m kernels.bench.$$kernel --json bench/results/$$kernel-$$device.json || exit 1; done

bench: setup
	@for b in kernels.bench.cross_entropy kernels.bench.gradient_error kernels.bench.compile_report bench.tokenizers bench.data_prep bench.loader bench.startup; do \
	  echo; $(BIN)/python -m $$b || exit 1; done

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .hypothesis .mypy_cache .ruff_cache
