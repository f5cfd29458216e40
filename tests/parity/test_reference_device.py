"""The reference on another device. No GPU is here: torch's device without storage stands in, and its own switches."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from torch import nn

import cascadekit
from cascadekit.cli import main
from cascadekit.converters.checkpoints.component import Component
from cascadekit.converters.checkpoints.open_model import open_model
from cascadekit.parity.reference import build_reference, loading
from cascadekit.parity.reference.loading import load_component, reference_engine
from cascadekit.runtime.engines.pytorch.device import computing_on
from cascadekit.schemas.errors import UsageError
from cascadekit.schemas.ports import ports_of
from cascadekit.schemas.stages import (
    PROJ_BLOCKS_ENDS,
    ControlNetConfig,
    EffnetEncoderConfig,
    ImageEncoderConfig,
    NetworkConfig,
    PreviewerConfig,
    Stage,
)

OTHERS = (
    ImageEncoderConfig(32, 64, 2, 4, 8, image_size=28),
    EffnetEncoderConfig(),
    PreviewerConfig(c_hidden=16),
    ControlNetConfig(1, PROJ_BLOCKS_ENDS, None, 64),
)
SIZES = {"batch": 2, "height": 64, "width": 96, "effnet_height": 6, "effnet_width": 5, "tokens": 77, "images": 2}


def inputs_on(device: str, config: NetworkConfig) -> dict[str, torch.Tensor]:
    shapes = {port.name: [SIZES[d] if isinstance(d, str) else d for d in port.dims] for port in ports_of(config).inputs}
    dtypes = {port.name: getattr(torch, port.dtype) for port in ports_of(config).inputs}
    return {name: torch.zeros(shape, dtype=dtypes[name], device=device) for name, shape in shapes.items()}


def test_without_a_gpu_it_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    assert not torch.cuda.is_available()
    words = r'reference_device="cuda": torch \S+ finds no GPU here; .*reference_device="cpu"'
    with pytest.raises(UsageError, match=words):
        cascadekit.verify(tmp_path / "no bundle", tmp_path / "no model", reference_device="cuda")
    with pytest.raises(UsageError, match=words):
        cascadekit.record_reference(tmp_path / "no", tmp_path / "no", tmp_path / "x", reference_device="cuda")
    with pytest.raises(UsageError, match="a recording has been computed already"):
        cascadekit.verify(tmp_path / "no bundle", recorded=tmp_path / "no", reference_device="cuda")
    assert not list(tmp_path.iterdir())


def test_the_option(tiny: Path) -> None:
    arguments = ["verify", tiny / "bundle", "--against", tiny / "model", "--reference-device", "cuda"]
    result = CliRunner().invoke(main, [str(each) for each in arguments])
    assert result.exit_code == 2
    assert "--reference-device cuda: torch" in " ".join(result.output.split())


def test_networks_compute_where_their_inputs_are(tiny: Path) -> None:
    """A tensor that a network made on the CPU would meet one of another device, which torch refuses."""
    model = open_model([tiny / "model"])
    networks = [(component.config, load_component(component, device="meta")) for component in model.components.values()]
    with torch.device("meta"):
        networks += [(config, build_reference(config).eval()) for config in OTHERS]
    assert {config.stage for config, _ in networks} >= {Stage.PRIOR, Stage.DECODER, Stage.VQGAN, Stage.TEXT_ENCODER}
    for config, network in networks:
        weights = [*network.parameters(), *network.buffers()]
        assert {weight.device.type for weight in weights} == {"meta"}, config.stage
        outputs = network(**inputs_on("meta", config))
        assert {value.device.type for value in outputs.values()} == {"meta"}, config.stage


def test_a_gpu_computes_without_tf32_and_its_memory_is_freed(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = torch.backends.cuda.matmul, torch.backends.cudnn
    found = [part.allow_tf32 for part in parts]
    for part in parts:
        part.allow_tf32 = True  # whatever ran before in this process

    def fail() -> None:
        with computing_on(torch.device("cuda")):
            assert not any(part.allow_tf32 for part in parts)
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert all(part.allow_tf32 for part in parts)
    for part, allowed in zip(parts, found, strict=True):
        part.allow_tf32 = allowed

    freed = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: freed.append(True))
    engine = reference_engine(open_model([tiny / "model"]), [Stage.VQGAN], device="cpu")
    assert engine.name == "torch"
    runner = engine.load(Stage.VQGAN)
    runner.close()
    assert not freed
    runner = engine.load(Stage.VQGAN)
    runner._device = torch.device("cuda")
    runner.close()
    assert freed == [True]
    assert reference_engine(open_model([tiny / "model"]), [], device="cuda").name == "torch on cuda"


def test_a_whole_verification(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The option reaches every network of the reference. Their GPU is the CPU here."""
    placed = []

    def load_here(component: Component, dtype: torch.dtype, device: str) -> nn.Module:
        placed.append((component.stage, device))
        return load_component(component, dtype)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(loading, "load_component", load_here)
    shutil.copytree(tiny / "bundle", tmp_path / "bundle")
    stages = ("--stage", "vqgan", "--stage", "text_encoder")
    arguments = [
        "verify",
        tmp_path / "bundle",
        "--against",
        tiny / "model",
        "--reference-device",
        "cuda",
        *stages,
        "--json",
    ]
    result = CliRunner().invoke(main, [str(each) for each in arguments])
    assert result.exit_code == 0, result.output
    assert set(placed) == {(Stage.VQGAN, "cuda"), (Stage.TEXT_ENCODER, "cuda")}
    assert json.loads(result.stdout)["passed"]
