# PYTHON=python3.10 make test chooses the interpreter; without it, that of .venv or else python3.
PYTHON ?= $(if $(wildcard .venv/bin/python),.venv/bin/python,python3)
RUN := .venv/bin/python

.PHONY: help install check test test-all quickstart study benchmark docs lint clean

help:            ## this list
	@sed -n 's/^\([a-z-]*\):[^#]*## /  make \1\t/p' Makefile | expand -t 20

install:         ## make .venv with everything in it; nothing to do the second time
	@$(PYTHON) install_venv.py

# A test file stays with one worker, because its tests share processes and ports.
PYTEST := $(RUN) -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder --durations 20

# The tests of the mathematics, which start no processes.
check: install lint  ## lint and the tests of the mathematics, under a minute
	$(RUN) -m pytest -q --numprocesses auto --maxprocesses 4 tests/moe tests/kernels tests/test_cost.py \
		tests/test_imports.py

test: install lint  ## install, lint, and the tests but the slow ones
	$(PYTEST)

test-all: install lint  ## the slow tests too
	$(PYTEST) -m "slow or not slow"

# glibc keeps what is freed: a step takes pages that the one before has cleared.
KEEP_FREED := MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=100000000000

quickstart: install  ## train and compare a dense and a Mixture-of-Experts model on real text
	$(KEEP_FREED) $(RUN) examples/quickstart/run.py

study: install   ## train and compare three sizes a family, three seeds; an hour and more
	$(KEEP_FREED) $(RUN) examples/study/run.py

# What docs/performance.md and docs/kernels.md show, by the commands that they name.
benchmark: install  ## measure layers, training, evaluation, generation and more; not timed as a whole yet
	$(RUN) -m pip install --quiet -c constraints.txt -e ".[benchmark]"
	$(KEEP_FREED) $(RUN) benchmarks/layer.py --rounds 7
	$(KEEP_FREED) $(RUN) benchmarks/ablation.py
	$(KEEP_FREED) $(RUN) benchmarks/attention.py
	$(RUN) benchmarks/peers.py
	$(KEEP_FREED) $(RUN) benchmarks/peers.py --shapes 256 96 --cases ours
	$(RUN) benchmarks/train_step.py
	$(RUN) benchmarks/train_step.py --groups dense --cases stock ours --context 512 --tokens 8192 --updates 2
	$(RUN) benchmarks/train_step.py --shares --updates 2
	$(KEEP_FREED) $(RUN) benchmarks/trainer.py --shapes 96 128 --cases dense "8 experts"
	$(KEEP_FREED) $(RUN) benchmarks/trainer.py --shapes 96 --cases "*every other layer"
	$(KEEP_FREED) $(RUN) benchmarks/trainer.py --shapes 256 --rounds 3 --cases "*every other layer"
	$(KEEP_FREED) $(RUN) benchmarks/trainer.py --shapes wide --rounds 2 --cases "*8 experts, every other layer"
	$(RUN) benchmarks/evaluate.py
	$(RUN) benchmarks/evaluate.py --peers
	$(RUN) benchmarks/generate.py --shapes 256
	$(RUN) benchmarks/generate.py --shapes wide --rounds 2
	$(RUN) benchmarks/prepare.py --megabytes 8 --rounds 1
	$(RUN) benchmarks/growth.py
	$(RUN) benchmarks/start_up.py

docs: install    ## build the site of docs/ into build/site; needs Python 3.11
	$(RUN) -m pip install --quiet -c constraints.txt -e ".[docs]"
	$(RUN) -m sphinx -W --keep-going -q docs build/site
	@echo "build/site/index.html"

lint: install    ## ruff, check and format; mypy where there is one (Python 3.10 and later)
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	@if $(RUN) -c "import mypy" 2> /dev/null; then $(RUN) -m mypy; fi

clean:           ## remove .venv and what builds and tests leave; runs/ and build/study/ stay
	rm -rf .venv build/site build/lib build/temp.* build/bdist.* dist *.egg-info
	rm -rf .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find . -name __pycache__ -not -path './.git/*' -prune -exec rm -rf {} +
