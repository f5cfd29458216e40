"""The reference as verify uses it: computing in other types, watched, and given values in the place of its own."""

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch

from cascadekit.converters.checkpoints.open_model import open_model
from cascadekit.parity.reference.loading import load_component, reference_engine
from cascadekit.parity.reference.torch_engine import TorchStage
from cascadekit.parity.sample_inputs import hardest_input, make_inputs
from cascadekit.runtime.text.tokenizer import ClipTokenizer
from cascadekit.schemas.stages import Stage
from cascadekit.storage.bundle import open_bundle

ALL = (Stage.TEXT_ENCODER, Stage.PRIOR, Stage.DECODER, Stage.VQGAN)
DTYPES = {"float64": torch.float64, "float16": torch.float16, "bfloat16": torch.bfloat16}


def loaded(tiny: Path, stage: Stage) -> tuple[TorchStage, Any, dict[str, Any]]:
    """The stage, its network once more, and inputs."""
    model = open_model([tiny / "model"])
    runner = reference_engine(model, ALL).load(stage)
    inputs = hardest_input(
        make_inputs(stage, open_bundle(tiny / "bundle").entry(stage), ClipTokenizer.open(None))
    ).inputs
    return runner, load_component(model.component(stage)), dict(inputs)


@pytest.mark.parametrize("compute", DTYPES)
@pytest.mark.parametrize("stage", ALL)
def test_computing_in_another_type_is_casting_the_network(tiny: Path, stage: Stage, compute: str) -> None:
    """Bit for bit, the timestep's embedding apart, which stays float32; and afterwards all is as before."""
    runner, network, inputs = loaded(tiny, stage)
    before = runner(inputs)
    found = runner(inputs, compute)
    dtype = DTYPES[compute]
    network = network.to(dtype)
    if hasattr(network, "time_embedding"):
        ours = network.time_embedding
        network.time_embedding = lambda ratio: ours(torch.from_numpy(inputs["timestep_ratio"])).to(dtype)
    fed = {k: torch.from_numpy(v) for k, v in inputs.items()}
    with torch.no_grad():
        expected = network(**{k: v.to(dtype) if v.is_floating_point() else v for k, v in fed.items()})
    for name, value in expected.items():
        assert (found[name] == value.float().numpy()).all(), name
    after = runner(inputs)
    assert all((after[name] == before[name]).all() for name in before)


@pytest.mark.parametrize("stage", ALL)
def test_quantised_is_rounding_the_linears(tiny: Path, stage: Stage) -> None:
    """By ml_dtypes' E4M3: weights by row, inputs as a whole; small and outer Linears and all else as they were."""
    runner, network, inputs = loaded(tiny, stage)
    before = runner(inputs)
    found = runner(inputs, "fp8")
    inner = ("channelwise.0", "channelwise.4", "kv_mapper.1", "to_q", "to_k", "to_v", "to_out.0")
    inner += ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")
    parts = [] if stage is Stage.VQGAN else network.named_modules()
    outermost = "up_blocks.3." if stage is Stage.DECODER else ()
    linears = [part for name, part in parts if name.endswith(inner) and not name.startswith(outermost)]
    assert bool(linears) == (stage is not Stage.VQGAN)

    def rounded(value: torch.Tensor, axis: int | None) -> torch.Tensor:
        wide = value.numpy()
        scale = np.abs(wide).max(axis=axis, keepdims=True) / np.float32(448)
        return torch.from_numpy((wide / scale).astype(ml_dtypes.float8_e4m3fn).astype(np.float32) * scale)

    for part in linears:
        part.weight.data = rounded(part.weight.data, 1)
        part.register_forward_pre_hook(lambda part, args: tuple(rounded(arg, None) for arg in args))
    with torch.no_grad():
        expected = network(**{name: torch.from_numpy(value) for name, value in inputs.items()})
    for name, value in expected.items():
        assert (found[name] == value.numpy()).all(), name
        assert (found[name] == before[name]).all() == (stage is Stage.VQGAN), name
    after = runner(inputs)
    assert all((after[name] == before[name]).all() for name in before)


def test_given_values_replace_what_modules_give(tiny: Path) -> None:
    """Values of a repeated level's first pass and of another block; the modules' own results are seen all the same."""
    runner, network, inputs = loaded(tiny, Stage.DECODER)
    shapes = runner.shapes(inputs)
    assert shapes["up_blocks.0.0@1"] == shapes["up_blocks.0.0"]
    rng = np.random.default_rng(0)
    given = {n: rng.standard_normal(shapes[n], dtype=np.float32) for n in ("down_blocks.1.0", "up_blocks.0.0@1")}
    found = runner.watch(inputs, {*given, "up_blocks.0.0", "up_blocks.3.1", "noise_pred"}, given)

    own: dict[str, Any] = {}
    calls = {"down_blocks.1.0": 0, "up_blocks.0.0": 0}

    def hook(name: str) -> Any:
        def replace(module: Any, args: Any, output: torch.Tensor) -> torch.Tensor | None:
            key = f"{name}@{calls[name]}" if calls[name] else name
            calls[name] += 1
            own[key] = output
            return torch.from_numpy(given[key]) if key in given else None

        return replace

    for name in calls:
        network.get_submodule(name).register_forward_hook(hook(name))
    with torch.no_grad():
        expected = network(**{k: torch.from_numpy(v) for k, v in inputs.items()})["noise_pred"]
    assert (found["noise_pred"] == expected.numpy()).all()
    for name in (*given, "up_blocks.0.0"):
        assert (found[name] == own[name].numpy()).all(), name
    assert not (found["down_blocks.1.0"] == given["down_blocks.1.0"]).all()
