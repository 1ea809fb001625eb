# Thin: makes .venv on a fresh machine, then calls Snakemake, pytest or Jupyter. `make help` lists the targets.
SHELL := /bin/bash
PYTHON ?= python3
PROFILE ?= quick
SEEDS ?= 0
DEVICE ?= auto
BUILD ?= _build
VENV := .venv
PY := $(VENV)/bin/python
READY := $(VENV)/.ready
RUN := source $(VENV)/bin/activate &&
SNAKEMAKE := $(RUN) python -m snakemake --cores all --quiet rules --rerun-incomplete --config "profile=$(PROFILE)" "seeds=$(SEEDS)" "device=$(DEVICE)" "build=$(BUILD)"

.PHONY: book test unit notebooks gates lab bench mutations compare publish lint lock clean help

book: $(READY)  ## execute the chapters (PROFILE=quick), write the ledger, render the site
	@$(SNAKEMAKE)
	@echo "The book: $(abspath $(BUILD))/html/index.html"

test: unit notebooks gates  ## everything: unit and oracle tests, every notebook at smoke, a clean render, the gates

unit: $(READY)  ## lint, unit, property and oracle tests
	@$(RUN) ruff check .
	@$(RUN) python -m pytest -q -m "not gate" tests
	@$(RUN) python -m pytest -q --doctest-modules lib

notebooks: $(READY)  ## every notebook at profile smoke, by nbval
	@$(RUN) python -m pytest -q --nbval-lax book

gates: $(READY)  ## break the book on purpose; render it with warnings as errors; open it in a browser
	@$(RUN) python -m pytest -q -m gate tests

mutations: $(READY)  ## break the mathematics on purpose; every claim of weight 3 and more must change its verdict
	@$(RUN) OMP_NUM_THREADS=1 python -m workflow.scripts.mutations --output results/mutations.csv

lab: $(READY)  ## open the notebooks in JupyterLab
	@$(RUN) jupyter lab --notebook-dir=.

bench: $(READY)  ## measure the library against its peers, side by side
	@$(RUN) python -m benchmarks

compare: $(READY)  ## compare the last run's ledger with the published one
	@$(RUN) python -m workflow.scripts.ledger compare $(BUILD)/ledger/$(PROFILE)/ledger.csv

publish: $(READY)  ## put the last run's ledger into results/ledger.csv, its phase diagram into the README
	@$(RUN) python -m workflow.scripts.ledger publish $(BUILD)/ledger/$(PROFILE)/ledger.csv
	@$(RUN) python -m workflow.scripts.picture $(BUILD)/runs/$(PROFILE)/seed-$(firstword $(SEEDS))/bngd.ipynb phase-diagram book/_static/phase-diagram.svg

lint: $(READY)  ## style
	@$(RUN) ruff check .

lock:  ## resolve pyproject.toml anew in a clean environment and write requirements.lock
	@PYTHON=$(PYTHON) bash workflow/scripts/lock.sh

$(READY): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(0 if v >= (3, 11) else f"Python 3.11 or newer is needed, {sys.executable} is {v.major}.{v.minor}; set PYTHON=/path/to/python3.11")'
	@test -x $(PY) || $(PYTHON) -m venv $(VENV) || { echo "venv is missing: on Debian, apt-get install python3-venv"; exit 1; }
	@echo "installing what requirements.lock names into $(VENV): 2 to 5 minutes the first time"
	@$(PY) -m pip install --quiet --disable-pip-version-check -r requirements.lock
	@$(PY) -m pip install --quiet --disable-pip-version-check --no-deps --editable .
	@touch $@

clean:  ## remove what the build made (not .venv)
	rm -rf _build .snakemake .pytest_cache .ruff_cache .hypothesis build *.egg-info

help:  ## this list
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## /\1\t/' | expand -t 12
	@echo "variables: PROFILE=smoke|quick|full|paper  SEEDS=\"0 1 2\"  DEVICE=auto|cpu|cuda|mps  PYTHON=python3.11"
