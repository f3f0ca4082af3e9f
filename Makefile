# The contributor's verbs. CI (.ci/run) and pre-commit (.pre-commit-config.yaml) run the same ones.
# LINT_PYTHON=/path/to/python uses tools that are installed already instead of making .run/lint.

SHELL := /bin/bash
.DEFAULT_GOAL := help

SERVICES := distributed-lock-py queue-py cache-py secure-app-py
PACKAGES := lock_manager message_queue mesi_cache secure_store testkit
MAINS := distributed-lock-py/src queue-py cache-py secure-app-py
REQUIREMENTS := $(SERVICES:%=%/requirements.txt) testkit/requirements.txt

# A service by its short name or its folder; every folder when none is named.
FOLDER_lock := distributed-lock-py
FOLDER_queue := queue-py
FOLDER_cache := cache-py
FOLDER_secure := secure-app-py
folders = $(if $(1),$(or $(FOLDER_$(1)),$(1)),$(SERVICES))

ifdef LINT_PYTHON
LINT := $(LINT_PYTHON)
LINT_READY :=
else
LINT := .run/lint/bin/python
LINT_READY := lint-environment
endif
PYTHON_PATH := .:scripts:distributed-lock-py/src:queue-py:cache-py:secure-app-py

.PHONY: help style format types layers security shell test sim teeth bench start stop demo check lint-environment environment

help: ## show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## /{printf "  make %-8s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

lint-environment:
	@set -euo pipefail; . scripts/lib.sh; prepare .run/lint $(REQUIREMENTS) .ci/requirements.txt

environment:
	@set -euo pipefail; . scripts/lib.sh; prepare .venv $(REQUIREMENTS)

style: $(LINT_READY) ## ruff: rules and formatting
	$(LINT) -m ruff check .
	$(LINT) -m ruff format --check .

format: $(LINT_READY) ## ruff: mend what it can, format everything
	$(LINT) -m ruff check --fix .
	$(LINT) -m ruff format .

types: $(LINT_READY) ## mypy --strict: the four packages, testkit, each main.py, the scripts
	$(LINT) -m mypy $(PACKAGES:%=-p %)
	set -e; for main in $(MAINS); do (cd $$main && $(abspath_lint) -m mypy --config-file "$(CURDIR)/pyproject.toml" main.py); done
	cd scripts && MYPYPATH=. $(abspath_lint) -m mypy --config-file "$(CURDIR)/pyproject.toml" clusters.py environment.py

abspath_lint = $(if $(filter /%,$(LINT)),$(LINT),"$(CURDIR)/$(LINT)")

layers: $(LINT_READY) ## import-linter: rooms stack one way, cores are pure, services stand alone
	PYTHONPATH=$(PYTHON_PATH) $(LINT) -c 'from importlinter.cli import lint_imports_command; lint_imports_command()'

security: $(LINT_READY) ## bandit (each finding answered where it is) and pip-audit (what is not looked up is said)
	$(LINT) .ci/bandit_findings.py
	$(LINT) .ci/vulnerabilities.py

shell: ## shellcheck
	shellcheck -x scripts/*.sh .ci/run

test: ## every test; ARGS="queue-py -k recovery" narrows
	./scripts/test.sh $(ARGS)

sim: environment ## simulation: make sim SERVICE=lock [SEED=42, replayed event by event] [ARGS="--seeds 500"]
	.venv/bin/python -m testkit.sim $(or $(SERVICE),$(error SERVICE=lock|queue|cache|secure is needed)) $(if $(SEED),--seed $(SEED) --verbose) $(ARGS)

teeth: environment ## planted bugs, each must be caught: [SERVICE=lock] [ARGS="a-bug's-id"]
	set -e; for each in $(call folders,$(SERVICE)); do .venv/bin/python -m testkit.teeth $$each $(ARGS); done

bench: environment ## measurements: [SERVICE=queue] [ARGS=...]
	set -e; for each in $(call folders,$(SERVICE)); do .venv/bin/python $$each/bench/run.py $(ARGS); done

start: ## start every cluster, or SERVICE=lock
	./scripts/start.sh $(SERVICE)

stop: ## stop every cluster, or SERVICE=lock
	./scripts/stop.sh $(SERVICE)

demo: ## play the walkthrough, or SERVICE=lock
	./scripts/demo.sh $(SERVICE)

check: style types layers security shell test ## what must be green before a commit is pushed
