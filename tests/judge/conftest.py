"""The bundle of the example model."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from cascadekit import Cascade, export
from cascadekit.converters.checkpoints.example_model import EXAMPLE_MODEL


@pytest.fixture(scope="session")
def example_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The example model, exported; read only."""
    pytest.importorskip("onnx")
    folder = tmp_path_factory.mktemp("example") / "bundle"
    export(EXAMPLE_MODEL, folder, controlnet=True)
    return folder


@pytest.fixture(scope="session")
def cascade(example_bundle: Path) -> Iterator[Cascade]:
    with Cascade.open(example_bundle, threads=1) as opened:
        yield opened
