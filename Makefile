PYTHON ?= python3
BIN := .venv/bin
# Workers of the test suite; one thread each.
JOBS ?= 2

.PHONY: demo test test-all test-kernels test-timm lint dist docs bench clean

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
	$(BIN)/python -m pytest -n $(JOBS) --dist loadgroup --max-worker-restart 0

# Every check of the contract on every registered model in full size: hours.
test-all: test
	$(BIN)/python -m pytest -n $(JOBS) -m all_models

# What computes, with the kernels of other CPUs and with two threads: no test may depend on the last bit of one.
KERNELS ?= ATEN_CPU_CAPABILITY=default ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 \
	ONEDNN_MAX_CPU_ISA=SSE41 OMP_NUM_THREADS=2
test-kernels: .venv.ok
	set -e; for kernels in $(KERNELS); do echo "$$kernels"; \
	env $$kernels $(BIN)/python -m pytest -n $(JOBS) --dist loadgroup --max-worker-restart 0 -m "numbers and not all_models"; done

# timm's own tests of models over small networks of this package: two minutes.
test-timm: .venv.ok
	$(BIN)/python scripts/test_timm.py

# sdist and wheel, and the README's first block from the wheel alone.
dist: .venv.ok
	rm -rf dist
	$(BIN)/python -m hatchling build -d dist
	$(PYTHON) scripts/try_wheel.py dist

# The site, into docs/site. In its own environment: it needs nothing of this package's.
docs:
	test -x build/docs/bin/python || $(PYTHON) -m venv build/docs
	build/docs/bin/python -m pip install --quiet "zensical>=0.0.50" "mkdocstrings[python]>=1.0"
	cd docs && ../build/docs/bin/zensical build --clean --strict -f zensical.toml

bench: .venv.ok
	$(BIN)/python scripts/bench_import.py

clean:
	rm -rf .venv .venv.ok .timm_tests demo build dist
