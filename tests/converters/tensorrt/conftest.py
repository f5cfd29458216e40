"""Bundles to build from. Exported once in each precision; a test gets its own copy of hard links, without plans."""

import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from cascadekit import export
from cascadekit.bench.standins import write_stand_in
from cascadekit.converters.checkpoints.model_folder import write_folder_files
from cascadekit.schemas.precision import Precision, Target
from cascadekit.schemas.stages import ImageEncoderConfig, NetworkConfig, Stage
from cascadekit.schemas.tensors import expected_tensors
from helpers.made_once import made_once


@pytest.fixture(scope="session")
def exported(original: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A function for the tiny cascade's bundle in a precision; read only."""

    @cache
    def made(precision: str) -> Path:
        def write(folder: Path) -> None:
            options = {"precision": Precision(precision), "target": Target.TENSORRT}
            export(original, folder / "bundle", weights="copy", **options)

        return made_once(tmp_path_factory, f"tensorrt-{precision}", write) / "bundle"

    return made


@pytest.fixture
def bundle(exported: Callable[[str], Path], tmp_path: Path) -> Path:
    """A copy of the bundle in bf16 that a test may change."""
    return shutil.copytree(exported("bf16"), tmp_path / "bundle")


@pytest.fixture(scope="session")
def exported_network(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A function for the bundle of one network with random weights."""

    def made(config: NetworkConfig, precision: Precision) -> Path:
        folder = tmp_path_factory.mktemp(config.stage.replace("/", "-"))
        source = folder / "source.safetensors"
        if isinstance(config, ImageEncoderConfig):
            source = folder / "model"
            write_folder_files(source, {Stage.IMAGE_ENCODER: config}, index=False)
            random = np.random.default_rng(0)
            shapes = expected_tensors(config).items()
            tensors = {name: random.normal(0.3, 0.1, shape).astype(np.float32) for name, shape in shapes}
            save_file(tensors, source / Stage.IMAGE_ENCODER / "model.safetensors")
        else:
            write_stand_in(source, config, "BF16")
        export(source, folder / "bundle", weights="copy", precision=precision, target=Target.TENSORRT)
        return folder / "bundle"

    return made
