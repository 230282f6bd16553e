PYTHON ?= python3
BIN := .venv/bin

.PHONY: test
test: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy --strict pyro_lightning
	$(BIN)/python -m pytest --doctest-modules pyro_lightning tests

# torch first and alone: where pip knows a CPU build, that is the one taken.
.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q torch==2.13.0
	$(BIN)/pip install -q -c constraints.txt -e ".[test,dev]"
	touch $@
