# From nothing but python3: `make demo` or `make test` sets up .venv first, and again when what it was made
# from has changed. On another interpreter: make clean, then make PYTHON=python3.12 test. Without uv: make UV= test.
# Some tests, or more to read: make test PYTEST='-k keyed -v'; in one process: make test JOBS=0.

PYTHON ?= python3
UV ?= uv
PYTEST ?= -q
JOBS ?= 2
export PYTHON UV

bin := .venv/bin
installed := .venv/installed

.PHONY: help setup demo test slow lint types clean

help:  ## this list
	@sed -n 's/^\([a-z]*\):.*## /  make \1\t/p' Makefile | expand -t 14

setup: $(installed)  ## .venv with everything in it

$(installed): pyproject.toml train/pyproject.toml constraints.txt tools/setup.sh
	tools/setup.sh

demo: $(installed)  ## a student that never saw a 3, trained from a cache: no network, no accelerator
	$(bin)/softcache-train demo

test: $(installed)  ## the tests that take seconds
	$(bin)/python -m pytest $(PYTEST) -m "not slow" -n $(JOBS) --dist loadfile

slow: $(installed)  ## the tests that take minutes
	$(bin)/python -m pytest $(PYTEST) -m slow

lint: $(installed)  ## ruff: rules and format
	$(bin)/ruff check
	$(bin)/ruff format --check

types: $(installed)  ## the type checker
	$(bin)/pyright --pythonpath $(bin)/python

clean:  ## remove .venv and everything built (caches/ and runs/ are yours, and stay)
	rm -rf .venv build dist train/build train/dist *.egg-info train/*.egg-info
	rm -rf .pytest_cache .ruff_cache .hypothesis
	find softcache train tests tools -name __pycache__ -type d -prune -exec rm -rf {} +
