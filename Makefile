# mlxrack: `make demo` and `make test` do all of their own set-up. `make help` lists the rest.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help setup model demo run test fuzz fuzz-parsers swap chaos crash crash-aggregator score soak simulate check lint types arch docs bench-dispatch bench-aggregate bench-placement bench-telemetry bench-serve sample-rack dist clean

help: ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  \1\t/' | expand -t 14

setup: $(STAMP) ## the virtual environment with every dependency, pinned

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("mlxrack needs Python 3.11 or newer") if sys.version_info < (3, 11) else None'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[agent,aggregator,dev]'
	@touch $(STAMP)

model: $(STAMP) ## the demo's models in the user's cache (177 MB download, once)
	@$(BIN)/python -m scripts.fetch_demo_model

demo: $(STAMP) model ## a rack of three nodes on this machine: serve, swap, evict, kill, outage, reports
	@$(BIN)/python -m scripts.demo

run: $(STAMP) model ## one agent on the demo model, until Ctrl-C
	@$(BIN)/python -m scripts.run_one

test: $(STAMP) model ## every test, two files at a time: most of them wait
	$(BIN)/python -m pytest -n 2 --dist loadfile

lint: $(STAMP) ## style
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP) ## mypy, strict
	$(BIN)/mypy

arch: $(STAMP) ## the import contracts
	$(BIN)/lint-imports --no-logo

fuzz: $(STAMP) ## twenty thousand random requests at a real agent
	MLXRACK_FUZZ=20000 $(BIN)/python -m pytest tests/rack/test_poison.py

swap: $(STAMP) model ## two hundred swaps under thirty streams, twenty of a real model, kills, loads and unloads
	MLXRACK_SWAPS=200 MLXRACK_REAL_SWAPS=20 MLXRACK_CYCLES=200 MLXRACK_REAL_CYCLES=20 MLXRACK_KILLS=40 \
	$(BIN)/python -m pytest -s -v --timeout=1500 tests/rack/test_swaps.py

chaos: $(STAMP) model ## the fault matrix, nodes killed under load, streams cut at any word, clients that leave
	MLXRACK_CHAOS=3 MLXRACK_CHAOS_S=120 MLXRACK_CUT_STREAMS=500 MLXRACK_BAD_REQUESTS=1000 MLXRACK_LEAVERS=1000 MLXRACK_CONTINUATIONS=20 \
	$(BIN)/python -m pytest -s -v --timeout=1500 tests/rack/test_chaos.py tests/rack/test_kills.py tests/rack/test_gateways.py tests/rack/test_disconnects.py \
	tests/rack/test_continuation.py tests/rack/test_routes.py

crash: $(STAMP) ## an agent killed five hundred times while it samples and pushes to a store that fails
	MLXRACK_CRASHES=500 $(BIN)/python -m pytest -s -v --timeout=4000 tests/rack/test_crash.py

crash-aggregator: $(STAMP) ## an aggregator killed two hundred times; its tables and reports are those of one that was not
	MLXRACK_AGGREGATOR_KILLS=200 $(BIN)/python -m pytest -s -v --timeout=1500 tests/rack/test_aggregator_kills.py

score: $(STAMP) ## how often causes and verdicts are right, on made-up weeks whose truth is known
	MLXRACK_SCORE=1 $(BIN)/python -m pytest -s -v tests/aggregator/test_scoring.py

fuzz-parsers: $(STAMP) ## a hundred thousand inputs for every parser of what a sensor or a meter says
	@$(BIN)/python -m scripts.fuzz_parsers

soak: $(STAMP) ## ten minutes of a machine without a free moment, and ten of clients that leave
	MLXRACK_SOAK_S=600 $(BIN)/python -m pytest -s -v --timeout=1500 tests/rack/test_soak.py

simulate: $(STAMP) ## eviction by cost against least recently used, and ways to route, on made-up traffic
	@$(BIN)/python -m scripts.simulate_eviction
	@$(BIN)/python -m scripts.simulate_routing

check: lint types arch test ## what CI runs

docs: $(STAMP) ## the configuration reference, made from the code
	@$(BIN)/python -m scripts.document_config

bench-dispatch: $(STAMP) ## what the door costs, beside a minimal proxy and LiteLLM's, in one run
	@$(BIN)/python -m scripts.bench_dispatch

bench-telemetry: $(STAMP) model ## what telemetry costs: a core and memory at rest, tokens/s under load, bytes of a batch
	@$(BIN)/python -m scripts.bench_telemetry

bench-aggregate: $(STAMP) ## a month rolled up, a day more, the monthly numbers, and how it grows with the rack
	@$(BIN)/python -m scripts.bench_aggregate

bench-placement: $(STAMP) ## how long a placement takes, how far from the best it is, and greedy alone
	@$(BIN)/python -m scripts.bench_placement

sample-rack: $(STAMP) ## a bucket of made-up telemetry and its reports, for who wants to look without a rack
	@$(BIN)/python -m scripts.sample_rack

bench-serve: $(STAMP) model ## tokens per second of the agent, mlx_lm.server and the bare engine, in one run
	@$(BIN)/python -m scripts.bench_serve

dist: $(STAMP) ## a wheel in dist/
	$(BIN)/python -m pip wheel --quiet --disable-pip-version-check --no-deps --wheel-dir dist .

clean: ## remove what was built
	rm -rf build dist $(VENV) .mypy_cache .ruff_cache .import_linter_cache
