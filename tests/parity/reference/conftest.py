"""Fixtures for the oracle tests: random weights without zeros, and a measure of difference."""

import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

HERE = Path(__file__).parent
ORACLES = HERE.parents[2] / ".venv" / "oracles"  # what must not be installed beside transformers


@pytest.fixture(scope="session")
def randomised() -> Callable[..., Any]:
    """A function that gives every parameter and buffer of a network random values, zero nowhere.

    Zeros and ones of the usual initialisation (GRN, head, VQGAN gammas, biases) would hide what is computed
    with them. Weights keep the size of activations; all else gets values around 0.3.
    """

    def fill(network: Any, seed: int = 0) -> Any:
        generator = torch.Generator().manual_seed(seed)
        for name, tensor in network.state_dict().items():
            if not tensor.is_floating_point():
                continue
            matrix = tensor.squeeze().ndim > 1
            size = tensor[0].numel() ** -0.5 if matrix else 0.3
            values = torch.randn(tensor.shape, generator=generator, dtype=torch.float64) * size
            tensor.copy_(values.abs() if name.endswith("running_var") else values)
            assert (tensor != 0).all(), name
        return network.requires_grad_(False).eval()

    return fill


@pytest.fixture(scope="session")
def difference() -> Callable[[Any, Any], float]:
    """A function for the greatest difference of two tensors, relative to the second one's greatest value."""

    def measure(ours: Any, theirs: Any) -> float:
        assert ours.shape == theirs.shape
        assert ours.dtype == theirs.dtype
        assert ours.isfinite().all()
        return float((ours.double() - theirs.double()).abs().max() / theirs.double().abs().max())

    return measure


@pytest.fixture
def torchvision_features(tmp_path: Path) -> Callable[[Mapping[str, Any], list[Any]], list[Any]]:
    """A function for what torchvision's EfficientNetV2-S makes of images, given a network's tensors ``backbone.*``."""

    def compute(tensors: Mapping[str, Any], images: list[Any]) -> list[Any]:
        if not (ORACLES / "torchvision").is_dir():
            pytest.fail(f"{ORACLES}: no torchvision there; `make test` installs it")
        files = [tmp_path / f"{name}.safetensors" for name in ("weights", "images", "features")]
        backbone = {name: value for name, value in tensors.items() if name.startswith("backbone.")}
        save_file({name.removeprefix("backbone."): value for name, value in backbone.items()}, files[0])
        save_file({str(number): image for number, image in enumerate(images)}, files[1])
        subprocess.run([sys.executable, HERE / "torchvision_features.py", ORACLES, *files], check=True)
        features = load_file(files[2])
        return [features[str(number)] for number in range(len(images))]

    return compute


@pytest.fixture(scope="session")
def random_weights() -> Callable[..., dict[str, Any]]:
    """A function for tensors of the given shapes by their names, random and nowhere zero, as `randomised` has them."""

    def make(shapes: Mapping[str, tuple[int, ...]], seed: int = 0) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(seed)
        tensors = {}
        for name, shape in shapes.items():
            size = torch.empty(shape[1:]).numel() ** -0.5 if sum(n > 1 for n in shape) > 1 else 0.3
            values = torch.randn(shape, generator=generator) * size
            values[values == 0] = 0.1
            counter = name.endswith("num_batches_tracked")
            tensors[name] = torch.tensor(7) if counter else values.abs() if name.endswith("running_var") else values
        return tensors

    return make
