# make quickstart: install, train a small VAE on real photographs on a CPU, decode through a diffusers pipeline
# make test:       install, lint, type-check, check who imports whom, run all tests
# make fast:       the tests without the slow ones, about a minute

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
RUN    ?= runs/quickstart

.PHONY: quickstart test fast lint clean

$(VENV)/.installed: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[dev]"
	touch $@

quickstart: $(VENV)/.installed
	$(BIN)/python train_sdvae.py --config configs/quickstart.yaml --output_dir $(RUN) --overwrite true
	$(BIN)/python scripts/pipeline_demo.py $(RUN)/model $(RUN)/pipeline.png

test: lint
	$(BIN)/python -m pytest -n 2 --dist loadfile

fast: $(VENV)/.installed
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not slow"

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# mkdocstrings reads the sources without importing them
.PHONY: docs
docs: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[docs]"
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .ruff_cache .mypy_cache .import_linter_cache
