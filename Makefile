PYTHON ?= python3
BIN := .venv/bin
# Workers of the test suite; one thread each.
JOBS ?= 2

.PHONY: demo test lint bench clean

# The environment is made once and again whenever pyproject.toml changes.
.venv.ok: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable ".[dev]"
	touch $@

demo: .venv.ok
	$(BIN)/python scripts/demo.py

lint: .venv.ok
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

test: lint
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile

bench: .venv.ok
	$(BIN)/python scripts/bench_import.py

clean:
	rm -rf .venv .venv.ok demo build dist
