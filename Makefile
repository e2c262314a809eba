VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin

.PHONY: install demo test fuzz tables

install: $(VENV)/installed

# The constraints pin every dependency, so that tomorrow's release of one cannot break today's demo.
$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev,foreign,zoo]'
	@touch $@

demo: install
	$(BIN)/bench run quick

test: install
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/pytest -n auto --dist loadfile

# An hour of new input of every kind; FUZZ_EXAMPLES=200 takes a minute or two.
FUZZ_EXAMPLES ?= 10000
fuzz: install
	FUZZ_EXAMPLES=$(FUZZ_EXAMPLES) $(BIN)/pytest -m fuzz

# The committed tables, from the committed rows: what stands below the mark in the README of each board.
BOARDS := $(wildcard leaderboards/*/flags.json)
tables: install
	for board in $(BOARDS:/flags.json=); do \
		sed -i.old '/<!-- tables -->/q' $$board/README.md && rm $$board/README.md.old; \
		$(BIN)/bench leaderboard $$board >> $$board/README.md; \
	done
