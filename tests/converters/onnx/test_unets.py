"""Prior and decoder graphs in onnxruntime against the PyTorch reference and against diffusers."""

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import diffusers
import numpy as np
import pytest
import torch

from cascadekit.converters.onnx.conditions import timestep_frequencies
from cascadekit.schemas.stages import Stage, UNetConfig
from helpers.unets import DECODER, DECODER_SIZES, ODD_DECODER, ODD_PRIOR, ODD_PRIOR_SIZES, PRIOR, PRIOR_SIZES, inputs_of

TOLERANCE = 1e-5  # relative L2 of fp32 against fp32; about 5e-7 is found

CASES = [
    *((PRIOR, sizes) for sizes in PRIOR_SIZES),
    *((ODD_PRIOR, sizes) for sizes in ODD_PRIOR_SIZES),
    *((DECODER, sizes) for sizes in DECODER_SIZES),
    *((ODD_DECODER, sizes) for sizes in DECODER_SIZES[:3]),
]


@pytest.mark.parametrize(("config", "sizes"), CASES, ids=lambda v: v.stage if isinstance(v, UNetConfig) else str(v))
def test_graph_follows_the_reference(
    export: Callable[..., Any], difference: Callable[..., float], config: UNetConfig, sizes: tuple[int, ...]
) -> None:
    graph = export(config)
    inputs = inputs_of(graph, sizes)
    if "clip_text" in inputs:
        inputs["clip_text"][:, 3:] = 0  # as padded; no mask, zeros take part like other tokens
    assert difference(graph.run(inputs), graph.expected(inputs)) <= TOLERANCE


@pytest.mark.parametrize(("config", "sizes"), [CASES[1], CASES[7], CASES[11], CASES[14]])
def test_graph_follows_diffusers(
    export: Callable[..., Any], difference: Callable[..., float], config: UNetConfig, sizes: tuple[int, ...]
) -> None:
    graph = export(config)
    theirs = diffusers.StableCascadeUNet(**asdict(config)).eval()
    theirs.load_state_dict(graph.tensors)
    inputs = inputs_of(graph, sizes)
    with torch.no_grad():
        expected = theirs(**{name: torch.from_numpy(value) for name, value in inputs.items()}).sample.numpy()
    assert difference(graph.run(inputs), {"noise_pred": expected}) <= TOLERANCE


@pytest.mark.parametrize("ratio", [0.0, 0.05, 0.35, 0.95, 1.0])
def test_timesteps_of_a_schedule(export: Callable[..., Any], difference: Callable[..., float], ratio: float) -> None:
    graph = export(PRIOR)
    inputs = inputs_of(graph, PRIOR_SIZES[1]) | {"timestep_ratio": np.full(2, ratio, np.float32)}
    assert difference(graph.run(inputs), graph.expected(inputs)) <= TOLERANCE


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("config", "sizes"), [CASES[1], CASES[10]], ids=[Stage.PRIOR, Stage.DECODER])
def test_half_precision_storage_is_computed_in_fp32(
    export: Callable[..., Any],
    difference: Callable[..., float],
    config: UNetConfig,
    sizes: tuple[int, ...],
    dtype: torch.dtype,
) -> None:
    graph = export(config, dtype=lambda name: torch.float32 if name.endswith("bias") else dtype)
    inputs = inputs_of(graph, sizes)
    assert difference(graph.run(inputs), graph.expected(inputs)) <= TOLERANCE
    assert difference(export(config).expected(inputs), graph.expected(inputs)) > 10 * TOLERANCE  # it did round


def test_frequencies_have_the_bits_of_torch() -> None:
    """MKL's exp differs between instruction sets, in one entry; its compatible mode is the same on all."""
    if not torch.backends.mkl.is_available():
        pytest.skip("the bits are those of torch with MKL")
    code = (
        "import math, torch\nprint(torch.arange(32).float().mul(-math.log(10000) / 31).exp().numpy().tobytes().hex())"
    )
    environment = os.environ | {"MKL_CBWR": "COMPATIBLE"}
    printed = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert timestep_frequencies(64).tobytes().hex() == printed.stdout.strip()


@pytest.mark.parametrize("size", [4, 16, 64, 128, 512])
def test_frequencies_are_within_a_unit_of_torch(size: int) -> None:
    half = size // 2
    exponents = torch.arange(half).float().mul(-np.log(10000) / (half - 1))
    theirs = exponents.exp().numpy().view(np.int32)
    assert np.abs(timestep_frequencies(size)[0].view(np.int32) - theirs).max() <= 1
    exact = np.exp(exponents.double().numpy())
    np.testing.assert_allclose(timestep_frequencies(size)[0], exact, rtol=2.0**-23)
