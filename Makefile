# FastHPM's commands; `make` alone lists them. Everything is installed into .venv, nothing needs activating.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.PHONY: help setup test lint docs demo video_demo dense_demo clean

export PATH := $(CURDIR)/.venv/bin:$(PATH)
export VIRTUAL_ENV := $(CURDIR)/.venv
unexport PYTHONPATH PYTHONHOME
# Hundreds of processes of a test run would compile the package anew.
unexport PYTHONDONTWRITEBYTECODE

help:  ## list these commands
	@awk -F ':.*## ' '/^[a-z_]+:.*## / { printf "make %-10s %s\n", $$1, $$2 }' Makefile

setup:  ## install everything into .venv (PYTHON=python3.12 chooses the interpreter)
	@bash scripts/setup.sh

test: setup  ## run the whole test suite, two files at a time (ARGS="-k mask" goes to pytest)
	.venv/bin/python -m pytest -n 2 --dist loadfile $(ARGS)

lint: setup  ## check style, types and the Dockerfile
	.venv/bin/python -m ruff check .
	.venv/bin/python -m ruff format --check .
	.venv/bin/python -m mypy
	.venv/bin/hadolint Dockerfile

docs: setup .venv/.docs-stamp  ## build the documentation into site/, warnings are errors
	.venv/bin/python -m mkdocs build --strict --quiet
	@echo "written to site/index.html"

.venv/.docs-stamp: setup.cfg constraints.txt | setup
	.venv/bin/python -m pip install --disable-pip-version-check --quiet -e ".[docs]" -c constraints.txt
	@touch $@

demo: setup  ## pretrain on Fashion-MNIST, probe, and show where the results are
	bash scripts/demo.sh

video_demo: setup  ## the same on video: moving garments, DALI, k-NN on classes of motion
	bash scripts/video_demo.sh

dense_demo: setup  ## pretrain on garments on photographs, then segment and detect them, with pictures
	bash scripts/dense_demo.sh

clean:  ## remove caches and build output; keeps .venv, data/ and runs/
	rm -rf build dist site *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -path ./.venv -prune -o -type d -name __pycache__ -exec rm -rf {} +
