# minitune. `make help` lists the targets; each sets up what it needs in .venv and can be interrupted and run again.
PYTHON ?= python3
VENV := .venv
TRITON := 3.9.0# beside a CPU build of torch, for the interpreter and ahead-of-time compiles; a CUDA build brings its own
RUN := $(VENV)/bin/python
PIP := $(RUN) -m pip --disable-pip-version-check install --quiet --progress-bar on

.DEFAULT_GOAL := help
.PHONY: help train inspect test test-real parity check size bench lock clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

train: $(VENV)/.train  ## fine-tune SmolLM2 on Rotten Tomatoes with LoRA and compare it with the base model
	$(RUN) -m examples.sentiment

inspect: $(VENV)/.train  ## say what a checkpoint, adapter or run is: make inspect PATHS=runs/demo/train
	@$(RUN) -m minitune.inspect $(PATHS)

test: $(VENV)/.test  ## run the tests (under 15 minutes on 2 cores)
	OMP_NUM_THREADS=1 $(RUN) -m pytest --numprocesses 2 --dist loadfile -o faulthandler_timeout=600 -o faulthandler_exit_on_timeout=true

test-real: $(VENV)/.test  ## run the slow tests, on real weights
	$(RUN) -m pytest -m real

parity: $(VENV)/.test  ## compare every family with transformers; writes tests/PARITY.md (4 minutes)
	OMP_NUM_THREADS=1 $(RUN) -m tests.parity

check: $(VENV)/.test  ## lint, format, layers, size
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(RUN) -m pytest tests/test_layers.py
	$(RUN) -m tests.sizes

size: $(VENV)/.train  ## print lines of code by part
	$(RUN) -m tests.sizes

bench: $(VENV)/.test  ## measure speed and memory beside the peers; results in bench/results
	$(RUN) -m bench

lock:  ## pin the newest versions of all dependencies again
	$(PYTHON) -m venv $(VENV)
	$(PIP) uv
	sh bench/lock.sh $(VENV)/bin/uv

clean:  ## remove the environment and caches; runs/ and weights/ stay
	rm -rf $(VENV) build *.egg-info .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/.train: requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "error: minitune needs Python 3.10 or newer; name one with PYTHON=python3.12 make ..."; exit 2; }
	@echo "setting up $(VENV) (once; a minute or two)"
	@$(PYTHON) -m venv $(VENV)
	@$(PIP) -r requirements.lock
	@$(PIP) --no-deps --no-build-isolation -e .
	@touch $@

$(VENV)/.test: $(VENV)/.train requirements-test.lock
	@echo "adding the test dependencies to $(VENV) (once)"
	@$(PIP) -r requirements-test.lock
	@if $(RUN) -c 'import sys, torch; sys.exit(sys.platform != "linux" or torch.version.cuda is not None)'; then $(PIP) --no-deps triton==$(TRITON); fi
	@touch $@

.PHONY: gpu
gpu:  ## test and measure the kernels on this machine's GPU with the Python at hand; KERNEL=norm takes one
	$(PYTHON) -m bench.gpu $(if $(KERNEL),--kernel $(KERNEL)) $(if $(OUTPUT),--output $(OUTPUT))
