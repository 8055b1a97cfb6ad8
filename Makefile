# What a newcomer needs is `make demo` and `make test`.
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

# A run that was stopped goes on, one that is done stays as it is.
demo-fit = $(BIN)/lightning fit -c configs/demo/$(1).yaml $(if $(wildcard runs/$(1)/checkpoints/last.ckpt),--ckpt_path last)

demo: install  ## toy videos, both stages from scratch, samples, numbers and pictures
	$(call demo-fit,demo_dim8)
	$(call demo-fit,demo_latent_dim8)
	$(BIN)/lightning test -c runs/demo_latent_dim8/config.yaml
	@echo
	@cat runs/demo_latent_dim8/test/numbers.json
	@echo
	@echo "Videos         runs/demo_latent_dim8/test/*.mp4"
	@echo "Contact sheet  runs/demo_latent_dim8/test/contact_sheet.png"
	@echo "Numbers        runs/demo_latent_dim8/test/numbers.json"
	@echo "Curves         $(BIN)/tensorboard --logdir runs"

test: install  ## the tests
	$(BIN)/python -m pytest -n 2 --dist loadfile

gpu: install  ## everything that needs a GPU, measured: docs/gpu.md
	$(BIN)/python benchmarks/gpu.py

test-gpu: install  ## the tests that need GPUs, on all there are
	$(BIN)/python -m pytest tests/gpu

lint: install  ## style
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

.PHONY: help install demo test gpu test-gpu lint
