# Every target sets itself up in a fresh clone, given python3 (3.11 or newer) with venv and pip.

PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed
LAB := .venv/rdma-lab
VLLM := .venv/vllm-lab
RAY := .venv/ray-lab
PLUGINS := $(wildcard plugins/*/pyproject.toml) integrations/vllm/pyproject.toml examples/backend_zeromq/pyproject.toml tests/sample_backend/files/pyproject.toml

.DEFAULT_GOAL := help
.PHONY: help install demo test test-slow test-hosts test-verbs test-vllm test-ray check format docs clean

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-11s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

install: $(INSTALLED) ## Install all packages, editable, into .venv

$(INSTALLED): pyproject.toml $(PLUGINS) constraints.txt
	@echo "Installing into .venv; what is not in pip's cache yet is downloaded, which takes minutes."
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[all,dev]' $(PLUGINS:%/pyproject.toml=-e %)
	@touch $@

demo: $(INSTALLED) ## Train a small model and send it to two workers: 40 seconds on two cores (ARGS="--steps 50")
	$(BIN)/weight-transfer demo $(ARGS)

test: export PYTHONDONTWRITEBYTECODE = # whatever the shell says: the tests start hundreds of processes
test: $(INSTALLED) ## Run the tests, four at a time: nine minutes on two cores (ARGS="-k name")
	@echo "The whole suite takes about nine minutes on two CPU cores."
	$(BIN)/python -m pytest -n 4 --dist worksteal -m 'not slow' $(ARGS)

test-slow: $(INSTALLED) ## Run the tests that are too slow for each change, one at a time
	$(BIN)/python -m pytest -m slow $(ARGS)

test-hosts: $(INSTALLED) ## Test nccl and rdma between three hosts, as network namespaces (root): 50 seconds
	$(BIN)/python -m pytest tests/hosts $(ARGS)

test-verbs: $(INSTALLED) ## Test rdma over Soft-RoCE in a virtual machine (Debian, root: installs QEMU; 89 MB)
	test -f $(LAB)/vmlinuz || bash tests/verbs/rdma-lab setup $(LAB)
	RDMA_LAB=$(LAB) $(BIN)/python -m pytest tests/verbs $(ARGS)

test-vllm: ## Test against a real vLLM on the CPU: 15 minutes, and 3 GB that it downloads and installs
	test -f $(VLLM)/.ready || bash integrations/vllm/lab/setup.sh $(VLLM)
	$(VLLM)/bin/python -m pytest -c integrations/vllm/lab/pytest.ini integrations/vllm/tests $(ARGS)

test-ray: ## Test on a local Ray cluster of three nodes: three minutes, and an environment of its own
	test -f $(RAY)/.ready || bash integrations/ray/lab/setup.sh $(RAY)
	$(RAY)/bin/python -m pytest -c integrations/ray/lab/pytest.ini integrations/ray/tests $(ARGS)

check: $(INSTALLED) ## Lint, check formatting and types, build the documentation
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/mkdocs build --strict --quiet

format: $(INSTALLED) ## Format the code and fix what the linter can fix
	$(BIN)/ruff format
	$(BIN)/ruff check --fix

docs: $(INSTALLED) ## Serve the documentation while you write it
	$(BIN)/mkdocs serve

clean: ## Remove .venv, caches and built files
	rm -rf .venv .hypothesis .mypy_cache .pytest_cache .ruff_cache dist plugins/*/dist integrations/*/dist site
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
