# Everything a developer or a first-time user runs. `make help` lists the goals.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
RUN ?= runs/quickstart
STAMP := $(VENV)/.installed

.PHONY: help env quickstart test lint format clean

help:  ## list the goals
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1\t\2/' | expand -t 24

env: $(STAMP)  ## virtual environment with the pinned install

# torch first and pinned: a plain `torch` would pull the CUDA build. ensurepip is missing on a bare Debian.
$(STAMP): setup.py constraints.txt
	@$(PYTHON) -c 'import ensurepip' 2>/dev/null || { echo "python3-venv is missing: apt-get install python3-venv"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet -c constraints.txt torch==2.13.0
	$(BIN)/pip install --quiet -c constraints.txt -e '.[dev]'
	@touch $(STAMP)

test: env  ## all tests that need neither a GPU nor Slurm
	$(BIN)/python -m pytest

lint: env  ## ruff: rules and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: env  ## apply ruff's fixes and format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## remove the environment and all runs
	rm -rf $(VENV) runs
