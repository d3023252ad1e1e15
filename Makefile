# From a clean clone: `make demo` shows the cluster, `make test` tests it. Everything else is below or in `make help`.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= python3
export PATH := $(CURDIR)/.venv/bin:$(PATH)
export VIRTUAL_ENV := $(CURDIR)/.venv
export ANSIBLE_CONFIG := $(CURDIR)/ansible.cfg

# The controller's environment: a copy of the lock lies in it when it is whole.
VENV := .venv/requirements.txt
# Likewise what only the benchmarks need.
BENCH := .venv/bench-requirements.txt
LAYERS := lint unit templates molecule-default molecule-mixed
LONGER := molecule-day2 molecule-optional molecule-container

.PHONY: help
help: ## List these targets
	@sed -nE 's/^([a-z0-9 -]+):.*## (.*)/\1\t\2/p' $(MAKEFILE_LIST) | expand -t 48

##### Demo

.PHONY: demo
demo: $(VENV) ## Start 1 gateway and 3 GPU hosts here, roll out to them, have them speak
	@$(MAKE) --no-print-directory --jobs=2 demo-hosts envs
	@ansible-playbook --inventory inventory/demo site.yml
	@python -m testbed.demo

.PHONY: demo-hosts
demo-hosts: $(VENV)
	@python -m testbed up --inventory inventory/demo

.PHONY: demo-down
demo-down: $(VENV) ## Remove the demo's hosts, and the Docker engine if it was started for them
	@python -m testbed down --inventory inventory/demo
	@rm -rf .cache/demo

.PHONY: envs
envs: $(VENV) ## Lock and build the conda environments of the demo and the tests
	@python -m testbed.envs

##### Tests
# More processes than cores: half of the time they wait for what takes a known time.

.PHONY: test
test: $(VENV) ## Run the test layers, one after the other
	@python -m testbed.layers $(LAYERS)

.PHONY: test-all
test-all: $(VENV) ## Run them, and the scenarios that take longer
	@python -m testbed.layers $(LAYERS) $(LONGER)

.PHONY: lint
lint: $(VENV) ## Layer 1: style, types, Ansible's production profile
	ruff check .
	ruff format --check .
	mypy
	yamllint --strict .
	ansible-lint --offline

.PHONY: unit
unit: $(VENV) ## Layer 2: Python, refused inventories, modules
	pytest --quiet --numprocesses=4 --dist=loadfile tests/unit

.PHONY: templates
templates: $(VENV) ## Layer 3: rendered configurations, read by the programs they are for
	pytest --quiet --numprocesses=4 --dist=worksteal tests/templates

# Layers 4 and on, each with its hosts from bare to serving and gone again: make molecule-SCENARIO.
SCENARIOS := $(filter molecule-%,$(LAYERS) $(LONGER))
.PHONY: $(SCENARIOS)
$(SCENARIOS): molecule-%: envs
	molecule test --no-command-borders --scenario-name $*

.PHONY: faults
faults: envs ## One fault after the other on a fleet of its own under load, into docs/faults.md; half an hour
	@python -m tests.fleet.faults

.PHONY: faults-rivals
faults-rivals: $(VENV) ## Those that rivals can have too, beside them on loopback, without Docker; 11 minutes
	@python -m tests.fleet.faults rivals

##### Benchmarks

.PHONY: bench
bench: bench-gateway bench-rollout ## Measure everything anew, about 40 minutes

.PHONY: bench-gateway
bench-gateway: $(BENCH) ## The gateway beside its rivals, into docs/benchmarks
	@python -m bench gateway

.PHONY: bench-rollout
bench-rollout: $(BENCH) envs ## The roll-out beside other ways to do it, on 20 hosts in Docker, into docs/benchmarks
	@python -m bench rollout

$(BENCH): bench/requirements.txt $(VENV)
	@uv pip install --quiet --system-certs --require-hashes --requirement bench/requirements.txt \
	    || pip install --quiet --no-deps --require-hashes --requirement bench/requirements.txt
	@cp bench/requirements.txt $@

##### The controller's own environment

.PHONY: setup
setup: $(VENV) ## Install the controller's tools into .venv

$(VENV): requirements.txt
	@echo "installing the controller's environment into .venv"
	@$(PYTHON) -c 'import ensurepip' 2>/dev/null || apt-get install --quiet=2 --yes python3-venv
	@rm -rf .venv && $(PYTHON) -m venv .venv
	@sed -n '/^uv==/,/[^\]$$/p' requirements.txt > .venv/uv.txt
# uv takes 3 s where pip takes 20, but knows nothing of pip's configuration: where that names an index, pip it is.
	@pip install --quiet --require-hashes --requirement .venv/uv.txt
	@uv pip install --quiet --system-certs --require-hashes --requirement requirements.txt \
	    || pip install --quiet --no-deps --require-hashes --requirement requirements.txt
	@cp requirements.txt $@

.PHONY: lock
lock: $(VENV) ## Resolve requirements.in anew for Python 3.11 to 3.13
	uv pip compile --quiet --upgrade --universal --python-version 3.11 --generate-hashes --no-header --no-annotate \
	    --no-emit-index-url --no-emit-find-links --output-file requirements.txt requirements.in
	uv pip compile --quiet --upgrade --universal --python-version 3.11 --generate-hashes --no-header --no-annotate \
	    --no-emit-index-url --no-emit-find-links --constraint requirements.txt \
	    --output-file bench/requirements.txt bench/requirements.in
