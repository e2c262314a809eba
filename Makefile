VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin

.PHONY: install demo browser test fuzz tables site docs

install: $(VENV)/installed

# The constraints pin every dependency, so that tomorrow's release of one cannot break today's demo.
$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev,foreign,openvino,site,zoo]'
	@touch $@

demo: install
	$(BIN)/bench run quick

# A Chromium of the distribution, where there is none and packages can be installed without asking anyone; the tests that
# drive one skip without it, and say so.
browser:
	@which chromium chromium-browser google-chrome | grep -q . || { \
		[ "$$(id -u)" = 0 ] && which apt-get > /dev/null \
		&& timeout 180 sh -c 'apt-get -qq update && DEBIAN_FRONTEND=noninteractive \
			apt-get -qq install --yes --no-install-recommends chromium' > /dev/null 2>&1; \
	} || echo "no Chromium, and none could be installed: the tests that open the site will skip"

test: install browser
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/pytest -n auto --dist loadfile

# An hour of new input of every kind; FUZZ_EXAMPLES=200 takes a minute or two.
FUZZ_EXAMPLES ?= 10000
fuzz: install
	FUZZ_EXAMPLES=$(FUZZ_EXAMPLES) $(BIN)/pytest -m fuzz

# The committed tables, from the committed rows: what stands below the mark in the README of each board; and the page of
# every figure and sign, from their catalogues.
BOARDS := $(wildcard leaderboards/*/flags.json)
tables: install
	for board in $(BOARDS:/flags.json=); do \
		sed -i.old '/<!-- tables -->/q' $$board/README.md && rm $$board/README.md.old; \
		$(BIN)/bench leaderboard $$board >> $$board/README.md; \
	done
	$(BIN)/python -m bench.report.figures_page > docs/figures.md

# The committed boards as web pages; open runs/site/index.html.
SITE ?= runs/site
site: install
	$(BIN)/bench site leaderboards --out $(SITE)

# The documentation as a site, in an environment of its own; a dead link or anchor fails.
DOCS_VENV ?= .venv-docs
docs: $(DOCS_VENV)/installed
	NO_MKDOCS_2_WARNING=1 $(DOCS_VENV)/bin/mkdocs build --strict

$(DOCS_VENV)/installed: pyproject.toml
	$(PYTHON) -m venv $(DOCS_VENV)
	$(PYTHON) -c "import tomllib; print(*tomllib.load(open('pyproject.toml', 'rb'))['project']['optional-dependencies']['docs'], sep='\n')" \
		| $(DOCS_VENV)/bin/pip install --quiet --disable-pip-version-check --requirement /dev/stdin
	@touch $@
