# The two commands: `make serve` and `make test`. Everything else: `make help`.
# Nothing is installed outside .venv; a second run reuses what is there.

CONFIG ?= configs/local.yaml
TORCH_INDEX ?= cpu
VENV ?= .venv
ARGS ?=
BIN := $(VENV)/bin

# The first Python that really runs and has a version we support, or PYTHON=… from the caller.
PYTHON ?= $(shell for name in python3.11 python3.12 python3; do \
	$$name -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 13))' \
	>/dev/null 2>&1 && { echo $$name; break; }; done)

# Ctrl-C reaches the whole foreground group: let each program say its own last word, not make.
QUIET := trap 'exit 0' INT;
BOOTSTRAP = $(QUIET) $(if $(PYTHON),$(PYTHON),$(error no Python 3.11 or 3.12 found; \
	install one or name it: make $(MAKECMDGOALS) PYTHON=/path/to/python3.11)) \
	-I serve_app/cli/bootstrap.py --venv $(VENV) --torch-index $(TORCH_INDEX)

.DEFAULT_GOAL := help
.PHONY: help serve chat monitor install install-test test test-ipex check bench bench-peers wheel clean distclean

help: ## Show this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1|\2/p' Makefile | column -t -s '|' 2>/dev/null \
	|| sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1  \2/p' Makefile
	@echo "variables: CONFIG=$(CONFIG) TORCH_INDEX=$(TORCH_INDEX) (cpu, xpu, cuda) PYTHON VENV ARGS"

install: ## Make .venv with XeRay and the embedded model
	@$(BOOTSTRAP)

install-test: ## The same with what the tests need
	@$(BOOTSTRAP) --extra test

serve: install ## Start the application of CONFIG on http://127.0.0.1:8000
	@$(QUIET) $(BIN)/xeray serve $(CONFIG) $(ARGS)

chat: install ## Talk to a running server from the terminal
	@$(QUIET) $(BIN)/xeray chat $(ARGS)

monitor: install ## Start Prometheus, and Grafana where installed, with rules and dashboards
	@$(QUIET) $(BIN)/xeray monitor $(ARGS)

test: install-test ## Run all tests
	@$(BIN)/python -m pytest -n 2 $(ARGS)

test-ipex: ## The ipex engine on the real extension, in .venv-ipex (about 8 GB)
	@$(if $(PYTHON),$(PYTHON),python3) -I serve_app/cli/ipex_environment.py --venv .venv-ipex
	@.venv-ipex/bin/python -m pytest -m ipex -s tests/ipex $(ARGS)

check: install-test ## Format, lint, types and layers
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports

bench: install ## Measure this machine: the engine, the overhead above it, and HTTP
	@$(QUIET) $(BIN)/xeray bench $(ARGS)

bench-peers: install ## The engines beside llama.cpp, OpenVINO GenAI and transformers
	@$(QUIET) $(BIN)/xeray bench peers $(ARGS)

wheel: install-test ## Build the wheel into dist/
	@$(BIN)/python -m build --wheel

clean: ## Remove what builds and tests left, but not .venv
	@rm -rf build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .import_linter_cache .hypothesis
	@find serve_app tests -type d -name __pycache__ -prune -exec rm -rf {} +

distclean: clean ## Remove .venv too
	@rm -rf $(VENV)
