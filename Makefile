# Everything runs in a virtual environment of its own, with the versions of constraints.txt.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
WHEEL_BIN := .venv-wheel/bin
unexport PYTHONDONTWRITEBYTECODE # tests start hundreds of processes: each would compile this package again

.PHONY: demo test test-light test-slow fuzz soak lint types docs wheel-test gpu-kit clean

demo: .venv/demo.stamp ## the example model through every command, into demo/
	$(BIN)/cascadekit demo -o demo --force

test: export OMP_NUM_THREADS := 1 # the networks are tiny: a second thread costs more than it does
test: .venv/dev.stamp ## every test without a marker; ARGS="-k name" is passed to pytest
	$(BIN)/python -m pytest -n auto $(ARGS)

test-light: .venv-light/stamp ## tests of schemas/ and storage/, without torch, diffusers, transformers and onnx
	.venv-light/bin/python -m pytest -q tests/schemas tests/storage $(ARGS)

test-slow: .venv/dev.stamp ## weights of real size and further combinations: many minutes, 15 GB of disk, 10 GB of memory
	$(BIN)/python -m pytest -m slow -s

fuzz: .venv/dev.stamp ## 20,000 odd inputs, each from a seed; `python -m tests.fuzz KIND SEED` runs one again
	$(BIN)/python -m pytest -m fuzz -n auto tests/fuzz

soak: .venv/dev.stamp ## ten minutes of mixed calls of `serve`, over loopback
	$(BIN)/python -m pytest -m soak -s tests/runtime/test_serve_traffic.py

lint: .venv/dev.stamp ## ruff and mypy strict
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(MAKE) types

types: .venv/dev.stamp ## mypy strict alone
	mkdir -p .venv/src && ln -sfn ../.. .venv/src/cascadekit # mypy needs the package under its name
	MYPYPATH=.venv/src $(BIN)/mypy

docs: ## the documentation site, into build/site; a warning is an error
	$(PYTHON) -m venv .venv-docs
	# Not editable: mkdocstrings would otherwise read the environments inside the checkout too.
	.venv-docs/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt '.[docs]'
	NO_MKDOCS_2_WARNING=1 .venv-docs/bin/mkdocs build --strict

wheel-test: .venv/dev.stamp demo ## the wheel generates the demo's image, without torch and onnx
	rm -rf dist .venv-wheel
	$(BIN)/python -m build --outdir dist .
	$(PYTHON) -m venv .venv-wheel
	$(WHEEL_BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt \
		"$$(echo dist/*.whl)[cpu]"
	$(WHEEL_BIN)/python .ci/wheel_test.py demo

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/demo.stamp: .venv/bin/python pyproject.toml constraints.txt
	$(PIP) --editable '.[cpu,export]' torch
	touch $@

# Test oracles, installed without their requirements or outside the environment:
# - open_clip checks the tokenizer. Its requirements would install torchvision.
# - torchvision checks the EfficientNet. In the environment, transformers would use it for other things.
# - polygraphy checks GPU engines. In the environment, `validate` would start it for every graph of every test.
# - tensorrt-stubs has the types of TensorRT's calls. In the environment, one of its folders looks like TensorRT.
.venv/dev.stamp: .venv/bin/python pyproject.toml constraints.txt
	$(PIP) --editable '.[dev]'
	$(PIP) --no-deps open_clip_torch
	$(PIP) --no-deps --upgrade --target .venv/oracles torchvision polygraphy
	$(PIP) --no-deps --upgrade --target .venv/stubs tensorrt-stubs
	touch $@

.venv-light/stamp: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-light
	.venv-light/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt \
		--editable '.[test-light]'
	touch $@

gpu-kit: .venv/demo.stamp ## what a machine with CUDA, Python and no network needs for `bench gpu`, into build/gpu-kit
	rm -rf build/gpu-kit && mkdir -p build # ARGS="--part-mib 60 --python 3.12 --onnxruntime onnxruntime-gpu==1.31.1"
	$(BIN)/cascadekit bench gpu-kit -o build/gpu-kit $(ARGS)

clean:
	rm -rf .venv .venv-light .venv-wheel .venv-docs build dist demo *.egg-info
