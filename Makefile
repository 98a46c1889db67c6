# make run    simulate a policy on a sample trace, without torch
# make test   lint, types, import contract and tests, with torch on the CPU
#
# More for make run: POLICY=lru, TRACE=file, REPORT=folder, OPTIONS='--batch 4'.
# PYTHON chooses the interpreter (3.11 or newer). Each environment is made once, and again when
# pyproject.toml, constraints.txt or the interpreter's version changes.

PYTHON ?= python3
POLICY ?= predictive
TRACE ?= traces/samples/granular-64x8.parquet
REPORT ?= out/report
OPTIONS ?= --sizes qwen3-30b --cache 25%

VERSION    := $(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null)
RUN_STAMP  := .venv-run/.made-with-$(VERSION)
TEST_STAMP := .venv-test/.made-with-$(VERSION)
RUN        := .venv-run/bin
TEST       := .venv-test/bin
PIP        := -m pip --disable-pip-version-check install --quiet --constraint constraints.txt

.PHONY: help run test lint types unit gpu clean python
.DELETE_ON_ERROR:

help:
	@sed -n '/^#/!q; s/^# \{0,1\}//p' Makefile

run: $(RUN_STAMP)
	@$(RUN)/simctl run --policy $(POLICY) --trace $(TRACE) --report $(REPORT) $(OPTIONS)

test: lint types unit

lint: $(TEST_STAMP)
	$(TEST)/ruff check .
	$(TEST)/ruff format --check .
	$(TEST)/lint-imports --no-logo

types: $(TEST_STAMP)
	$(TEST)/mypy

unit: $(TEST_STAMP)
	$(TEST)/python -m pytest --numprocesses 2 --benchmark-disable

gpu: $(TEST_STAMP)
	$(TEST)/python -m pytest --benchmark-disable -m gpu

$(RUN_STAMP): pyproject.toml constraints.txt | python
	@echo "making .venv-run: what the simulator needs, a minute or two the first time"
	@$(PYTHON) -m venv --clear .venv-run
	@$(RUN)/python $(PIP) --editable .
	@touch $@

$(TEST_STAMP): pyproject.toml constraints.txt | python
	@echo "making .venv-test: torch and the checkers as well, a few minutes the first time"
	@$(PYTHON) -m venv --clear .venv-test
	@$(TEST)/python $(PIP) --editable '.[gpu,tune,dev]'
	@touch $@

python:
	@case "$(VERSION)" in \
	  3.1[1-9]|3.[2-9][0-9]) ;; \
	  "") echo "'$(PYTHON)' does not run; say which Python to use: make PYTHON=python3.12 ..." >&2; exit 2 ;; \
	  *) echo "Python 3.11 or newer is needed, '$(PYTHON)' is $(VERSION): make PYTHON=python3.12 ..." >&2; exit 2 ;; \
	esac

clean:
	rm -rf .venv-run .venv-test out
