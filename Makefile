# Everything here works in a fresh clone with Python 3.11 or later, pip and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

PROMPT ?= a red star at the top left, a blue circle at the top, an orange star in the center, a green square at the left, a yellow triangle at the bottom left, and a purple cross at the bottom right
# bench_full_size.py needs 20 GB of disk and 16 GB of memory, bench_full_width.py 8 GB of memory: run them by themselves.
BENCHMARKS := $(filter-out benchmarks/bench_full_%.py, $(sort $(wildcard benchmarks/bench_*.py)))

.PHONY: help demo test test-fast test-costs test-robustness check docs notebooks dist bench reproduce paper clean

help:  ## this list
	@sed -nE 's/^([a-z-]+):.*## (.*)/\1\t\2/p' $(MAKEFILE_LIST) | expand -t 12

# The core needs neither PyTorch nor TensorFlow; the tests compare with PyTorch.
$(VENV)/.core: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --editable .
	touch $@

# PyTorch by itself first: asked for by exact version, a local CPU build is taken where there is one.
$(VENV)/.test: $(VENV)/.core
	$(BIN)/pip install --quiet torch==2.13.0
	$(BIN)/pip install --quiet --editable '.[test]'
	touch $@

$(VENV)/.plots: $(VENV)/.core
	$(BIN)/pip install --quiet --editable '.[plots,train]'
	touch $@

$(VENV)/.docs: $(VENV)/.core
	$(BIN)/pip install --quiet --editable '.[docs]'
	touch $@

$(VENV)/.notebooks: $(VENV)/.core
	$(BIN)/pip install --quiet torch==2.13.0
	$(BIN)/pip install --quiet --editable '.[notebooks]'
	touch $@

$(VENV)/.dist: $(VENV)/.core
	$(BIN)/pip install --quiet --editable '.[dist]'
	touch $@

$(VENV)/.synth: $(VENV)/.core
	$(BIN)/pip install --quiet --editable '.[synth]'
	touch $@

demo: $(VENV)/.core  ## a dense prompt through the closed loop, into out/demo/index.html
	$(BIN)/clvr generate "$(PROMPT)" --model shapes-tiny --out out/demo

test: $(VENV)/.test  ## the whole suite
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder --durations-cpu=20

test-fast: $(VENV)/.test  ## without the tests marked slow
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m 'not slow'

# From an empty cache of compiled programs, as in CI: what a test costs first.
test-costs: $(VENV)/.test  ## CPU seconds of every test; fails where the marker slow does not agree with them
	programs=$$(mktemp -d) && trap 'rm -rf "$$programs"' EXIT && JAX_COMPILATION_CACHE_DIR=$$programs \
		$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder --durations-cpu=0 --check-slow

# A fixed part of the malformed inputs is among the tests; this runs all of them.
test-robustness: $(VENV)/.test  ## malformed input of every kind: one line, exit 1 or 2, nothing left behind
	ALL_INPUTS=1 $(BIN)/python -m pytest -n 2 tests/robustness

check: $(VENV)/.test  ## format, lint (security included), types, spelling, terms
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/codespell
	$(BIN)/python scripts/check_terms.py

docs: $(VENV)/.docs  ## the site, into build/docs/index.html; a warning, such as a dead link, is an error
	$(BIN)/python -m sphinx --fail-on-warning --keep-going --quiet -d build/doctrees docs build/docs

notebooks: $(VENV)/.notebooks  ## run the tutorials, into build/notebooks/*.ipynb
	$(BIN)/python scripts/run_notebooks.py --out build/notebooks

dist: $(VENV)/.dist  ## wheel and sdist, tried in empty environments, with SBOM and checksums, into dist/
	rm -rf dist
	mkdir -p build
	$(BIN)/python -m build > build/dist.log 2>&1 || { cat build/dist.log; exit 1; }
	$(BIN)/python -m twine check --strict dist/*
	$(BIN)/python scripts/check_dist.py dist

bench: $(VENV)/.test  ## speed beside PyTorch, on this machine
	@for benchmark in $(BENCHMARKS); do PYTHONPATH=. $(BIN)/python $$benchmark || exit 1; done

# Each step goes on where it was stopped; each needs what those before it made.
reproduce: $(VENV)/.synth  ## train the shipped models again, from nothing, into runs/
	$(BIN)/python -m clvr_jax.scripts.shapes_tokenizer --out runs/shapes_tokenizer
	$(BIN)/clvr train configs/shapes_vae.py --out runs/shapes_vae --resume
	$(BIN)/clvr train configs/shapes_text_encoder.py --out runs/shapes_text_encoder --resume
	$(BIN)/clvr train configs/shapes_base.py --out runs/shapes_base --resume
	$(BIN)/clvr train configs/shapes_sft.py --out runs/shapes_sft --resume
	$(BIN)/clvr train configs/shapes_distill.py --model runs/shapes_base/export --out runs/shapes_distill --resume
	test -e runs/shapes_merged || $(BIN)/clvr merge --base runs/shapes_base/export --distill runs/shapes_distill/export \
		--align runs/shapes_sft/export --out runs/shapes_merged
	$(BIN)/python -m clvr_jax.scripts.shapes_images --merged runs/shapes_merged --distilled runs/shapes_distill/export \
		--sft runs/shapes_sft/export --base runs/shapes_base/export --out runs/shapes_images.npz
	$(BIN)/clvr train configs/shapes_controller.py --out runs/shapes_controller --resume
	$(BIN)/python -m clvr_jax.scripts.shapes_assemble --out runs/shapes-tiny

# Resumes where it was stopped. PPRL=DIR is the export of reinforcement learning, if it was run; DISTILLED=DIR that of
# distillation, which is recovered from the shipped models otherwise.
paper: $(VENV)/.plots  ## the paper's tables in miniature, into docs/results.md
	$(BIN)/python -m clvr_jax.scripts.paper $(if $(DISTILLED),--distilled $(DISTILLED)) $(if $(PPRL),--pprl $(PPRL))

clean:  ## remove the environment and what was built; runs/ and out/ stay
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
