PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt
TORCH := torch==2.13.0

.PHONY: demo test examples docs clean

# The main job: a regression of flight delays on real data, its posterior as a table and a figure.
demo: .venv/demo
	$(BIN)/python examples/flights.py --output demo

test: .venv/test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy --strict pyro_lightning
	$(MAKE) docs
	$(MAKE) examples
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --dist loadfile --doctest-modules pyro_lightning tests

# The site, in .venv/site; a warning is an error, unless --quiet hides it. The variable silences an
# announcement of the theme.
docs: .venv/test
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --site-dir .venv/site

# Every example with tiny arguments: they run, the figures mean nothing.
examples: .venv/test
	$(BIN)/python examples/flights.py --epochs 1 --rows 3000 --output .venv/examples
	$(BIN)/python examples/two_ways.py --rows 500 --steps 50 --output .venv/examples
	$(BIN)/python examples/streaming.py --rows 3000 --epochs 1 --output .venv/examples
	$(BIN)/python examples/visits.py --epochs 1 --output .venv/examples
	$(BIN)/python examples/bnn.py --rows 2000 --hidden 4 --epochs 1 --draws 5 --output .venv/examples
	$(BIN)/python examples/vae.py --hidden 4 --batch-size 500 --epochs 1 --output .venv/examples
	$(BIN)/python examples/mixture.py --epochs 1 --output .venv/examples
	$(BIN)/python examples/movielens.py --least 100 --factors 1 --epochs 1 --output .venv/examples
	$(BIN)/python examples/series.py --epochs 1 --output .venv/examples
	$(BIN)/python benchmarks/memory.py --rows 100000 --steps 20
	$(BIN)/python benchmarks/reading.py --rows 100000 --batches 20 --rounds 1
	$(BIN)/python benchmarks/rows.py --rows 1000 10000 --steps 2 --rounds 2
	$(BIN)/python benchmarks/scaling.py --rows 1000 --batch-size 16 --steps 5 --warm-up 2 --rounds 1
	$(BIN)/python -m benchmarks.speed --smoke --workloads W1 W4 --methods raw example ours-compile-k32 numpyro --output .venv/examples

# torch first and alone, and without a GPU the CPU build where the index has one: it is a tenth of
# the size of the other.
.venv/torch: constraints.txt
	$(PYTHON) -m venv .venv
	command -v nvidia-smi >/dev/null || $(PIP) "$(TORCH)+cpu" 2>/dev/null || true
	$(PIP) $(TORCH)
	touch $@

.venv/demo: .venv/torch pyproject.toml
	$(PIP) -e ".[examples]"
	touch $@

# litdata asks for torchvision, which is not used here. PyPI's is built for a GPU: beside the CPU
# build of torch it cannot be imported, nor can torchmetrics, which imports it where it is installed.
.venv/test: .venv/torch pyproject.toml
	$(PIP) -e ".[test,dev,docs]"
	$(BIN)/python -c "import torchvision" 2>/dev/null || $(BIN)/pip uninstall --quiet --yes torchvision
	touch $@

clean:
	rm -rf .venv demo
