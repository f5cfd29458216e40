"""The example model's bundle, and the environment of Triton's server and clients."""

import os
from pathlib import Path

import pytest

from cascadekit import export
from cascadekit.converters.checkpoints.example_model import EXAMPLE_MODEL
from helpers.triton_server import PYTHON


@pytest.fixture(scope="package")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("triton") / "bundle"
    export(EXAMPLE_MODEL, folder, controlnet=True)
    return folder


@pytest.fixture(scope="package")
def environment() -> Path:
    """The Python of the environment. Where it is missing, tests are skipped, but not on a build server."""
    if not PYTHON.exists():
        assert not os.environ.get("CI"), "make .venv-triton/stamp"
        pytest.skip("needs make .venv-triton/stamp")
    return PYTHON
