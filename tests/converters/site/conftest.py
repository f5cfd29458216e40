"""The bundle that the websites are made of."""

from pathlib import Path

import pytest

from cascadekit import export
from cascadekit.converters.checkpoints.example_model import EXAMPLE_MODEL


@pytest.fixture(scope="session")
def site_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundle of the example model, with all its stages, its weights in fp16; read only."""
    folder = tmp_path_factory.mktemp("site") / "bundle"
    export(EXAMPLE_MODEL, folder, storage="fp16")
    return folder
