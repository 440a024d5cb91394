# `make demo`, `make test` and `make real` do all the set-up on a fresh machine (Python 3.10 or newer, nothing else).
PYTHON ?= python3
BIN := .venv/bin
# setuptools warns of every editable install, in nine lines, through pip's --quiet
PIP := PYTHONWARNINGS='ignore:Editable installation' $(BIN)/python -m pip install --quiet

.PHONY: demo test real lint types test-slow docs install-matrix clean

.venv/.installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("Python 3.10 or newer is needed, this is " + sys.version) if sys.version_info < (3, 10) else None'
	$(PYTHON) -m venv .venv
	$(PIP) --upgrade pip
	$(PIP) -c constraints.txt -e '.[test]'
	touch $@

demo: .venv/.installed  ## train the embedded policy and print before and after
	$(BIN)/python -m nspo_lightning fit -c configs/quickstart.yaml

test: .venv/.installed  ## lint, types and the suite
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m mypy
	$(BIN)/python -m pytest -q -n auto --dist loadfile

.venv/.real: .venv/.installed
	$(PIP) -c constraints.txt -e '.[gguf]'
	touch $@

real: .venv/.real  ## a real model, from a download to an exported adapter; REAL_DATA=FOLDER, see examples/real_model.py
	$(BIN)/python examples/real_model.py

lint: .venv/.installed
	$(BIN)/python -m ruff check . && $(BIN)/python -m ruff format --check .

types: .venv/.installed
	$(BIN)/python -m mypy

test-slow: .venv/.installed  ## what takes minutes
	$(BIN)/python -m pytest -q -m slow

.venv/.docs: .venv/.installed
	$(PIP) -c constraints.txt -e '.[docs]'
	touch $@

docs: .venv/.docs  ## the site, into site/; any broken link or reference fails
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet

install-matrix:  ## wheel, clean environments, the shipped quickstart far from here; downloads gigabytes
	benchmarks/install_matrix.sh $(or $(PYTHONS),$(PYTHON))

clean:
	rm -rf .venv build dist site *.egg-info
