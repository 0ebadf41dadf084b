# `make train` runs the main job, `make test` the tests; the first of them makes .venv.

PYTHON ?= $(firstword $(foreach name,python3.11 python3.12 python3.13 python3,$(shell command -v $(name))))
VENV := .venv
INSTALLED := $(VENV)/.installed
ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help train test check audit soak clean

help: ## Show this list
	@sed -n 's/^\([a-z]*\):.*## /  make \1\t/p' $(MAKEFILE_LIST) | expand -t 16

train: $(INSTALLED) ## Train the small language model; ARGS="train.steps=50 faults=[]" overrides its config
	$(VENV)/bin/elastictrain train jobs/llm_tiny.yaml $(ARGS)

test: $(INSTALLED) ## Run the test suite; ARGS="tests/cli -x" goes to pytest
	$(VENV)/bin/python -m pytest $(ARGS)

check: $(INSTALLED) ## Lint, formatting, types, and which module may import which
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports

audit: $(INSTALLED) ## Known vulnerabilities of all that is installed; asks a public database, so it needs the internet
	@test -x $(VENV)/audit/bin/pip-audit || { $(VENV)/bin/python -m venv $(VENV)/audit && \
		$(VENV)/audit/bin/python -m pip install -qq --disable-pip-version-check pip-audit; }
	$(VENV)/audit/bin/pip-audit --vulnerability-service osv --progress-spinner off --skip-editable \
		--path "$$($(VENV)/bin/python -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')" \
		|| { status=$$?; $(VENV)/bin/python -c 'import socket; socket.getaddrinfo("api.osv.dev", 443)' 2>/dev/null \
		|| echo "nothing was audited: api.osv.dev, the database that is asked, can't be reached from here" >&2; exit $$status; }

soak: $(INSTALLED) ## Hundreds of faults in one run, against the losses of an undisturbed one; half an hour
	$(VENV)/bin/python benchmarks/soak.py $(ARGS)

clean: ## Remove .venv and caches; runs/ stays
	rm -rf $(VENV) build *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# pyproject.toml or constraints.txt changed: install again, into the same venv. "compat" is a plain path in sys.path: with
# an import hook a script that lies beside the clone would take the clone's folder for the package
$(INSTALLED): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" && $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "Python 3.11 or newer is needed; name it: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV) \
		|| { rm -rf $(VENV); echo "the venv could not be made (Debian: apt-get install python3-venv)" >&2; exit 1; }
	@echo "installing into $(VENV), some minutes the first time"
	@$(VENV)/bin/python -m pip install -qq --disable-pip-version-check -c constraints.txt --config-settings editable_mode=compat \
		-e '.[dev]'
	@touch $@
