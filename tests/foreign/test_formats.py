"""Every format that is written: a foreign program opens it, and generates the pictures that we generate from it.

The networks are the foreign program's, or diffusers' with the weights that it read. Stability's sampler runs them. The
judge looks at the foreign pictures.
"""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from diffusers import GGUFQuantizationConfig, ModularPipeline, StableCascadeUNet
from diffusers.loaders.single_file_utils import convert_stable_cascade_unet_single_file_to_diffusers as renamed
from diffusers.utils import dynamic_modules_utils
from safetensors.torch import load_file

from cascadekit import Cascade, convert, export
from cascadekit.bench.judge.judge import judge
from cascadekit.bench.judge.scenes import Icon
from cascadekit.converters.checkpoints.example_model import EXAMPLE_MODEL
from cascadekit.parity.image_metrics import psnr
from helpers.comfy_files import opened
from helpers.matrix import Matrix
from helpers.stability_pictures import STABILITY, by_stability

SCENES = (Icon("strawberry", "glossy", "white"), Icon("fox", "flat", "white"))
PROMPTS = [f"a {scene.name}, {scene.style} style" for scene in SCENES]
SEED = 11
UNETS = {"prior": "stage_c", "decoder": "stage_b"}
LEAST_PSNR = 40.0  # dB; of two readings of the same file

Networks = Mapping[str, Callable[..., Any]]
Writer = Callable[[Path, Path], object]  # called with the output to make, and a diffusers folder of the model
Reader = Callable[[Path, Path], Networks]  # called with the same


def from_folder(output: Path, model: Path) -> Networks:
    return {stage: StableCascadeUNet.from_pretrained(output / stage).eval() for stage in UNETS}


def from_modular(output: Path, model: Path) -> Networks:
    pipe = ModularPipeline.from_pretrained(output, trust_remote_code=True)
    pipe.load_components()
    return {"prior": pipe.prior.eval(), "decoder": pipe.decoder.eval()}


def from_single_files(output: Path, model: Path) -> Networks:
    """Weights in Stability's names, or GGUF, by diffusers' loader of single files."""
    found = {}
    for stage, letter in UNETS.items():
        (path,) = output.glob(f"{letter}*")
        settings = {"quantization_config": GGUFQuantizationConfig(torch.float32)} if path.suffix == ".gguf" else {}
        found[stage] = StableCascadeUNet.from_single_file(str(path), config=str(model / stage), **settings).eval()
    return found


def from_comfyui(output: Path, model: Path) -> Networks:
    """Weights of ComfyUI's all-in-one files, unpacked by comfy-kitchen where they are quantised."""
    found = {}
    prefix = "model.diffusion_model."
    for stage, letter in UNETS.items():
        path = output / f"stable_cascade_{letter}.safetensors"
        tensors = {k.removeprefix(prefix): t.float() for k, t in load_file(path).items() if k.startswith(prefix)}
        if any(key.endswith(".comfy_quant") for key in tensors):
            layers = opened(path, prefix)
            tensors |= {f"{layer}.weight": weight.dequantize() for layer, weight in layers.items()}
            tensors = {key: t for key, t in tensors.items() if not key.endswith(("_scale", "_scale_2", ".comfy_quant"))}
        network = StableCascadeUNet.from_config(StableCascadeUNet.load_config(model / stage)).eval()
        network.load_state_dict(renamed(together(tensors)))
        found[stage] = network
    return found


def together(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Join q, k and v, as PyTorch's attention has them."""
    joined = dict(tensors)
    for key in tensors:
        if ".to_q." in key:
            parts = [joined.pop(key.replace("to_q", part)) for part in ("to_q", "to_k", "to_v")]
            joined[key.replace("to_q.", "in_proj_")] = torch.cat(parts)
    return joined


def from_graphs(output: Path, model: Path) -> Networks:
    """The graphs of a bundle in plain sessions of ONNX Runtime."""
    return {stage: partial(run_graph, onnxruntime.InferenceSession(output / stage / "model.onnx")) for stage in UNETS}


def run_graph(session: onnxruntime.InferenceSession, **values: torch.Tensor) -> SimpleNamespace:
    feeds = {port.name: np.ascontiguousarray(values[port.name].numpy()) for port in session.get_inputs()}
    return SimpleNamespace(sample=torch.from_numpy(session.run(None, feeds)[0]))


def to(layout: str, **options: Any) -> Writer:
    return lambda output, model: convert(EXAMPLE_MODEL, output, layout, **options)


def bundle(**options: Any) -> Writer:
    return lambda output, model: export(model, output, **options)


# Format -> how it is written, the program that reads it, and how that is called.
FORMATS: dict[str, tuple[Writer, str, Reader]] = {
    "original": (to("original"), "diffusers", from_single_files),
    "diffusers": (to("diffusers"), "diffusers", from_folder),
    "modular": (to("modular"), "diffusers modular", from_modular),
    "comfyui": (to("comfyui"), "safetensors", from_comfyui),
    **{
        f"gguf {kind}": (to("gguf", quantize=kind), "diffusers with gguf", from_single_files)
        for kind in ("q8_0", "q6_k", "q5_k", "q4_k")
    },
    **{
        f"comfyui {kind}": (to("comfyui", quantize=kind), "comfy-kitchen", from_comfyui)
        for kind in ("fp8", "fp8_e5m2", "int8", "mxfp8", "nvfp4")
    },
    "bundle fp32": (bundle(), "onnxruntime", from_graphs),
    "bundle fp16": (bundle(precision="fp16"), "onnxruntime", from_graphs),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The example model as diffusers has it, with its scale of the VQGAN; read only."""
    folder = tmp_path_factory.mktemp("model") / "model"
    convert(EXAMPLE_MODEL, folder, "diffusers", dtype="fp32")
    return folder


@pytest.fixture(scope="module")
def unquantised(model: Path) -> np.ndarray:
    """Our pictures of the model as it is."""
    export(model, model.with_name("bundle"))
    return ours(model.with_name("bundle"))


def ours(folder: Path) -> np.ndarray:
    with Cascade.open(folder, threads=1) as cascade:
        pixels = cascade.generate(PROMPTS, seed=SEED, **STABILITY).pixels
    assert pixels is not None
    return pixels


def our_reading(name: str, output: Path, model: Path, tmp_path: Path) -> np.ndarray:
    """Our pictures from the UNets in `output`, with the other networks of `model`."""
    if name.startswith("bundle"):
        return ours(output)
    sources = [output]
    if name.startswith("gguf"):
        sources = [*output.glob("*.gguf"), *(model / stage for stage in ("vqgan", "text_encoder"))]
    convert(sources, tmp_path / "read", "diffusers", dtype="fp32")
    export(tmp_path / "read", tmp_path / "bundle")
    return ours(tmp_path / "bundle")


@pytest.mark.slow
@pytest.mark.parametrize("name", FORMATS)
def test_a_foreign_program_generates_the_same_pictures(
    name: str, model: Path, unquantised: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, matrix: Matrix
) -> None:
    monkeypatch.setattr(dynamic_modules_utils, "HF_MODULES_CACHE", str(tmp_path / "code"))
    write, program, read = FORMATS[name]
    output = tmp_path / "output"
    write(output, model)
    networks = read(output, model)
    theirs = by_stability(model, PROMPTS, SEED, prior=networks["prior"], decoder=networks["decoder"])
    found = our_reading(name, output, model, tmp_path)
    agreement = psnr(found, theirs)
    assert agreement >= LEAST_PSNR
    levels = (theirs.transpose(0, 2, 3, 1) * 255).round().astype(np.uint8)
    right = sum(judge(picture, scene).right for picture, scene in zip(levels, SCENES, strict=True))
    matrix.record(name, "opened", by=program)
    matrix.record(name, "picture", agreement, by=program)
    matrix.record(name, "cost", psnr(unquantised, theirs), by=program)
    matrix.record(name, "judged", right, by=program)
