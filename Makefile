# Two commands: `make demo` and `make test`. Both make the virtual environment first.
#   make demo TORCH=torch==2.13.0    pin the torch to install (a plain torch brings CUDA on Linux)
#   make demo VENV=/my/venv          use an environment that exists, with the torch that is in it
PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch
BIN = $(VENV)/bin
READY = $(VENV)/.granary-ready

.PHONY: demo test study lint bench soak clean

demo: $(READY)
	$(BIN)/harvest run --model demo --layer 2 --tokens 1.1M --allow-fewer --out cache/demo.zarr
	$(BIN)/train fit --cache cache/demo.zarr --variant batchtopk --variant topk --k 30 --passes 2 --out runs/demo
	$(BIN)/train eval runs/demo --suite heldout,core,latents
	$(BIN)/train report runs/demo
	@cat docs/next-steps.txt

test: $(READY)  # a process per core, each on one thread; whole files, so that module fixtures are made once
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder -m "not study"

study: $(READY)  # the variants' criteria on the toys, a few minutes more
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto -m study

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(READY)
	$(BIN)/python -m tests.benchmarks

soak: $(READY)
	$(BIN)/python -m tests.soak --kills 200

$(READY): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -c "import torch" 2>/dev/null || $(BIN)/python -m pip install -q "$(TORCH)"
	$(BIN)/python -m pip install -q -e ".[dev]"
	touch $@

clean:
	rm -rf .venv build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache
