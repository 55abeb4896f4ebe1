# make serve       a server on http://127.0.0.1:8000 (CONFIG=configs/demo.yaml, HOST=127.0.0.1)
# make manifests   every overlay of cluster/, rendered into build/manifests/
# make docs        the documentation as a site, built into build/site/
# make english     the check of the English of all texts that a user reads
# make dashboards  Grafana's dashboards and Prometheus' rules, written into build/
# make check       for use while you work: lint, types, import contract, the site, the English and the
#                  quick tests, which need no Ray cluster, browser or server process; under
#                  3 minutes on 2 cores
# make rehearse    the first day on a GPU with tiny models on the CPU, in an environment of its own with
#                  the versions of another machine: needs Python 3.12, 6 GB of disk and 4 to 8 minutes
# make test        what each change must pass: lint, types, import contract, the English, and all tests
#                  but those with the marker `nightly`
# make nightly     the same with all tests

PYTHON ?= python3
CONFIG ?= configs/demo.yaml
HOST ?= 127.0.0.1
# tests/conftest.py orders the files.
PYTEST_ARGS ?= --numprocesses 2 --dist loadfile --no-loadscope-reorder
BIN := .venv/bin

.PHONY: install serve manifests docs english dashboards check rehearse test nightly lint types imports quick-tests tests all-tests clean

install: .venv/installed

# Built again when one of its inputs has changed.
.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed: make PYTHON=python3.11" if sys.version_info < (3, 11) else 0)'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --constraint constraints.txt --editable '.[dev]'
	touch $@

# Config files listen on all addresses, as containers must. A server on your own machine listens on
# the loopback interface only, unless HOST names another address.
serve: install
	$(BIN)/diffusion-serve serve $(CONFIG) --host $(HOST)

OVERLAYS := $(notdir $(wildcard cluster/overlays/*))

manifests: .venv/tested
	mkdir -p build/manifests
	for overlay in $(OVERLAYS); do \
		$(BIN)/kubectl kustomize cluster/overlays/$$overlay > build/manifests/$$overlay.yaml || exit 1; \
	done

# A warning, such as a link or an anchor without a target, is an error: not with --quiet, which
# would not count them.
docs: .venv/tested
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

# For the rules: tools/docs/english.py.
english: .venv/tested
	$(BIN)/python -m tools.docs.english

dashboards: install
	$(BIN)/python -m monitoring.dashboards build/dashboards
	$(BIN)/python -m monitoring.rules > build/rules.yaml

# The environment with the packages that only tests and few configurations need.
.venv/tested: .venv/installed
	$(BIN)/python -m pip install --constraint constraints.txt --editable '.[cluster,dev,docs,gguf,plan,quantize,storage,tracing]'
	touch $@

check: lint types imports docs english quick-tests

# Without docs: tests/docs/test_site.py builds the site as that does.
test: lint types imports english tests

nightly: lint types imports english all-tests

lint: install
	$(BIN)/ruff format --check
	$(BIN)/ruff check

types: .venv/tested
	$(BIN)/mypy

imports: install
	$(BIN)/lint-imports

# pyproject.toml declares the markers.
quick-tests: .venv/tested
	$(BIN)/python -m pytest --numprocesses 2 --dist worksteal -m 'not serve and not slow and not gpu and not nightly'

tests: .venv/tested
	$(BIN)/python -m pytest $(PYTEST_ARGS) -m 'not nightly'

all-tests: .venv/tested
	$(BIN)/python -m pytest $(PYTEST_ARGS)

# Not with the project's packages: this shows that the engine runs without Ray and with the versions
# of another machine.
REHEARSAL_PYTHON ?= python3.12
REHEARSAL := build/rehearsal

$(REHEARSAL)/installed: tests/benchmarks/first_day/machine.txt constraints.txt .venv/installed
	$(REHEARSAL_PYTHON) -m venv --clear $(REHEARSAL)
	$(REHEARSAL)/bin/python -m pip install --quiet --requirement tests/benchmarks/first_day/machine.txt
	$(BIN)/python -m tests.benchmarks.first_day --carry .whl
	$(REHEARSAL)/bin/python -m pip install --quiet --no-index --no-deps --target $(REHEARSAL)/packages .whl/*.whl
	touch $@

rehearse: $(REHEARSAL)/installed
	rm -f build/rehearsal.json
	PYTHONPATH=$(CURDIR)/$(REHEARSAL)/packages OMP_NUM_THREADS=1 $(REHEARSAL)/bin/python \
		-m tests.benchmarks.first_day --rehearse --minutes 10 --output build/rehearsal.json

clean:
	rm -rf .venv build *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis .import_linter_cache
