# Everything runs in a virtual environment of its own, with the versions of constraints.txt.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
WHEEL_BIN := .venv-wheel/bin

.PHONY: demo test test-light test-slow fuzz lint types docs wheel-test clean

demo: .venv/demo.stamp ## a tiny cascade down the whole road, into demo/
	$(BIN)/cascadekit demo -o demo --force

test: .venv/dev.stamp ## every test but the slow ones; ARGS="-k name" chooses
	$(BIN)/python -m pytest -n auto $(ARGS)

test-light: .venv-light/stamp ## schemas/ and storage/ where torch, diffusers, transformers and onnx are not installed
	.venv-light/bin/python -m pytest -q tests/schemas tests/storage $(ARGS)

test-slow: .venv/dev.stamp ## weights of real size: many minutes, 15 GB of disk, 10 GB of memory
	$(BIN)/python -m pytest -m slow -s

fuzz: .venv/dev.stamp ## 20,000 odd inputs from seeds; `python -m tests.fuzz KIND SEED` runs one of them again
	$(BIN)/python -m pytest -m fuzz -n auto tests/fuzz

lint: .venv/dev.stamp ## ruff and mypy strict
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(MAKE) types

types: .venv/dev.stamp ## mypy strict alone
	mkdir -p .venv/src && ln -sfn ../.. .venv/src/cascadekit # mypy wants the package under its name
	MYPYPATH=.venv/src $(BIN)/mypy

docs: ## the documentation site, into build/site; a warning is an error
	$(PYTHON) -m venv .venv-docs
	# Not editable: the generator would follow the checkout into its own environments.
	.venv-docs/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt '.[docs]'
	NO_MKDOCS_2_WARNING=1 .venv-docs/bin/mkdocs build --strict

wheel-test: .venv/dev.stamp demo ## the wheel draws demo's image where neither torch nor onnx is installed
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

# open_clip is a test oracle for the tokenizer alone; its own requirements would bring torchvision along. torchvision
# is one for the EfficientNet, kept out of the environment, where transformers would use it for other things; polygraphy
# one for GPU engines, kept out as `validate` would start it for every graph of every test; tensorrt-stubs are the types
# of TensorRT's calls, kept out as a folder of theirs looks like an installed TensorRT.
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

clean:
	rm -rf .venv .venv-light .venv-wheel .venv-docs build dist demo *.egg-info
