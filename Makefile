# The few commands of daily life. `make help` lists them.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
STAMP := $(VENV)/.installed
WORKERS ?= 2

.PHONY: help demo test test-unit faults check clean

help: ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

# --no-compile: compiling what is never imported would take as long as everything else
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "mlx-fish needs Python 3.11 or newer; install one and name it: make $(MAKECMDGOALS) PYTHON=python3.12" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(PIP) install -q --no-compile -c constraints.txt -e ".[mlx]"
	@touch $@

$(VENV)/.tested: $(STAMP)
	@# torch first and pinned: an unpinned one may bring gigabytes of CUDA
	$(PIP) install -q --no-compile -c constraints.txt torch
	$(PIP) install -q --no-compile -c constraints.txt -e ".[mlx,test,dev]"
	@touch $@

demo: $(STAMP) ## set up, then the whole main job offline on the built-in tiny model
	@PATH="$(abspath $(BIN)):$$PATH" sh scripts/demo.sh
	@printf '\nTo use mlx-fish in this shell:\n  source %s/bin/activate\n  mlx-fish train --help\n' '$(VENV)'

test: $(VENV)/.tested ## set up, then every test (MLX_FISH_TEST_MODEL=DIR adds those on real weights)
	$(BIN)/python -m pytest --each-backend -n $(WORKERS) --dist loadscope

test-unit: $(VENV)/.tested ## the tests that start no process and load no model of size
	$(BIN)/python -m pytest -m unit -n $(WORKERS) --dist loadscope

faults: $(VENV)/.tested ## plant every named fault in a copy; each must turn a test red
	$(BIN)/python tools/mutate.py

check: $(VENV)/.tested ## format, lint, types, dead code
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/vulture

clean: ## remove what the demo and the tools made
	rm -rf .mypy_cache .pytest_cache .ruff_cache .hypothesis demo_output
