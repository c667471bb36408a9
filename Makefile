# Every target that runs lrface makes .venv first, once. No target needs anything but make, Python and a package registry.
SHELL := /bin/bash
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
MAKEFLAGS += --no-builtin-rules
.PHONY: help setup demo test test-slow lint bench docs wheel clean distclean

INSTALLED := .venv/installed
RUN := .venv/bin/python

# A process a core, of one thread, is faster than threads: what the tests train is small. Each takes a gigabyte. Tests of
# one file share what is expensive to make, and so a process.
CORES := $(shell nproc 2>/dev/null || getconf _NPROCESSORS_ONLN 2>/dev/null || echo 2)
FEW_CORES := $(shell echo $$(( $(CORES) < 4 ? $(CORES) : 4 )))
test: export OMP_NUM_THREADS := $(or $(OMP_NUM_THREADS),1)
test-slow: export OMP_NUM_THREADS := $(or $(OMP_NUM_THREADS),$(FEW_CORES))
test test-slow: export MPLBACKEND := Agg

help: ## show this list
	@echo 'make TARGET, where TARGET is'
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  \1\t\2/p' Makefile | expand -t 14
	@echo 'Variables: PYTHON=python3.12 (for setup), ONLY=name and QUICK=1 (for bench), OUT=folder (for demo)'

setup: $(INSTALLED) ## make .venv and install lrface with its dev and bench extras, where that is not done

# An install that was interrupted leaves .venv/installing behind: what lies there may be half a package, so .venv is
# made anew.
$(INSTALLED): pyproject.toml
	@set -eu; \
	rm -f $(INSTALLED); \
	if [ ! -x $(RUN) ] || [ -e .venv/installing ]; then \
		usable='import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))'; python=; \
		for candidate in $(if $(PYTHON),'$(PYTHON)',python3.11 python3 python3.13 python3.12 python); do \
			if "$$candidate" -c "$$usable" >/dev/null 2>&1; then python=$$candidate; break; fi; \
		done; \
		if [ -z "$$python" ]; then \
			echo 'error: no usable Python: $(or $(PYTHON),python3.11 and python3) should be 3.11 or newer and have venv and pip' >&2; \
			echo '(on Debian and Ubuntu: apt-get install python3-venv). Choose one with: make setup PYTHON=/path/to/python3.11' >&2; \
			exit 1; \
		fi; \
		echo "setup: .venv with $$("$$python" --version)"; \
		rm -rf .venv; \
		mkdir .venv; \
		touch .venv/installing; \
		"$$python" -m venv .venv; \
	fi; \
	touch .venv/installing; \
	echo 'setup: installing lrface and what it needs (PyTorch is large: minutes the first time)'; \
	quiet=--quiet; if [ -t 1 ]; then quiet=; fi; \
	$(RUN) -m pip install $$quiet --disable-pip-version-check -e '.[dev,bench]'; \
	rm .venv/installing; \
	if ! $(RUN) -c 'import cv2'; then \
		echo 'error: OpenCV does not load: the machine lacks system libraries that it needs' >&2; \
		echo '(on Debian and Ubuntu: apt-get install libgl1 libglib2.0-0 libxcb1). Then run the same command again' >&2; \
		exit 1; \
	fi; \
	touch $(INSTALLED)

demo: $(INSTALLED) ## the whole job on embedded data: align, train, verify, embed; at most 10 minutes on 2 cores
	.venv/bin/lrface demo --out '$(or $(OUT),demo-output)'

test: lint ## the default test suite: lint, format, types, tests
	$(RUN) -m pytest -m 'not slow' -n $(FEW_CORES) --dist loadfile

test-slow: $(INSTALLED) ## the checks on real data that take minutes
	$(RUN) -m pytest -m slow

lint: $(INSTALLED) ## ruff and mypy
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

bench: $(INSTALLED) ## measure against the tools it replaces -> eval/results/bench.json; ONLY=name for one
	$(RUN) eval/bench.py $(if $(ONLY),--only '$(ONLY)') $(if $(QUICK),--quick)

docs: $(INSTALLED) ## build the site of docs/ into site/, the tutorial run for it; a broken link is an error
	$(RUN) -m mkdocs build --strict

wheel: $(INSTALLED) ## build the wheel into dist/
	$(RUN) -m build --wheel --no-isolation --outdir dist .

clean: ## remove what building, testing and the demo left; .venv and runs/ stay
	rm -rf build dist site demo-output *.egg-info .pytest_cache .mypy_cache .ruff_cache
	find . -name __pycache__ -type d -not -path './.venv/*' -prune -exec rm -rf {} +

distclean: clean ## also remove .venv
	rm -rf .venv
