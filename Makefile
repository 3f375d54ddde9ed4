# make demo, make test: each makes its own virtual environment and installs what it needs.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
bench%: export POTSTILL_DECIDED_BY ?= the benchmarks, which publish no model

.PHONY: install demo test test-slow check bench bench-distillation bench-judge bench-formats bench-devices bench-language-model bench-kinship clean

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
	$(BIN)/pytest -m "not slow and not timing" -n auto --dist loadfile --no-loadscope-reorder
	$(BIN)/pytest -m timing $$(grep -rl --include='test_*.py' 'mark\.timing' tests)

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

# optimum-onnx, to compare with, in an environment of its own: it wants transformers 4.
.venv-optimum/.ready:
	$(PYTHON) -m venv .venv-optimum
	.venv-optimum/bin/pip install --quiet "$$(grep '^torch==' constraints.txt)"
	.venv-optimum/bin/pip install --quiet optimum-onnx==0.1.0 optimum==2.1.0 transformers==4.57.6 datasets==4.8.5 \
		pillow==13.0.0 requests==2.34.2 $$(grep -E '^(onnx|onnxruntime|numpy)==' constraints.txt)
	touch $@

# Olive, to compare with; it needs requests and datasets and does not declare them.
.venv-olive/.ready:
	$(PYTHON) -m venv .venv-olive
	.venv-olive/bin/pip install --quiet "$$(grep '^torch==' constraints.txt)"
	.venv-olive/bin/pip install --quiet -c constraints.txt olive-ai==0.13.0 requests datasets pillow \
		onnxruntime onnxscript transformers
	touch $@

bench-formats: $(READY) .venv-optimum/.ready .venv-olive/.ready
	$(BIN)/python benchmarks/formats.py

bench-language-model: $(READY)
	$(BIN)/python benchmarks/language_model.py

bench-devices: $(READY)
	$(BIN)/python benchmarks/devices.py

bench-kinship: $(READY)
	$(BIN)/python benchmarks/kinship.py

clean:
	rm -rf $(VENV) .venv-torchdistill .venv-optimum .venv-olive build dist runs *.egg-info .mypy_cache .pytest_cache .ruff_cache
