# Everything runs in .venv, which `make setup` keeps current. ARGS reaches the command behind a target:
#   make quickstart ARGS="online.num_steps=5"      make test ARGS="tests/unit -x"      make test ARGS="-n 2"

.DEFAULT_GOAL := help
.PHONY: help setup quickstart test test-all lint format lock clean

BIN := .venv/bin

help: ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | awk -F '\t' '{printf "make %-12s %s\n", $$1, $$2}'

setup: ## make or renew .venv; does nothing when it is current
	@requirements/setup.sh

quickstart: setup ## train a small model from end to end, no GPU and no hub needed
	$(BIN)/rlhf-ray train configs/quickstart.yaml $(ARGS)

test: setup ## the default tests
	$(BIN)/python -m pytest $(ARGS)

test-all: setup ## every test, the slow ones too
	$(BIN)/python -m pytest -m "slow or not slow" $(ARGS)

lint: setup ## ruff and mypy
	@status=0; \
	for check in "ruff check ." "ruff format --check ." mypy; do \
		echo "$$check"; $(BIN)/$$check || status=1; \
	done; \
	exit $$status

format: setup ## let ruff rewrite what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

lock: ## resolve requirements/*.in anew into the lock files (needs uv)
	requirements/lock.sh $(ARGS)

clean: ## remove .venv, caches and build output; runs/ stays
	rm -rf .venv build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -not -path './.git/*' -prune -exec rm -rf {} +
