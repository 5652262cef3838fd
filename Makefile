# make demo: see the whole thing work (KEEP=1: and leave it running). make test: check it. make up: start the service.
# Each does all the set-up it needs, without root, Docker, Redis or a GPU.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export PIP_CONSTRAINT := $(CURDIR)/constraints.txt
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: demo test bench chaos contract up lint clean

# The stamp is newer than what decides the installation, so nothing is installed twice.
$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet torch==$$(sed -n 's/^torch==//p' constraints.txt)
	$(BIN)/pip install --quiet --editable '.[dev]'
	touch $@

demo: $(VENV)/installed
	$(BIN)/vlm-dft demo $(if $(KEEP),--keep)

up: $(VENV)/installed
	$(BIN)/vlm-dft up

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/basedpyright
	$(BIN)/lint-imports

test: lint
	$(BIN)/pytest -n auto --maxprocesses 4

# Every benchmark, one JSON line each, beside the peers it names: on a machine that does nothing else.
bench: $(VENV)/installed
	$(BIN)/pip install --quiet --editable '.[dev,peers]'
	$(BIN)/python -m benchmarks all

# Minutes of faults over both stacks together; the README's figure: make chaos MINUTES=30 SEED=1
chaos: $(VENV)/installed
	$(BIN)/python -m benchmarks chaos --minutes $(or $(MINUTES),5) --seed $(or $(SEED),1)

# Thousands of requests that the OpenAPI allows and forbids, with and without a key.
contract: $(VENV)/installed
	$(BIN)/python -m benchmarks contract --cases $(or $(CASES),2000)

clean:
	rm -rf $(VENV) build *.egg-info
