# Everything a newcomer needs: `make demo`, `make test`.
PYTHON ?= python3
BIN := .venv/bin
export HF_HUB_OFFLINE = 1

help:  ## this list
	@grep -E '^[a-z-]+:.*##' Makefile | sed -E 's/:.*## /\t/' | expand -t 12

$(BIN)/.installed: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --progress-bar on -e '.[dev]'
	touch $@

install: $(BIN)/.installed  ## a virtual environment in .venv with everything in it

demo: install  ## toy videos, both stages from scratch, samples, numbers and pictures
	test -f runs/dim8/checkpoints/last.ckpt || $(BIN)/lightning fit -c configs/dim8.yaml
	test -f runs/latent_dim8/checkpoints/last.ckpt || $(BIN)/lightning fit -c configs/latent_dim8.yaml
	$(BIN)/lightning test -c runs/latent_dim8/config.yaml

test: install  ## the tests that take seconds
	$(BIN)/python -m pytest -m 'not slow'

test-all: install  ## all tests
	$(BIN)/python -m pytest

lint: install  ## style
	$(BIN)/ruff check . && $(BIN)/ruff format --check .

.PHONY: help install demo test test-all lint
