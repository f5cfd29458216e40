"""The biases that an export computes for ONNX Runtime: their values, what graphs do with them, and LoRAs on top."""

import hashlib
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from cascadekit import export
from cascadekit.cli import main
from cascadekit.converters.lora.merge_bundle import apply_loras, undo_loras
from cascadekit.runtime.engines.engine_table import make_engine
from cascadekit.schemas.folded_biases import BIASES_NAME
from cascadekit.schemas.stages import Stage
from cascadekit.storage.bundle import open_bundle

WEIGHTS = "diffusion_pytorch_model.safetensors"
LINEAR, BETA = "up_blocks.0.0.channelwise.4", "up_blocks.0.0.channelwise.2.beta"


@pytest.fixture(scope="module")
def model(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny prior with betas and biases that are far from 0."""
    folder = tmp_path_factory.mktemp("folded") / "model"
    shutil.copytree(tiny / "model" / "prior", folder / "prior")
    path = folder / "prior" / WEIGHTS
    tensors, generator = load_file(path), torch.Generator().manual_seed(0)
    for name, tensor in tensors.items():
        if name.endswith((".beta", "channelwise.4.bias")):
            tensors[name] = torch.randn(tensor.shape, generator=generator)
    save_file(tensors, path, {"format": "pt"})
    return folder


def inputs(bundle: Path) -> dict[str, np.ndarray]:
    sizes = {"batch": 2, "height": 5, "width": 6, "tokens": 7, "images": 1}
    rng = np.random.default_rng(0)
    ports = open_bundle(bundle).entry(Stage.PRIOR).inputs
    shapes = {port.name: [sizes[dim] if isinstance(dim, str) else dim for dim in port.dims] for port in ports}
    given = {name: rng.standard_normal(shape, dtype=np.float32) for name, shape in shapes.items()}
    return {**given, "timestep_ratio": np.full(2, 0.4, np.float32)}


def computed(bundle: Path, engine: str = "onnxruntime") -> np.ndarray:
    return np.asarray(make_engine(engine, open_bundle(bundle)).load(Stage.PRIOR)(inputs(bundle))["noise_pred"])


def distance(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def digests(bundle: Path) -> Iterator[tuple[str, str]]:
    for path in sorted(bundle.rglob("*")):
        if path.is_file():
            yield path.relative_to(bundle).as_posix(), hashlib.sha256(path.read_bytes()).hexdigest()


def expected_biases(weights: Path) -> dict[str, torch.Tensor]:
    """By torch in float64."""
    tensors = {name: tensor.double() for name, tensor in load_file(weights).items()}
    found = {}
    for name, beta in tensors.items():
        if name.endswith(".beta"):
            linear = name.replace("channelwise.2.beta", "channelwise.4")
            product = tensors[f"{linear}.weight"] @ beta.flatten()
            found[f"{linear}.bias_with_beta"] = (product + tensors[f"{linear}.bias"]).float()
    return found


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_values(model: Path, tmp_path: Path, precision: str) -> None:
    """In fp32, of the weights as the bundle has them; no other target has them."""
    safe = {"fp16_safe": "off"} if precision == "fp16" else {}
    manifest = export(model, tmp_path / "bundle", precision=precision, target="ort", **safe)
    folder = tmp_path / "bundle" / "prior"
    found = load_file(folder / BIASES_NAME)
    (weights,) = (path for path in folder.glob("*.safetensors") if path.name != BIASES_NAME)
    wanted = expected_biases(weights)
    assert found.keys() == wanted.keys()
    assert len(found) == 4
    for name, bias in wanted.items():
        torch.testing.assert_close(found[name], bias, rtol=1e-5, atol=1e-5)
    assert f"prior/{BIASES_NAME}" in {file.path for file in manifest.stages[Stage.PRIOR].files}
    assert CliRunner().invoke(main, ["validate", str(tmp_path / "bundle")]).exit_code == 0
    if precision == "fp32":
        export(model, tmp_path / "portable")
        assert not (tmp_path / "portable" / "prior" / BIASES_NAME).exists()
        assert distance(computed(tmp_path / "bundle"), computed(tmp_path / "portable")) < 1e-6


def test_linked_weights_of_another_layout(tiny: Path, tmp_path: Path) -> None:
    """Their file is beside links, and holds the same."""
    export(tiny / "original" / "stage_c.safetensors", tmp_path / "linked", target="ort", weights="link")
    export(tiny / "model", tmp_path / "copied", stages=[Stage.PRIOR], target="ort", weights="copy")
    for bundle in (tmp_path / "linked", tmp_path / "copied"):  # PyTorch's engine takes the weights beside them
        assert distance(computed(bundle, "torch"), computed(bundle)) < 1e-5
    found, wanted = (load_file(tmp_path / name / "prior" / BIASES_NAME) for name in ("linked", "copied"))
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize("part", ["weight", "bias"])
def test_a_lora_changes_them_and_an_undo_brings_them_back(model: Path, tmp_path: Path, part: str) -> None:
    export(model, tmp_path / "bundle", target="ort")
    before, plain = dict(digests(tmp_path / "bundle")), computed(tmp_path / "bundle")
    shape = load_file(model / "prior" / WEIGHTS)[f"{LINEAR}.{part}"].shape
    change = 0.2 * torch.randn(shape, generator=torch.Generator().manual_seed(1))
    lora = tmp_path / "full.safetensors"
    module = f"lora_unet_{LINEAR.replace('.', '_')}"
    save_file({f"{module}.{'diff' if part == 'weight' else 'diff_b'}": change}, lora)

    apply_loras(tmp_path / "bundle", [lora])
    export(model, tmp_path / "exported", target="ort", loras=[(lora, 1.0)])
    found, wanted = computed(tmp_path / "bundle"), computed(tmp_path / "exported")
    assert distance(found, wanted) < 1e-6
    assert distance(found, plain) > 1e-3
    files = [load_file(tmp_path / name / "prior" / BIASES_NAME) for name in ("bundle", "exported")]
    assert all(torch.equal(files[0][each], files[1][each]) for each in files[1])
    assert CliRunner().invoke(main, ["validate", str(tmp_path / "bundle")]).exit_code == 0
    undo_loras(tmp_path / "bundle")
    assert dict(digests(tmp_path / "bundle")) == before


def test_loras_find_every_tensor(model: Path, tmp_path: Path) -> None:
    """Graphs name all parts of a bias, also those that no node reads: a LoRA on a bundle looks there."""
    export(model, tmp_path / "bundle", target="ort")
    graph = onnx.load(tmp_path / "bundle" / "prior" / "step.onnx", load_external_data=False).graph
    named = {tensor.name for tensor in graph.initializer}
    assert {BETA, f"{LINEAR}.bias", f"{LINEAR}.weight"} <= named
    assert BETA not in {name for node in graph.node for name in node.input}
