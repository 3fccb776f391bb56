# Two commands on a fresh clone: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test test-fast lint bench clean
.DEFAULT_GOAL := demo

$(BIN)/activate:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: $(BIN)/activate pyproject.toml constraints.txt
	$(BIN)/pip install --quiet -c constraints.txt -e '.[decode]'
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(BIN)/pip install --quiet -c constraints.txt -e '.[dev]'
	touch $@

demo: $(VENV)/.installed  ## The whole story on the toy world, about five minutes on two CPU cores
	$(BIN)/probing demo

test: lint  ## Style, types and all tests, on the CPU; `tests/gpu.sh` runs what needs a GPU
	CUDA_VISIBLE_DEVICES= $(BIN)/pytest -n 2 --dist loadfile

test-fast: $(VENV)/.installed-dev  ## Only the quick tests
	CUDA_VISIBLE_DEVICES= $(BIN)/pytest -n 2 --dist loadfile -m "not slow"

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/.installed-dev  ## The figures of tests/benchmarks/README.md
	for name in fit_step reference scaling memory alignment distill_step evaluation buffer code_length coco_size reading peers gpu_step; do TQDM_DISABLE=1 $(BIN)/python -m tests.benchmarks.$$name || exit 1; done

clean:
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache build *.egg-info
