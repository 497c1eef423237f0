# Every target bootstraps .venv from a bare Python >= 3.11 with pip alone.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt

.DEFAULT_GOAL := help
.PHONY: help cascade test multiprocess chaos chaos-short stores slurm fuzz parity llama aot plan wheel docs notebooks lint format clean

help:
	@echo "make cascade   the tiny family from one recipe, on this machine (10 to 15 minutes on 2 cores)"
	@echo "make test      the tests"
	@echo "make multiprocess   jobs of one, two and four processes against each other"
	@echo "make chaos     jobs of two processes, killed, stopped, hung and starved of disk (about 20 minutes on 2 cores)"
	@echo "make stores    a run in an emulated bucket, killed, against a local one; data, a logit store and an export at s3://"
	@echo "make fuzz      10,000 malformed files, each read or refused in one sentence, with little memory"
	@echo "make parity    the model against torch and transformers, live"
	@echo "make llama     exported GGUF files read by llama.cpp, which is built the first time (about 10 minutes on 2 cores)"
	@echo "make aot       a step of the real family compiled for 64 TPU chips that are not there (2 to 5 minutes)"
	@echo "make plan      what XLA's compiler allots to the real family on TPUs that are not there, beside what is predicted (about 25 minutes on 2 cores, the second time 2)"
	@echo "make wheel     a wheel, checked far from the checkout"
	@echo "make lint      formatting, lint, spelling, the order of imports, and types"
	@echo "make docs      the site, in build/site"
	@echo "make notebooks the notebooks of examples/, executed"

$(VENV)/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed, this is " + sys.version)'
	$(PYTHON) -m venv $(VENV)
	$(PIP) -e '.[dev]'
	@touch $@

$(VENV)/parity: $(VENV)/installed
	$(PIP) -e '.[parity]'
	@touch $@

# For any x86-64 with AVX2, as its published builds are: what is built for AMX tiles ends in an illegal instruction where
# a thread has not set them up. A wheel of before in pip's cache would not ask how it is to be built.
$(VENV)/llama: $(VENV)/installed
	CMAKE_ARGS=-DGGML_NATIVE=OFF $(PIP) --no-cache-dir -e '.[llama]'
	@touch $@

$(VENV)/docs: $(VENV)/installed
	$(PIP) -e '.[docs]'
	@touch $@

# Beside the other packages: where JAX finds libtpu it looks for a TPU.
$(VENV)/aot/installed: $(VENV)/installed
	$(PIP) --no-deps --upgrade --target $(VENV)/aot $$(sed -n 's/^aot = \["\(.*\)"\]/\1/p' pyproject.toml)
	@touch $@

cascade: $(VENV)/installed
	$(BIN)/ministral-jax run configs/tiny.yaml

test: $(VENV)/installed
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

multiprocess: $(VENV)/installed
	$(BIN)/python -m pytest -s -m multiprocess tests/multiprocess

chaos: $(VENV)/installed
	$(BIN)/python -m pytest -s -m chaos tests/chaos

# Every kind of harm, at fewer moments: what the whole check runs.
chaos-short: $(VENV)/installed
	$(BIN)/python -m pytest -s -m chaos tests/chaos --kills 9

# A run in an emulated bucket, killed twice, in a network that has nothing but the loopback.
stores: $(VENV)/installed
	$(BIN)/python benchmarks/buckets.py --kills 2

slurm: $(VENV)/installed
	$(BIN)/python -m pytest -s -m slurm tests/slurm

fuzz: $(VENV)/installed
	$(BIN)/python tests/fuzz/fuzzer.py --files 10000

parity: $(VENV)/parity
	$(BIN)/python -m pytest -m parity tests/parity

llama: $(VENV)/llama
	$(BIN)/python -m pytest -s -m llama tests/llama

aot: $(VENV)/aot/installed
	PYTHONPATH=$(VENV)/aot $(BIN)/python -m pytest -m aot tests/planning

# Short rows on 64 and 128 chips, long ones on 512, and an online stage, which samples.
PLAN := PYTHONPATH=$(VENV)/aot $(BIN)/ministral-jax plan --compile
plan: $(VENV)/aot/installed
	$(PLAN) configs/ministral3_base.yaml configs/machines/v5p-128.yaml 14b-short 8b-short 3b-short --on v5p:4x4x4
	$(PLAN) configs/ministral3_base.yaml configs/machines/v5p-256.yaml 14b-short --on v5p:4x4x8
	$(PLAN) configs/ministral3_base.yaml configs/machines/v5p-1024.yaml 14b-base --on v5p:8x8x8
	$(PLAN) configs/ministral3.yaml 14b-instruct --on v5p:4x4x4 stages.14b-instruct.evaluate.prompts=64

# A wheel alone, far from the checkout, finds the recipes that it carries.
wheel: $(VENV)/installed
	rm -rf dist && $(BIN)/pip wheel --quiet --disable-pip-version-check --no-deps -w dist .
	rm -rf build/wheel && $(BIN)/pip install --quiet --disable-pip-version-check --no-deps --target build/wheel dist/*.whl
	cd / && PYTHONPATH=$(CURDIR)/build/wheel $(CURDIR)/$(BIN)/python -c "import ministral_jax, ministral_jax.recipe.load as r; assert 'build' in ministral_jax.__file__; print(len(r.load_recipe('configs/tiny.yaml').stages), 'stages, from', ministral_jax.__file__)"

# A page or a link that is missing is an error. Nothing is fetched, and the pages fetch nothing.
docs: $(VENV)/docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# Their outputs are not kept: a cell that raises is an error.
notebooks: $(VENV)/docs
	JAX_PLATFORMS=cpu $(BIN)/jupyter-execute --startup_timeout=300 examples/*.ipynb

lint: $(VENV)/installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/codespell
	$(BIN)/lint-imports --no-cache
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/pyright -p pyright.strict.json --pythonpath $(BIN)/python

format: $(VENV)/installed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf runs build dist
