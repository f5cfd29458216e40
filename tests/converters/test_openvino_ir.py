"""OpenVINO IR of a bundle: OpenVINO itself reads it, and the images are those of the bundle."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from cascadekit import Cascade, CascadeError, UsageError, export
from cascadekit.cli import main
from cascadekit.converters.openvino_ir import write_openvino_ir
from cascadekit.runtime.engines.openvino import import_openvino
from cascadekit.runtime.engines.protocol import HostRunner, Tensors
from cascadekit.schemas.stages import Stage
from cascadekit.storage.bundle import open_bundle

openvino = pytest.importorskip("openvino")
CORE = import_openvino().Core()
PRECISE = {"INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": 1}


class Compiled(HostRunner):
    """A stage that OpenVINO reads from an .xml file."""

    def __init__(self, path: Path) -> None:
        self.model = CORE.compile_model(CORE.read_model(str(path)), "CPU", PRECISE)

    def __call__(self, inputs: Tensors) -> dict[str, Any]:
        outputs = self.model({name: np.ascontiguousarray(value) for name, value in inputs.items()})
        return {port.any_name: outputs[port] for port in self.model.outputs}

    def close(self) -> None:
        pass


class FromIr:
    """An engine that knows the folder of IR alone."""

    name, precision = "ir", None

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def graphs(self, stage: Stage) -> tuple[str, ...]:
        return tuple(path.stem for path in (self.folder / stage).glob("*.xml"))

    def load(self, stage: Stage, graph: str = "model") -> Compiled:
        return Compiled(self.folder / stage / f"{graph}.xml")


@pytest.fixture(scope="module")
def halved(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("halved") / "bundle"
    export(tiny / "model", folder, storage="fp16")
    return folder


def test_the_images_are_those_of_the_bundle(halved: Path, tmp_path: Path) -> None:
    ir = tmp_path / "ir"
    arguments = ["ir", str(halved), "-o", str(ir), "--json"]
    sizes = json.loads(CliRunner().invoke(main, arguments, catch_exceptions=False).stdout)["files"]
    assert sizes == {path.relative_to(ir).as_posix(): path.stat().st_size for path in ir.rglob("*.*")}
    weights = sum(path.stat().st_size for path in halved.rglob("*.safetensors"))
    assert sum(size for name, size in sizes.items() if name.endswith(".bin")) < 1.05 * weights  # still in fp16
    sizes_and_steps = {"width": 72, "height": 64, "prior_steps": 2, "decoder_steps": 2}
    settings: dict[str, Any] = {"seed": 1, "num_images": 2, **sizes_and_steps}
    with Cascade.open(halved, engine="openvino", threads=1) as cascade:
        expected = cascade.generate("a fox", **settings).pixels
        found = Cascade(FromIr(ir), cascade.manifest, cascade.tokenizer).generate("a fox", **settings).pixels  # type: ignore[arg-type]
    assert expected is not None
    assert found is not None
    assert expected.shape == (2, 3, 64, 72)
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_the_files_say_what_they_were_made_of(halved: Path, tmp_path: Path) -> None:
    write_openvino_ir(halved, tmp_path / "ir")
    model = CORE.read_model(str(tmp_path / "ir" / "prior" / "model.xml"))
    manifest = open_bundle(halved).manifest
    (source,) = json.loads(model.get_rt_info(["cascadekit", "sources"]).astype(str))
    assert source["fingerprint"] == manifest.stages[Stage.PRIOR].sources[0].fingerprint
    assert model.get_rt_info(["framework", "cascadekit.source_fingerprints"]).astype(str) == source["fingerprint"]
    assert json.loads(model.get_rt_info(["cascadekit", "vqgan_scale"]).astype(str)) == manifest.vqgan_scale
    ports = manifest.stages[Stage.PRIOR].graphs["model"].inputs
    assert {port.any_name for port in model.inputs} == {port.name for port in ports}


def test_a_folder_that_is_there_is_replaced_with_force_alone(halved: Path, tmp_path: Path) -> None:
    kept = tmp_path / "ir" / "vqgan" / "model.xml"
    kept.parent.mkdir(parents=True)
    kept.write_text("mine")
    with pytest.raises(UsageError, match=r"vqgan/model\.xml"):
        write_openvino_ir(halved, tmp_path / "ir")
    assert kept.read_text() == "mine"
    write_openvino_ir(halved, tmp_path / "ir", force=True)
    assert kept.read_text() != "mine"


def test_damaged_graphs_are_refused(halved: Path, tmp_path: Path) -> None:
    shutil.copytree(halved, tmp_path / "bundle")
    graph = tmp_path / "bundle" / "vqgan" / "model.onnx"
    graph.write_bytes(graph.read_bytes()[:-100])
    with pytest.raises(CascadeError, match=r"vqgan/model\.onnx"):
        write_openvino_ir(tmp_path / "bundle", tmp_path / "ir")
    assert not (tmp_path / "ir").exists()


def test_graphs_in_bf16_are_refused(tiny: Path, tmp_path: Path) -> None:
    """OpenVINO would read them, and return noise."""
    export(tiny / "model", tmp_path / "bundle", stages=[Stage.VQGAN], precision="bf16")
    with pytest.raises(CascadeError, match=r"vqgan: its graphs compute in bf16.* --precision vqgan=fp32"):
        write_openvino_ir(tmp_path / "bundle", tmp_path / "ir")
    assert not (tmp_path / "ir").exists()
