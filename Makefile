# Every command first makes .venv and installs what it needs; later runs skip that.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

VENV := .venv
RUN := $(VENV)/bin
DEV := $(VENV)/.installed-dev
EXAMPLES := $(VENV)/.installed-examples
# The Python to make $(VENV) with; by default the first that fits.
PYTHON ?=
WORKERS ?= 2
# These tests need no TensorFlow graph or tape, and take minutes. All that run on JAX:
# ON_JAX='tests/attention tests/layers/test_backends.py'.
ON_JAX := $(addprefix tests/attention/test_,api.py contract.py dispatch.py edges.py fused.py) \
	$(addprefix tests/layers/test_,axes.py backends.py)
ON_TORCH := tests/layers/test_backends.py
# Covers the import, masks, layers against Keras and the oracle, saved files, and one export
# of each format.
SHORT := tests/test_architecture.py tests/attention/test_masks.py \
	tests/layers/test_mended_faults.py tests/layers/test_serialization.py \
	tests/layers/multi_head_attention/test_against_keras.py \
	tests/layers/multi_head_attention/test_values.py \
	tests/export/saved_model/test_export.py::test_mixed_precision \
	tests/export/tflite/test_export.py::test_values_and_report \
	tests/export/onnx/test_export.py::test_mixed_precision

export TF_CPP_MIN_LOG_LEVEL ?= 2
export PIP_DISABLE_PIP_VERSION_CHECK ?= 1

FITS := import ensurepip, sys, venv; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))

.PHONY: help
help: ## List the commands
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-21s %s\n", $$1, $$2}' Makefile

.PHONY: sentiment
sentiment: $(EXAMPLES) ## Train the sentiment example into dist/sentiment
	$(RUN)/python examples/sentiment/train.py --output dist/sentiment

.PHONY: sentiment-pretrained
sentiment-pretrained: $(EXAMPLES) ## Fine-tune MiniLM instead, into dist/sentiment-pretrained
	$(RUN)/python examples/sentiment/train.py --pretrained minilm \
		--output dist/sentiment-pretrained

.PHONY: test
test: $(DEV) ## Run the default tests
	$(RUN)/python -m pytest -n $(WORKERS) --dist loadfile

.PHONY: test-short
test-short: $(VENV)/.installed-tests ## Run a short set, also with VENV=.venv-3.12 PYTHON=python3.12
	$(RUN)/python -m pytest -n $(WORKERS) $(SHORT)

.PHONY: test-pythons
test-pythons: ## Run the short set on each Python from 3.11 to 3.13 on this machine
	.ci/pythons.sh

.PHONY: test-programs
test-programs: $(DEV) ## Run programs of many kinds through every door
	$(RUN)/python -m pytest -n $(WORKERS) -m programs tests/programs

.PHONY: test-slow
test-slow: $(DEV) $(VENV)/.installed-transformers $(VENV)/.installed-keras-hub ## Run the slow tests
	$(RUN)/python -m pytest -n $(WORKERS) --dist loadfile -m slow

.PHONY: test-backends
test-backends: $(DEV) $(VENV)/.installed-backends ## Run the tests that apply to JAX and PyTorch
	KERAS_BACKEND=jax $(RUN)/python -m pytest -n $(WORKERS) $(ON_JAX)
	KERAS_BACKEND=torch $(RUN)/python -m pytest -n $(WORKERS) $(ON_TORCH)
	$(RUN)/python -m pytest -n $(WORKERS) tests/convert/test_torch.py

# The GPU delegate on a software driver and the emulated ARM processor need these. Without
# them tests are skipped and reports say "not run".
DEBIAN := chromium libvulkan1 qemu-user-static

.PHONY: debian
debian:
	@dpkg --status $(DEBIAN) >/dev/null 2>&1 || { \
		become=$$( [[ $$(id -u) == 0 ]] || echo sudo ); \
		$$become apt-get update --quiet=2 && \
		$$become apt-get install --yes --quiet=2 --no-install-recommends $(DEBIAN); \
	} || echo "Not installed: $(DEBIAN)" >&2

.PHONY: test-gpu
test-gpu: $(DEV) debian ## Run the tests on LiteRT's GPU delegate
	$(RUN)/python -m pytest -n $(WORKERS) -m gpu_software

.PHONY: test-arm
test-arm: $(DEV) debian ## Run the tests on an emulated ARM processor
	PYTHON=$(RUN)/python .ci/arm_root.sh
	$(RUN)/python -m pytest -m arm

.PHONY: benchmarks
benchmarks: $(VENV)/.installed-benchmarks ## Compare with rivals, into dist/benchmarks: an hour
	$(RUN)/python -m benchmarks

.PHONY: deploy-check
deploy-check: $(DEV) debian dist/sentiment/model.keras ## Run the sentiment model in every runtime
	@PYTHON=$(RUN)/python .ci/arm_root.sh || echo "No arm64 Python" >&2
	$(RUN)/python examples/sentiment/deploy_check.py --directory dist/sentiment

dist/sentiment/model.keras:
	$(MAKE) sentiment

.PHONY: docs
docs: $(DEV) ## Build the guides and the API pages into dist/docs
	NO_MKDOCS_2_WARNING=1 $(RUN)/mkdocs build --strict

.PHONY: check
check: $(DEV) ## Check format, lint, types and import direction
	$(RUN)/ruff format --check .
	$(RUN)/ruff check .
	$(RUN)/pyright
	$(RUN)/python -m pytest -q tests/test_architecture.py

.PHONY: format
format: $(DEV) ## Format the code and apply the linter's safe fixes
	$(RUN)/ruff format .
	$(RUN)/ruff check --fix .

.PHONY: smoke-wheel
smoke-wheel: $(DEV) ## Build the wheel and try it outside the checkout
	$(RUN)/python .ci/smoke_wheel.py

.PHONY: clean
clean: ## Remove what was built, dist/ too, but no .venv
	rm -rf build dist .hypothesis .pytest_cache .ruff_cache
	find . -name __pycache__ -not -path './.venv*' -prune -exec rm -rf {} +

# One stamp for each extra; an edit of pyproject.toml makes it old, and make installs again.
$(VENV)/.installed-%: pyproject.toml | $(RUN)/pip
	@echo "Installing keras-mha[$*] into $(VENV): some minutes the first time"
	$(RUN)/python -m pip install --quiet --editable '.[$*]'
	touch $@

$(RUN)/pip:
	@for python in $(or $(PYTHON),python3 python3.13 python3.12 python3.11); do \
		if "$$python" -c '$(FITS)' 2>/dev/null; then \
			echo "$$python -m venv $(VENV)"; \
			exec "$$python" -m venv $(VENV); \
		fi; \
	done; \
	echo "No Python found in: $(or $(PYTHON),python3 python3.13 python3.12 python3.11)." \
		"This needs Python 3.11, 3.12 or 3.13 with venv" \
		"(on Debian: the package python3-venv); name it with PYTHON=..." >&2; \
	exit 1
