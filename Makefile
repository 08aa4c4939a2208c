# Two commands do everything, set-up included: `make demo` runs the main job, `make test` checks the whole repository.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --editable
N ?= 11270

.PHONY: demo test test-loads test-t2i bench clean

.venv/ready: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit("intersafe needs Python 3.11 or newer" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv .venv
	$(PIP) .
	touch $@

.venv/ready-test: .venv/ready
	$(PIP) '.[test]'
	touch $@

.venv/ready-bench: .venv/ready
	$(PIP) '.[bench]'
	touch $@

demo: .venv/ready
	$(BIN)/intersafe generate --n $(N) --run demo

test: .venv/ready-test
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest

# An environment of its own: torch is large, and torchvision, which others bring, breaks with some builds of it.
T2I := .venv-t2i
$(T2I)/ready: pyproject.toml
	$(PYTHON) -m venv $(T2I)
	echo '*' > $(T2I)/.gitignore
	$(T2I)/bin/python -m pip install --quiet --disable-pip-version-check --editable '.[t2i]'
	touch $@

test-t2i: $(T2I)/ready
	$(T2I)/bin/python -m pytest -m t2i tests/test_t2i.py

# A release must load where its readers are: each library in an environment of its own, as their versions exclude each other.
LOADS := datasets-3.6 datasets-4.0 datasets-4 datasets-5 pandas polars duckdb
READS_datasets-3.6 := 'datasets==3.6.*' pillow
READS_datasets-4.0 := 'datasets==4.0.*' pillow
READS_datasets-4 := 'datasets==4.*' pillow
READS_datasets-5 := 'datasets==5.*' pillow
READS_pandas := pandas pyarrow
READS_polars := polars
READS_duckdb := duckdb
.venv-loads/%/ready:
	$(PYTHON) -m venv $(@D)
	echo '*' > .venv-loads/.gitignore
	$(@D)/bin/python -m pip install --quiet --disable-pip-version-check $(READS_$*)
	touch $@

test-loads: .venv/ready-test $(LOADS:%=.venv-loads/%/ready)
	$(BIN)/python -m pytest -m loads tests/test_loads_everywhere.py

bench: .venv/ready-bench
	$(BIN)/python bench/client.py
	$(BIN)/python bench/dedup_quality.py
	$(BIN)/python bench/kills.py

clean:
	rm -rf .venv .venv-loads $(T2I) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache
