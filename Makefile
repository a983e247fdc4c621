# headrift: `make run` and `make test` set everything up by themselves.

BIN := .venv/bin
# The prompt set of `make run`: one of datasets/ that has a system prompt.
SET ?= no_digits_urls
LARGE := models/qwen2.5-coder-1.5b-instruct
ARGS ?=
# Test processes. Engines use every core by themselves, so more gain little. Which has which tests: tests/conftest.py.
AT_ONCE ?= 2
DISTRIBUTED := -n $(AT_ONCE) --dist loadfile --no-loadscope-reorder
# What takes a processor with AVX-512 for one with AVX2: torch's kernels, oneDNN's, MKL's, numba's; vLLM's, by tests/avx2.
AVX2 := ATEN_CPU_CAPABILITY=avx2 DNNL_MAX_CPU_ISA=AVX2 MKL_ENABLE_INSTRUCTIONS=AVX2 NUMBA_CPU_NAME=haswell \
  NUMBA_CPU_FEATURES=+avx,+avx2,+fma,+bmi,+bmi2,+f16c,+lzcnt,+movbe,+popcnt,+sse4.1,+sse4.2 \
  PYTHONPATH=$(CURDIR)/tests/avx2$${PYTHONPATH:+:$$PYTHONPATH}
# A Python with headrift[gpu]: `make setup` installs vLLM for CPUs.
GPU_PYTHON ?= $(BIN)/python
# Those that measure on a CPU. *_gpu.py are for `make gpu-check`; public.py takes an hour and sets that are not here, see
# docs/results/public.md.
BENCH ?= $(sort $(filter-out bench/utils.py bench/%_gpu.py bench/public%.py bench/residuals.py,$(wildcard bench/*.py)))
BENCH_SHORT ?= bench/overhead.py bench/peers.py bench/scaling.py bench/tuning.py
# A Python with nnsight (pip install nnsight==0.8.1), for bench-full to measure that too.
NNSIGHT ?=

# The repository root stays off sys.path: its folder datasets/ would pass for the `datasets` library.
export PYTHONSAFEPATH := 1
# Nothing is looked up on a model hub, and nothing is reported anywhere.
export HF_HUB_OFFLINE := 1
export TRANSFORMERS_OFFLINE := 1
export HF_DATASETS_OFFLINE := 1
export HF_HUB_DISABLE_TELEMETRY := 1
export VLLM_NO_USAGE_STATS := 1
export DO_NOT_TRACK := 1
# OpenMP threads spin only shortly before they sleep, so that a busy machine slows the tests in proportion, not tenfold.
export GOMP_SPINCOUNT := 10000

.DEFAULT_GOAL := help
.PHONY: help setup run run-large test test-avx2 test-nightly test-slow lint format bench bench-full gpu-check docs docs-serve lock clean

help: ## Show this list
	@echo "headrift finds prompts that fight their system prompt, from what attention heads do inside vLLM."
	@echo
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' Makefile
	@echo
	@echo "run, test, lint and bench do the set-up first if necessary (once: 4 to 8 minutes, 4 GB)."
	@echo "make test ARGS='-k window' passes options on, make run ARGS='--steps 12' too; PYTHON=... names the Python to set up with."
	@echo "make gpu-check GPU_PYTHON=... names a Python with pip install -e '.[gpu,dev]': setup installs for CPUs."

setup: ## Virtual environment in .venv, packages, demonstration model in models/
	@for python in "$(PYTHON)" python3 python3.11 python3.12 python3.13; do \
	  if [ -n "$$python" ] && "$$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
	    exec "$$python" scripts/setup.py; \
	  fi; \
	  if [ -n "$$python" ] && [ "$$python" = "$(PYTHON)" ]; then \
	    echo "PYTHON=$$python does not run, or is older than Python 3.11." >&2; exit 1; \
	  fi; \
	done; \
	echo "headrift needs Python 3.11 or newer, and none was found (tried python3, python3.11, python3.12, python3.13)." >&2; \
	echo "Install one, or name it: make setup PYTHON=/path/to/python3.11" >&2; \
	exit 1

run: setup ## A first look: calibrate on half of a prompt set, judge the other half (SET=banned_word: another)
	@$(BIN)/python scripts/first_run.py --set $(SET) $(ARGS)

run-large: setup ## The same with a model that follows instructions: 1.1 GB to download, 10 GB of memory
	@$(BIN)/headrift demo-model --model qwen2.5-coder-1.5b $(LARGE)
	@$(BIN)/python scripts/first_run.py --set $(SET) --model $(LARGE) $(ARGS)

test: setup ## Run the tests that need no GPU and little time
	$(BIN)/pytest $(DISTRIBUTED) $(ARGS)

test-avx2: setup ## Run the same tests as on a processor without AVX-512
	$(AVX2) $(BIN)/pytest $(DISTRIBUTED) $(ARGS)

test-nightly: setup ## Run the tests that take minutes, and those of `make test` as test-avx2 does
	$(BIN)/pytest $(DISTRIBUTED) -m "nightly and not gpu" $(ARGS)
	$(MAKE) test-avx2

test-slow: setup ## Run all tests that need no GPU: those of `make test`, nightly and slow ones
	$(BIN)/pytest $(DISTRIBUTED) -m "not gpu" $(ARGS)

lint: setup ## Check style, types, imports, names and generated pages
	@failed=; \
	for check in "ruff check ." "ruff format --check ." lint-imports mypy \
	  "python scripts/generate_docs.py --check" "python scripts/check_names.py"; do \
	  echo "== $$check"; $(BIN)/$$check || failed="$$failed; $$check"; \
	done; \
	if [ -n "$$failed" ]; then echo "make lint: failed$$failed" >&2; exit 1; fi

format: setup ## Format the code and fix what ruff can fix
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: setup ## Short benchmarks, ten to fifteen minutes, into runs/bench/
	@for script in $(BENCH_SHORT); do echo "== $$script"; $(BIN)/python "$$script" --short $(ARGS) || exit 1; done

bench-full: setup ## All benchmarks (BENCH=bench/x.py: only that one), into bench/results/ and README.md
	@for script in $(BENCH); do echo "== $$script"; more=; \
	  [ "$$script" = bench/peers.py ] && [ -n "$(NNSIGHT)" ] && more="--nnsight $(NNSIGHT)"; \
	  $(BIN)/python "$$script" $$more $(ARGS) || exit 1; done
	@$(BIN)/python bench/kernels.py --instructions avx2 --out bench/results/kernels_cpu_avx2.json
	@$(BIN)/python scripts/roofline.py
	@$(BIN)/python scripts/readme_table.py

gpu-check: ## On a GPU, nine minutes: tests, kernel times, what probing costs (ARGS=--dry-run: tiny, on a CPU)
	@command -v $(GPU_PYTHON) >/dev/null || { echo "gpu-check: there is no $(GPU_PYTHON) (make setup, or GPU_PYTHON=...)" >&2; exit 1; }
	@$(GPU_PYTHON) scripts/gpu_check.py $(ARGS)

docs: setup ## Build the site of docs/ into site/; a broken link fails
	$(BIN)/mkdocs build --strict

docs-serve: setup ## Serve the site on this machine, and rebuild it when a page changes
	$(BIN)/mkdocs serve

lock: setup ## Resolve requirements/*.in into requirements/*.lock
	$(BIN)/python scripts/lock.py

clean: ## Remove caches and build products; .venv, models/ and runs/ stay
	rm -rf build dist site .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	rm -rf engine/*.egg-info kernels/*.egg-info *.egg-info
	find engine kernels tests bench scripts -name __pycache__ -type d -prune -exec rm -rf {} +
