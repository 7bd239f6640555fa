# make demo    trains, evaluates and compares the first system on generated data
# make test    every test
# make lint    ruff and pyright
# make bench   filters against the peers that the tests install (ten minutes); for all
#              of them, pip install -e .[train,peers] in an environment of its own
# make claims  the claims of the first system over seeds (long)
PYTHON ?= python3
BIN := .venv/bin
export PYTHONUNBUFFERED := 1

.PHONY: demo test lint bench claims requirements clean

RUNS := runs/demo
SMALL := configs/texture_suppression.py:small

demo: .venv/train
	$(BIN)/python train.py --config=$(SMALL) --workdir=$(RUNS)/plain --config.suppression.policy=original
	$(BIN)/python train.py --config=$(SMALL) --workdir=$(RUNS)/suppressed
	$(BIN)/python eval.py --workdir=$(RUNS)/plain,$(RUNS)/suppressed --output=$(RUNS)/report

test: .venv/test
	$(BIN)/python -m pytest -n 2

lint: .venv/test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

bench: .venv/test
	$(BIN)/python -m benchmarks.filters

claims: .venv/train
	$(BIN)/python -m benchmarks.claims texture_suppression --seeds 0 1 2 3 4 5

.venv/train: requirements.txt pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@echo "installing into .venv (a minute or two)"
	$(BIN)/python -m pip install -q --disable-pip-version-check -r requirements.txt
	$(BIN)/python -m pip install -q --disable-pip-version-check --no-deps -e .
	touch $@

.venv/test: requirements-test.txt .venv/train
	$(BIN)/python -m pip install -q --disable-pip-version-check -r requirements-test.txt
	touch $@

# Needs uv. The pins hold for Python 3.11 and later on every platform.
requirements:
	uv pip compile -q --universal --python-version 3.11 --no-header --no-annotate --extra train pyproject.toml requirements.in -o requirements.txt
	uv pip compile -q --universal --python-version 3.11 --no-header --no-annotate --extra train --extra test -c requirements.txt pyproject.toml requirements.in -o requirements-test.txt

clean:
	rm -rf .venv runs build *.egg-info .pytest_cache .ruff_cache
