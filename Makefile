# mlxrack: `make demo` and `make test` do their own set-up. `make help` lists all targets.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help setup model demo run test fuzz fuzz-parsers swap chaos crash crash-aggregator abuse score recompute wall soak simulate memory families histories schemas check lint types arch house docs bench-calibration bench-dispatch bench-aggregate bench-placement bench-redaction bench-telemetry bench-classes bench-serve sample-rack walk drill mac wheels dist clean

help: ## list targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  \1\t/' | expand -t 14

setup: $(STAMP) ## create the virtual environment with all dependencies, pinned

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("mlxrack needs Python 3.11 or newer") if sys.version_info < (3, 11) else None'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[agent,aggregator,dev]'
	@touch $(STAMP)

model: $(STAMP) ## make the demo's models in the user's cache (177 MB download, once)
	@$(BIN)/python -m scripts.fetch_demo_model

demo: $(STAMP) model ## run a rack of three nodes on this machine: serving, swap, eviction, failover, store outage, reports
	@$(BIN)/python -m scripts.demo

run: $(STAMP) model ## run one agent with the demo model, until Ctrl-C
	@$(BIN)/python -m scripts.run_one

test: $(STAMP) model ## run all tests, three files in parallel: most tests wait
	$(BIN)/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder

lint: $(STAMP) ## check style
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP) ## type-check (mypy, strict)
	$(BIN)/mypy

arch: $(STAMP) ## check the import contracts
	$(BIN)/lint-imports --no-logo
	@$(BIN)/python -m scripts.house --pure

house: $(STAMP) ## measure the structure: packages, arrows, classes, functions, lines; fails past its limits
	@$(BIN)/python -m scripts.house

fuzz: $(STAMP) ## send 20,000 random requests to a real agent
	MLXRACK_FUZZ=20000 $(BIN)/python -m pytest tests/rack/test_poison.py

swap: $(STAMP) model ## run 200 hot swaps under 30 streams, 20 with a real model; kills, loads and unloads
	MLXRACK_SWAPS=200 MLXRACK_REAL_SWAPS=20 MLXRACK_CYCLES=200 MLXRACK_REAL_CYCLES=20 MLXRACK_KILLS=40 \
	$(BIN)/python -m pytest -s -v --timeout=1500 tests/rack/test_swaps.py

chaos: $(STAMP) model ## run the fault matrix, node kills under load, failover of cut streams, client disconnects
	MLXRACK_CHAOS=3 MLXRACK_CHAOS_S=120 MLXRACK_CUT_STREAMS=500 MLXRACK_BAD_REQUESTS=1000 MLXRACK_LEAVERS=1000 MLXRACK_CONTINUATIONS=20 \
	$(BIN)/python -m pytest -s -v --timeout=1500 tests/rack/test_chaos.py tests/rack/test_kills.py tests/rack/test_gateways.py tests/rack/test_disconnects.py \
	tests/rack/test_continuation.py tests/rack/test_routes.py

crash: $(STAMP) ## kill an agent 500 times while it samples and pushes to a failing store
	MLXRACK_CRASHES=500 $(BIN)/python -m pytest -s -v --timeout=4000 tests/rack/test_crash.py

crash-aggregator: $(STAMP) ## kill an aggregator 200 times; its tables and reports must equal those of an undisturbed one
	MLXRACK_AGGREGATOR_KILLS=200 MLXRACK_TOTALS=3 $(BIN)/python -m pytest -s -v --timeout=1500 tests/rack/test_aggregator_kills.py \
	tests/aggregator/test_judgements.py -k 'kills or totals'

memory: $(STAMP) ## compare the memory plan with measurement, for models of every shape
	MLXRACK_SHAPES=all $(BIN)/python -m pytest -s -v tests/contracts/test_memory.py

score: $(STAMP) ## measure the accuracy of causes and verdicts on synthetic weeks
	MLXRACK_SCORE=1 $(BIN)/python -m pytest -s -v tests/aggregator/test_scoring.py

recompute: $(STAMP) ## work out every figure of the made racks' reports a second time, from raw segments: a table; ARGS="'half silent' --again"
	@$(BIN)/python -m tests.recompute $(ARGS)

wall: $(STAMP) ## send 10,000 SENSITIVE requests in each state of failure past fake providers; limits of whole minutes; policy, redaction, audit
	MLXRACK_WALL=10000 MLXRACK_LIMITS_FULL=1 MLXRACK_LIMITS_EXAMPLES=1000 $(BIN)/python -m pytest -v --timeout=1500 \
	tests/rack/test_wall.py tests/rack/test_limits.py tests/rack/test_taint.py tests/rack/test_audit.py tests/rack/test_policy.py \
	tests/agent/gateway/test_wall.py tests/agent/policy tests/agent/egress tests/agent/audit

fuzz-parsers: $(STAMP) ## fuzz every parser of sensor and meter output with 100,000 inputs
	@$(BIN)/python -m scripts.fuzz_parsers

abuse: $(STAMP) ## send the inputs of the security findings to real agents and aggregators: a table; 20 minutes
	@$(BIN)/python -m scripts.abuse

soak: $(STAMP) ## soak: ten minutes on a saturated machine, and ten with client disconnects
	MLXRACK_SOAK_S=600 $(BIN)/python -m pytest -s -v --timeout=1500 tests/rack/test_soak.py

families: $(STAMP) ## run the matrix of model families, write it into docs/models.md; MLXRACK_TEMPLATES adds a folder of real ones
	@$(BIN)/python -m scripts.families

schemas: $(STAMP) ## run the JSON-Schema-Test-Suite in the folder SUITE through the grammar
	@$(BIN)/python -m scripts.schema_suite $(SUITE)

histories: $(STAMP) ## feed 300 random histories to each model family, and 1,000 texts with control words
	MLXRACK_HISTORIES=300 MLXRACK_INJECTIONS=1000 $(BIN)/python -m pytest --timeout=3000 tests/agent/loader/test_histories.py tests/agent/loader/chat/test_injection.py

simulate: $(STAMP) ## simulate eviction policies (cost, LRU) and routing policies on synthetic traffic
	@$(BIN)/python -m scripts.simulate_eviction
	@$(BIN)/python -m scripts.simulate_routing

check: lint types arch test ## run what CI runs

docs: $(STAMP) ## generate the configuration reference and the tables of memory and chips
	@$(BIN)/python -m scripts.document_config
	@$(BIN)/python -m scripts.document_memory
	@$(BIN)/python -m scripts.document_chips

bench-dispatch: $(STAMP) ## measure gateway overhead, compared with a minimal proxy and LiteLLM's proxy
	@$(BIN)/python -m scripts.bench_dispatch

bench-telemetry: $(STAMP) model ## measure the cost of telemetry: CPU and memory at rest, tokens/s under load, bytes of a batch
	@$(BIN)/python -m scripts.bench_telemetry

bench-aggregate: $(STAMP) ## time the rollup of a month, a daily increment, the monthly report, and growth with the rack
	@$(BIN)/python -m scripts.bench_aggregate

bench-placement: $(STAMP) ## measure the placement solver: run time, optimality gap, greedy heuristic alone
	@$(BIN)/python -m scripts.bench_placement

sample-rack: $(STAMP) ## make a bucket of synthetic telemetry and its reports, to explore without a rack
	@$(BIN)/python -m scripts.sample_rack

bench-classes: $(STAMP) model ## measure the TTFT of ORCHESTRATION, idle and under ten times as much ROUTINE as the rows take
	@$(BIN)/python -m scripts.bench_classes

bench-serve: $(STAMP) model ## measure tokens/s of the agent, mlx_lm.server and the bare engine
	@$(BIN)/python -m scripts.bench_serve

walk: $(STAMP) model ## do what README and docs/operating.md tell a newcomer to do, with an installed wheel, and time it; ARGS=--json
	@$(BIN)/python -m scripts.walk $(ARGS)

drill: $(STAMP) ## drill what an operator relies on, at full size: reload and rotation under 40 requests/s, orders over restarts, restore, a name of two nodes; 25 minutes
	MLXRACK_DRILL=1 MLXRACK_DRILL_S=180 $(BIN)/python -m pytest -s -v --timeout=1500 tests/rack/test_reload.py tests/rack/test_orders.py \
	tests/rack/test_restore.py tests/rack/test_addresses.py

mac: $(STAMP) model ## everything about Macs that needs none: macOS 14 to 27 in a library of their layouts, chips, meters, the service, the first Mac's archive, step times
	$(BIN)/python -m pytest -v --timeout=600 tests/agent/telemetry tests/agent/operator tests/agent/process/test_awake.py tests/agent/process/test_footprint.py \
	tests/agent/loader/test_calibration.py tests/agent/models/test_figures.py tests/contracts/test_calibration.py tests/aggregator/test_chip_figures.py \
	tests/shared/test_chips.py tests/shared/test_connection_errors.py tests/shared/test_secret_commands.py tests/rack/test_awake.py tests/rack/test_without_psutil.py tests/test_mac_wheels.py
	@$(BIN)/python -m scripts.fuzz_parsers --inputs 20000
	@$(MAKE) --no-print-directory wheels

wheels: $(STAMP) ## ask the package index for every pinned wheel of a Mac: macOS 14 on arm64, Python 3.11 to 3.14
	@$(BIN)/python -m tests.mac_wheels || { status=$$?; [ $$status -eq 75 ] && echo "wheels: NOT CHECKED, the package index does not answer" && exit 0; exit $$status; }

bench-calibration: $(STAMP) model ## compare predicted step times of a real model with measured ones
	@OPENBLAS_NUM_THREADS=1 $(BIN)/python -m scripts.bench_calibration

bench-redaction: $(STAMP) ## recall, false findings, speed and isolation of what redacts outgoing requests: a table with PASS or FAIL
	@$(BIN)/python -m scripts.bench_redaction

dist: $(STAMP) ## build a wheel in dist/
	$(BIN)/python -m pip wheel --quiet --disable-pip-version-check --no-deps --no-build-isolation --wheel-dir dist .

clean: ## remove build outputs
	rm -rf build dist $(VENV) .mypy_cache .ruff_cache .import_linter_cache
