# Every target starts from a bare machine: tools/bootstrap.sh makes .venv, installs torch (CPU) and what the target
# needs, and builds the native module. With a torch of your own:  make test PYTHON=/path/to/python

.DEFAULT_GOAL := help
.PHONY: help build demo test lint format docs bench cuda-check wheel clean

# The interpreter of the environment that bootstrap.sh has made for these requirement files.
bootstrap = PYTHON=$(PYTHON) TORCH='$(TORCH)' tools/bootstrap.sh

help:  ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

build:  ## build and install the package, editable, and say what it can do
	@python=$$($(bootstrap) build) && $$python -m ffr_ext info

demo:  ## train on real images without a penalty, with FFR, with FFR and scales; draw the pictures under runs/demo
	@python=$$($(bootstrap) demo) && $$python examples/demo.py $(ARGS)

test:  ## everything pytest knows; ARGS="-k name" for less
	@python=$$($(bootstrap) test) && $$python -m pytest $(ARGS)

lint:  ## ruff, mypy, clang-format; changes nothing
	@python=$$($(bootstrap) test dev) && $$python tools/lint.py

format:  ## let ruff and clang-format rewrite the sources
	@python=$$($(bootstrap) test dev) && $$python tools/lint.py --fix

docs:  ## the pages and the API reference as HTML, in build/docs; a broken link or docstring fails
	@python=$$($(bootstrap) docs) && $$python -m sphinx -W --keep-going -q -b html docs build/docs

bench:  ## the benchmarks of benchmarks/
	@python=$$($(bootstrap) test) && $$python -m benchmarks $(ARGS)

cuda-check:  ## compile every CUDA kernel for every architecture (needs nvcc, no GPU)
	@python=$$($(bootstrap) build) && $$python tools/cuda_check.py

wheel:  ## a wheel for other Linux machines, in dist
	@python=$$($(bootstrap) dev) && $$python tools/make_wheel.py

clean:  ## remove what was built; .venv and runs stay
	rm -rf build dist *.egg-info ffr_ext/_C*.so ffr_ext/_build_record.json .pytest_cache .mypy_cache .ruff_cache .hypothesis
