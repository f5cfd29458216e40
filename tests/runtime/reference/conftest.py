"""Fixtures for the oracle tests: random weights without zeros, and a measure of difference."""

from collections.abc import Callable
from typing import Any

import pytest
import torch


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
