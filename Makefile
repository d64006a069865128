VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: install test lint types format demo performance clean

install: ## an environment with the package, editable, and all that development needs
	python3 -m venv $(VENV)
	$(BIN)/pip install -e ".[dev]"

test:
	$(BIN)/python -m pytest -n 2

lint:
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types:
	$(BIN)/mypy

format:
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

demo:
	$(BIN)/airl-fast demo --output-dir runs/demo

performance: ## every number of docs/performance.md, again; about ten minutes, best alone
	$(BIN)/python -m benchmarks.growth
	$(BIN)/python -m benchmarks.cost_model

clean: ## what builds and tests leave behind; environments and runs stay
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	rm -f airl_fast/*.so
	find airl_fast kernels tests -name __pycache__ -type d -exec rm -rf {} +
