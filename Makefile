# One command each, from a fresh clone: `make demo` trains, `make test` tests, `make lint` lints.
# They set up a virtual environment in .venv first (Python 3.10 or newer and a C++17 compiler).

PYTHON ?= python3
# The release that CI tests. Any torch from 2.10 on will do: make TORCH="torch==2.14.1" test
TORCH ?= torch==2.13.0
# What that torch pins; its CUDA builds bring it. Where there is no wheel, the tests of it skip.
TRITON ?= triton==3.7.1
PYTEST_ARGS ?= -n auto
VENV := .venv
BIN := $(VENV)/bin
# OpenMP threads that wait give their core away: spinning, they stall a machine that does other work
# (measured: one sixth of the images a second). It must be set before torch is loaded.
export OMP_WAIT_POLICY ?= PASSIVE

# The second environment: another torch, and the libraries that use this one.
ZOO ?= torch==2.14.1 torchvision==0.29.1 timm==1.0.31 transformers==5.24.0 kernels==0.17.2
ZOO_VENV := .venv-zoo
ZOO_TESTS ?= $(wildcard tests/test_recipes*.py) tests/zoo tests/test_accelerate.py

.PHONY: demo test test-all test-zoo test-package lint format wheel clean

demo: $(VENV)/.ready
	$(BIN)/python -m convnest_kernels train

test: $(VENV)/.ready
	$(BIN)/python -m pytest $(PYTEST_ARGS) -m "not slow"

test-all: $(VENV)/.ready
	$(BIN)/python -m pytest $(PYTEST_ARGS)

test-zoo: $(ZOO_VENV)/.ready
	$(ZOO_VENV)/bin/python -m pytest $(PYTEST_ARGS) -m "not slow" $(ZOO_TESTS)

# The sdist, the wheel from it, and the wheel in an environment of its own; README's lines there.
test-package: $(VENV)/.ready $(ZOO_VENV)/.ready
	.ci/package $(BIN)/python $(ZOO_VENV)/bin/python

lint: $(VENV)/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	git ls-files '*.cpp' '*.h' '*.cuh' '*.cu' | xargs -r $(BIN)/clang-format --dry-run --Werror

format: $(VENV)/.ready
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	git ls-files '*.cpp' '*.h' '*.cuh' '*.cu' | xargs -r $(BIN)/clang-format -i

wheel: $(VENV)/.ready
	$(BIN)/python -m build --wheel

clean:
	rm -rf build dist *.egg-info convnest_kernels/*.so

# Rebuilt when the native sources or the build change.
NATIVE := setup.py pyproject.toml CMakeLists.txt $(wildcard cmake/*) $(wildcard csrc/*) $(wildcard csrc/*/*)

$(VENV)/.ready: $(NATIVE)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet "$(TORCH)"
	$(BIN)/python -m pip install --quiet --no-deps "$(TRITON)" || echo "Going on without Triton."
	$(BIN)/python -m pip install --quiet --editable ".[dev]"
	touch $@

# Both environments are of one interpreter and share the native module, which knows no torch.
$(ZOO_VENV)/.ready: $(VENV)/.ready
	$(PYTHON) -m venv $(ZOO_VENV)
	$(ZOO_VENV)/bin/python -m pip install --quiet --upgrade pip
	$(ZOO_VENV)/bin/python -m pip install --quiet $(ZOO)
	CONVNEST_SKIP_EXTENSION=1 $(ZOO_VENV)/bin/python -m pip install --quiet --editable ".[recipes,test]"
	touch $@
