"""Every format that is written: a foreign program opens it, and generates the pictures that we generate from it.

The networks are the foreign program's, or diffusers' with the weights that it read. Stability's sampler runs them. The
judge looks at the foreign pictures.
"""

import os
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import onnxruntime
import pytest
import torch
from diffusers import GGUFQuantizationConfig, ModularPipeline, StableCascadeUNet
from diffusers.utils import dynamic_modules_utils
from peft import PeftModel

from cascadekit import convert, export
from cascadekit.converters.checkpoints.example_model import EXAMPLE_LORA, EXAMPLE_MODEL
from cascadekit.converters.lora.convert_lora import convert_lora
from cascadekit.converters.lora.merge_checkpoint import merge_loras
from cascadekit.converters.openvino_ir import write_openvino_ir
from cascadekit.schemas.block_types import WRITTEN
from cascadekit.schemas.sdnq_formats import SDNQ_CHOICES
from helpers.format_pictures import PROMPTS, SEED, of_checkpoints, ours, record_pictures
from helpers.matrix import Matrix
from helpers.stability_pictures import by_stability

UNETS = {"prior": "stage_c", "decoder": "stage_b"}

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


def from_sdnq(output: Path, model: Path) -> Networks:
    """diffusers finds the package by the config, once it is imported."""
    os.environ.setdefault("SDNQ_USE_TORCH_COMPILE", "0")
    pytest.importorskip("sdnq", reason="pip install sdnq")
    return {
        stage: StableCascadeUNet.from_pretrained(output / stage, torch_dtype=torch.float32).eval() for stage in UNETS
    }


def from_ir(output: Path, model: Path) -> Networks:
    """The .xml files, by OpenVINO in the precision of their graphs."""
    core = pytest.importorskip("openvino").Core()
    precise = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1}
    paths = {stage: output / stage / "model.xml" for stage in UNETS}
    return {stage: partial(run_ir, core.compile_model(str(path), "CPU", precise)) for stage, path in paths.items()}


def run_ir(compiled: Any, **values: torch.Tensor) -> SimpleNamespace:
    feeds = {port.any_name: np.ascontiguousarray(values[port.any_name].numpy()) for port in compiled.inputs}
    return SimpleNamespace(sample=torch.from_numpy(compiled(feeds)[compiled.outputs[0]].copy()))


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


def of_gguf(output: Path, model: Path) -> np.ndarray:
    others = [model / stage for stage in ("vqgan", "text_encoder")]
    return of_checkpoints([*output.glob("*.gguf"), *others], output.with_name("read"))


def of_bundle(output: Path, model: Path) -> np.ndarray:
    return ours(output)


def ir(output: Path, model: Path) -> None:
    export(model, output.with_name("exported"))
    write_openvino_ir(output.with_name("exported"), output)


class Format(NamedTuple):
    write: Writer
    program: str
    read: Reader
    ours: Callable[[Path, Path], np.ndarray] = lambda output, model: of_checkpoints([output], output.with_name("read"))


FORMATS: dict[str, Format] = {
    "original in diffusers": Format(to("original"), "diffusers", from_single_files),
    "diffusers": Format(to("diffusers"), "diffusers", from_folder),
    "diffusers in shards": Format(to("diffusers", shard_size="1MB"), "diffusers", from_folder),
    **{
        f"diffusers {kind.lower()}": Format(to("diffusers", quantize=kind.lower()), "diffusers with sdnq", from_sdnq)
        for kind in SDNQ_CHOICES
    },
    "modular": Format(to("modular"), "diffusers modular", from_modular),
    "gguf": Format(to("gguf"), "diffusers with gguf", from_single_files, of_gguf),
    **{
        f"gguf {kind.lower()}": Format(
            to("gguf", quantize=kind.lower()), "diffusers with gguf", from_single_files, of_gguf
        )
        for kind in WRITTEN
    },
    "bundle fp32": Format(bundle(), "onnxruntime", from_graphs, of_bundle),
    "bundle fp16": Format(bundle(precision="fp16"), "onnxruntime", from_graphs, of_bundle),
    **{
        f"bundle {kind}": Format(bundle(quantize=kind), "onnxruntime", from_graphs, of_bundle)
        for kind in ("int8", "int4", "int8-dynamic", "fp8")
    },
    "openvino ir": Format(ir, "openvino", from_ir, lambda output, model: ours(output.with_name("exported"))),
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


@pytest.mark.slow
@pytest.mark.parametrize("name", FORMATS)
def test_a_foreign_program_generates_the_same_pictures(
    name: str, model: Path, unquantised: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, matrix: Matrix
) -> None:
    monkeypatch.setattr(dynamic_modules_utils, "HF_MODULES_CACHE", str(tmp_path / "code"))
    write, program, read, our_pictures = FORMATS[name]
    output = tmp_path / "output"
    write(output, model)
    networks = read(output, model)
    theirs = by_stability(model, PROMPTS, SEED, prior=networks["prior"], decoder=networks["decoder"])
    record_pictures(matrix, name, program, theirs, our_pictures(output, model), unquantised=unquantised)


@pytest.mark.slow
def test_peft_generates_the_same_pictures_with_our_adapter(model: Path, tmp_path: Path, matrix: Matrix) -> None:
    convert_lora(EXAMPLE_LORA, tmp_path / "adapter", "peft", against=EXAMPLE_MODEL / "stage_c.safetensors")
    networks = from_folder(model, model)
    prior = PeftModel.from_pretrained(networks["prior"], tmp_path / "adapter").merge_and_unload()
    theirs = by_stability(model, PROMPTS, SEED, prior=prior, decoder=networks["decoder"])
    merge_loras(model, [EXAMPLE_LORA], tmp_path / "merged")
    record_pictures(matrix, "lora peft", "peft", theirs, of_checkpoints([tmp_path / "merged"], tmp_path / "ours"))
