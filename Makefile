# Two commands: `make demo` and `make test`. Each target sets up .venv first, again only when what it
# depends on has changed. TORCH and PYTHON can be overridden: make test TORCH=torch==2.12.0
TORCH ?= torch==2.13.0
TRANSFORMERS_LATEST ?= transformers==5.23.0
PYTHON ?= python3
VENV ?= .venv

BIN := $(abspath $(VENV))/bin
PIP := PATH="$(BIN):$$PATH" $(BIN)/python -m pip --disable-pip-version-check install -q
SOURCES := $(shell find csrc -name "*.cpp" -o -name "*.h" -o -name "*.cu" -o -name "*.cuh")
EMULATION := $(wildcard python_tests/cuda_kernels/*.cpp python_tests/cuda_kernels/*.h)
# One stamp for each torch that is asked for, so that another one is installed when TORCH changes.
TOOLS := $(VENV)/.tools-$(subst /,_,$(subst =,-,$(firstword $(TORCH))))
LATEST := $(abspath $(VENV))/transformers-latest
PYTEST := $(BIN)/python -m pytest -q
# Processes that tests are spread over; each needs about 2 GB.
JOBS ?= 2
SPREAD := -n $(JOBS) --dist worksteal

.PHONY: setup demo test test-all test-latest test-triton resources lint format bench gpu clean

setup: $(VENV)/.built

$(TOOLS): constraints.txt
	$(PYTHON) -m venv $(VENV)
	rm -f $(VENV)/.tools-*
	$(PIP) $(TORCH)
	$(PIP) -c constraints.txt cmake ninja pybind11 setuptools wheel
	touch $@

# Editable, so only the C++ is ever built again.
$(VENV)/.built: $(TOOLS) pyproject.toml setup.py CMakeLists.txt $(SOURCES)
	$(PIP) -c constraints.txt --no-build-isolation -e '.[dev]'
	touch $@

# The newest transformers, beside the pinned one.
$(LATEST)/.installed: $(VENV)/.built Makefile
	rm -rf $(LATEST)
	$(PIP) --no-deps --target $(LATEST) "$(TRANSFORMERS_LATEST)"
	touch $@

demo: setup
	$(BIN)/cdrop demo --out demo.png

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(SOURCES) $(EMULATION)
	$(BIN)/mypy

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(SOURCES) $(EMULATION)

test: lint test-latest test-all test-triton

test-all: setup
	$(PYTEST) $(SPREAD)

test-latest: $(LATEST)/.installed
	PYTHONPATH=$(LATEST) $(PYTEST) $(SPREAD) python_tests/hf

# The Triton kernels on the CPU: the interpreter is chosen before Triton is imported.
test-triton: setup
	TRITON_INTERPRET=1 $(PYTEST) $(SPREAD) python_tests/triton_ops/interpreted

bench: setup
	mkdir -p build
	$(PYTEST) benchmarks --benchmark-only --benchmark-json=build/bench.json
	$(BIN)/python benchmarks/summary.py build/bench.json

# Not in .venv: the Python that is there, with its torch and triton. Without PART: build, tests,
# sanitize, bench, in nine minutes. PART: any of these, growth, e2e, serve, hf, profile, micro, others
# that benchmarks/README.md lists, or all.
gpu:
	$(PYTHON) benchmarks/gpu.py $(PART)

resources: setup
	$(BIN)/python -m python_tests.triton_ops.aot
	$(BIN)/python -m python_tests.cuda_kernels.resources

clean:
	rm -rf $(VENV) build consensusdrop_kernels/*.so *.egg-info
