# make demo, make test: each makes its own virtual environment and installs what it needs.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: install demo test test-slow check bench bench-distillation bench-judge clean

install: $(READY)

# torch goes first and alone, so that nothing else chooses a torch for it.
$(READY): pyproject.toml constraints.txt $(wildcard compress export pipeline targets validate)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet "$$(grep '^torch==' constraints.txt)"
	$(BIN)/pip install --quiet -c constraints.txt -e ".[dev]"
	touch $(READY)

demo: $(READY)
	$(BIN)/potstill demo

test: $(READY)
	$(BIN)/pytest -m "not slow and not timing" -n auto --dist loadfile
	$(BIN)/pytest -m timing

test-slow: $(READY)
	$(BIN)/pytest -m slow

check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(READY)
	$(BIN)/python benchmarks/road.py

# torchdistill, to compare with, in an environment of its own: it needs torchvision, whose wheel is for CUDA.
.venv-torchdistill/.ready:
	$(PYTHON) -m venv .venv-torchdistill
	.venv-torchdistill/bin/pip install --quiet "$$(grep '^torch==' constraints.txt)"
	.venv-torchdistill/bin/pip install --quiet --no-deps torchvision==0.28.0
	.venv-torchdistill/bin/pip install --quiet -c constraints.txt numpy pillow pyyaml scipy cython safetensors
	.venv-torchdistill/bin/pip install --quiet --no-deps torchdistill==1.1.5
	touch $@

bench-distillation: $(READY) .venv-torchdistill/.ready
	$(BIN)/python benchmarks/distillation.py

bench-judge: $(READY)
	$(BIN)/python benchmarks/judge.py

clean:
	rm -rf $(VENV) .venv-torchdistill build dist runs *.egg-info .mypy_cache .pytest_cache .ruff_cache
