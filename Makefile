# make demo · make test · make check · make bench · make docs
#
# Each target first builds .venv (again, when pyproject.toml changed), with the newest suitable Python on the PATH; to choose one:
#   make test PYTHON=/usr/local/bin/python3.12
# Further arguments go through ARGS:   make test ARGS="-k breaker"   make demo ARGS="--json"

PYTHON :=
ARGS :=
QUICK :=

BIN := .venv/bin
# Written last, into the environment itself: one that was left half built has none.
READY := .venv/.ready
TYPED_TESTS := $(wildcard tests/typing/*.py)
# A benchmark answers a question when it is run; what several of them share does not.
BENCHMARKS = $(shell grep -l '^if __name__ == "__main__"' $(wildcard benchmarks/*.py) /dev/null)

MAKEFLAGS += --no-builtin-rules
.DEFAULT_GOAL := help
.PHONY: help venv demo test coverage check format format-check lint types typed-tests contracts docs bench

help:
	@echo "make demo      watch poison messages survive crashes and rollbacks (ARGS: see 'retrykit demo --help')"
	@echo "make test      the whole test suite"
	@echo "make check     format, lint, types, architecture contracts, documentation"
	@echo "make bench     every benchmark (QUICK=1: under a minute each)"
	@echo "make docs      the documentation, in docs/_build/html"
	@echo "make coverage  the test suite with branch coverage; the core modules need all of it"
	@echo "make format    rewrite the sources in the project's format"

venv: $(READY)

demo: $(READY)
	$(BIN)/retrykit demo $(ARGS)

test: $(READY)
	$(BIN)/python -m pytest -n auto $(ARGS)

coverage: $(READY)
	$(BIN)/python -m pytest -n auto --cov --cov-report=term $(ARGS)
	$(BIN)/coverage report --include='retrykit/*.py' --fail-under=100

check: format-check lint types typed-tests contracts docs

format: $(READY)
	$(BIN)/ruff format
	$(BIN)/ruff check --fix

format-check: $(READY)
	$(BIN)/ruff format --check

lint: $(READY)
	$(BIN)/ruff check --output-format=concise

types: $(READY)
	$(BIN)/mypy

# What a user's type checker sees: both checkers must accept the same file.
typed-tests: $(READY)
ifneq ($(TYPED_TESTS),)
	$(BIN)/mypy $(TYPED_TESTS)
	$(BIN)/pyright --pythonpath $(BIN)/python $(TYPED_TESTS)
endif

contracts: $(READY)
	$(BIN)/lint-imports

docs: $(READY)
	$(BIN)/sphinx-build --fail-on-warning --keep-going --builder html docs docs/_build/html

bench: $(READY)
	@set -e; for script in $(BENCHMARKS); do \
	  echo "== $$script"; \
	  $(BIN)/python "$$script" $(if $(QUICK),--quick) $(ARGS); \
	done

# Two makes at once take turns where flock(1) exists; the second finds the work done.
$(READY): pyproject.toml
	@set -eu; \
	if command -v flock >/dev/null; then \
	  exec 9>.venv.lock; flock 9; \
	  if [ -e $@ ] && [ -z "$$(find pyproject.toml -newer $@)" ]; then exit 0; fi; \
	fi; \
	chosen=; bare=; \
	for python in $(or $(PYTHON),python3.14 python3.13 python3.12 python3.11 python3); do \
	  "$$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 || continue; \
	  if "$$python" -c 'import ensurepip, venv' >/dev/null 2>&1; then chosen=$$python; break; fi; \
	  bare="$$bare $$python"; \
	done; \
	if [ -z "$$chosen" ] && [ -n "$$bare" ]; then \
	  echo "retrykit: cannot build .venv:$$bare came without the modules venv and ensurepip."; \
	  echo "retrykit: install them (Debian, Ubuntu: apt install python3-venv) or name another Python: make PYTHON=/path/to/python3"; \
	  exit 1; \
	fi >&2; \
	if [ -z "$$chosen" ]; then \
	  echo "retrykit: cannot build .venv: Python 3.11 or newer is needed; tried $(or $(PYTHON),python3.14 python3.13 python3.12 python3.11 python3)."; \
	  echo "retrykit: install one or name it: make PYTHON=/path/to/python3"; \
	  exit 1; \
	fi >&2; \
	echo "retrykit: building .venv with $$chosen ($$("$$chosen" --version))"; \
	"$$chosen" -m venv --clear .venv; \
	$(BIN)/python -m pip install --upgrade "pip>=25.1"; \
	$(BIN)/python -m pip install --group dev --editable ".[all]"; \
	touch $@
