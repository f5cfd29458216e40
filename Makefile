# Everything runs in a virtual environment of its own, with the versions of constraints.txt.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
WHEEL_BIN := .venv-wheel/bin
EXAMPLE_MODEL := converters/checkpoints/data/example_model
# The WebAssembly that websites compute with. Without npm or its registry, tests and pages of it are left out.
ONNXRUNTIME_WEB := onnxruntime-web-1.30.0.tgz
NPM_PACK := npm pack --silent onnxruntime-web@1.30.0 --pack-destination

.PHONY: demo test test-light test-triton test-slow matrix fuzz soak lint types docs wheel-test gpu-kit clean

demo: .venv/demo.stamp ## the example model through every command, into demo/
	$(BIN)/cascadekit demo -o demo --force

test: export OMP_NUM_THREADS := 1 # the networks are tiny: a second thread costs more than it does
test: .venv/dev.stamp .venv-triton/stamp ## every test without a marker; ARGS="-k name" is passed to pytest
	$(BIN)/python -m pytest -n auto $(ARGS)

test-light: .venv-light/stamp ## tests of schemas/ and storage/, without torch, diffusers, transformers and onnx
	.venv-light/bin/python -m pytest -q tests/schemas tests/storage $(ARGS)

test-triton: .venv/dev.stamp .venv-triton/stamp ## tests of export-triton alone, with a real server
	$(BIN)/python -m pytest tests/converters/triton $(ARGS)

test-slow: .venv/dev.stamp .venv/quantisers.stamp ## weights of real size and further combinations: many minutes, 25 GB of disk, 10 GB of memory
	$(BIN)/python -m pytest -m slow -s

matrix: .venv/dev.stamp .venv/quantisers.stamp .venv-triton/stamp ## the cells of docs/formats.md, recorded anew: minutes; ARGS="-k gguf" for some of them
	mkdir -p build && rm -f build/matrix.jsonl
	CASCADEKIT_MATRIX=build/matrix.jsonl $(BIN)/python -m pytest -m matrix $(ARGS)
	$(BIN)/python tools/formats_matrix.py build/matrix.jsonl

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
	.venv-docs/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt '.[docs,export]'
	NO_MKDOCS_2_WARNING=1 .venv-docs/bin/mkdocs build --strict
	if $(NPM_PACK) build; then \
		.venv-docs/bin/cascadekit export $(EXAMPLE_MODEL) -o build/browser --storage fp16 --force && \
		.venv-docs/bin/cascadekit site build/browser -o build/site/browser/live \
			--onnxruntime-web build/$(ONNXRUNTIME_WEB) --force; \
	else echo "no npm here: docs/browser.md is without its live page"; fi

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
# - onnxruntime-web runs websites in Chromium.
# - tensorrt-stubs has the types of TensorRT's calls. In the environment, one of its folders looks like TensorRT.
.venv/dev.stamp: .venv/bin/python pyproject.toml constraints.txt
	$(PIP) --editable '.[dev]'
	$(PIP) --no-deps open_clip_torch
	$(PIP) --no-deps --upgrade --target .venv/oracles torchvision polygraphy
	$(PIP) --no-deps --upgrade --target .venv/stubs tensorrt-stubs
	-$(NPM_PACK) .venv/oracles
	touch $@

# What quantises weights and writes LoRAs for tests of docs/formats.md alone. In the environment, transformers and
# diffusers would import torchao.
.venv/quantisers.stamp: .venv/dev.stamp
	$(PIP) --no-deps --upgrade --target .venv/oracles/quantisers torchao bitsandbytes lycoris_lora einops
	touch $@

.venv-light/stamp: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-light
	.venv-light/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt \
		--editable '.[test-light]'
	touch $@

# A Triton server and its clients, over the packages of .venv. The wheel is 55 MB and bundles the server; its own
# requirements are those of another API. Its version 2.51 was built for numpy 1, and the clients need an older protobuf.
.venv-triton/stamp: .venv/dev.stamp
	# The server of that wheel runs Python 3.11. Tests of it are skipped with any other.
	mkdir -p .venv-triton
	if $(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))'; then \
		$(PYTHON) -m venv .venv-triton && \
		.venv-triton/bin/python -m pip install --quiet --disable-pip-version-check --no-deps nvidia-pytriton==0.7.0 && \
		.venv-triton/bin/python -m pip install --quiet --disable-pip-version-check \
			'numpy==1.26.4' 'tritonclient[grpc,http]==2.73.0' && \
		echo "import site; site.addsitedir('$$($(BIN)/python -c 'import site; print(site.getsitepackages()[0])')')" \
			> "$$(.venv-triton/bin/python -c 'import site; print(site.getsitepackages()[0])')/cascadekit_packages.pth"; \
	fi
	touch $@

gpu-kit: .venv/demo.stamp ## what a machine with CUDA, Python and no network needs for `bench gpu`, into build/gpu-kit
	rm -rf build/gpu-kit && mkdir -p build # ARGS="--part-mib 60 --python 3.12 --onnxruntime onnxruntime-gpu==1.31.1"
	$(BIN)/cascadekit bench gpu-kit -o build/gpu-kit $(ARGS)

clean:
	rm -rf .venv .venv-light .venv-triton .venv-wheel .venv-docs build dist demo *.egg-info
