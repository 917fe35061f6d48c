PYTHON ?= python3.11
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
BENCHMARK ?= properties/benchmark/smoke.yaml
ARGS ?= --model=DLLM2Rec --dataset=ml-100k --teacher=BIGRec

.PHONY: help run test check slow stacks verify bench bench-full tune readme wheel clean

help: ## Show what there is
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/'

$(READY): setup.py constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c constraints.txt torch
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[dev]'
	touch $(READY)

run: $(READY) ## An LLM teaches a small recommender on ml-100k (ARGS="..." for another run)
	$(BIN)/python run_recbole_llm.py $(ARGS)

test: $(READY) ## The fast tests: no model hub, about 13 minutes on 2 cores
	$(BIN)/python -m pytest

check: $(READY) ## ruff: lint and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

slow: $(READY) ## The tests with a real LLM, the three commands and the wheel
	$(BIN)/python -m pytest --slow -m slow --timeout=3600

stacks: $(READY) ## The fast tests on the newest packages and on numpy 1.26 + pandas 2.3
	$(BIN)/python -m pytest
	$(PYTHON) -m venv $(VENV)-old
	$(VENV)-old/bin/python -m pip install -q -c constraints-old.txt torch
	$(VENV)-old/bin/python -m pip install -q -c constraints-old.txt -e '.[dev]'
	$(VENV)-old/bin/python -m pytest

verify: $(READY) ## Run a benchmark from scratch and compare with its committed results (BENCHMARK=... for another one than smoke)
	$(BIN)/python run_recbole_llm.py --benchmark=$(BENCHMARK) --verify

bench: $(READY) ## Speed and memory as ratios within one run; prints tables, writes JSON (half an hour on 2 cores, needs ../shared/data)
	$(BIN)/python -m tests.bench.epoch
	$(BIN)/python -m tests.bench.dataset
	$(BIN)/python -m tests.bench.serving
	$(BIN)/python -m tests.bench.beams
	$(BIN)/python -m tests.bench.grounding
	$(BIN)/python -m tests.bench.int8
	$(BIN)/python -m tests.bench.inference

bench-full: $(READY) ## Time to RecBole's quality, quality after convergence, phase A of Lite-LLM4Rec, labelling by an LLM, a million items; hours
	$(BIN)/python -m tests.bench.time_to
	$(BIN)/python -m tests.bench.convergence
	$(BIN)/python -m tests.bench.phase_a
	$(BIN)/python -m tests.bench.labelling
	$(BIN)/python -m tests.bench.million
	$(BIN)/python -m tests.bench.rows --rows=28862 --teacher=LiteLLM4Rec --epochs=4 --distill_embedding=none --distill_weight=0.5 \
		--learning_rate=0.001 --teacher_trained_rows=drop_target --teacher_lite_rec_layers=1 --threads=1 \
		--config_files properties/tuned/DLLM2Rec-amazon-games.yaml

tune: $(READY) ## The tuned baselines again: hours, resumable, finished trials are taken from tests/bench/tuned
	$(BIN)/python -m tests.bench.tune

readme: $(READY) ## The result tables of README from the committed results
	$(BIN)/python -m tests.bench.readme

wheel: $(READY) ## dist/*.whl
	$(BIN)/python -m build --wheel

clean: ## Remove what can be made again; trained models and Knowledge in saved/ stay
	rm -rf $(VENV) $(VENV)-old build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
