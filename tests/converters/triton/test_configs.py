"""Every config.pbtxt, as Triton's own protobufs read it, matches the graph that onnx reads."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx
import pytest

from cascadekit.converters.triton.triton_options import TritonOptions
from cascadekit.converters.triton.write_repository import export_triton
from cascadekit.schemas.config_json import from_json
from cascadekit.schemas.errors import EngineError, ExportError
from cascadekit.schemas.manifest import MAIN_GRAPH, Manifest, StageEntry
from cascadekit.schemas.plan_entries import DeviceEntry, PlanEntry, PlanSource
from cascadekit.schemas.profiles import Bounds, parse_image_size, profile_for
from cascadekit.schemas.stages import Stage
from cascadekit.storage.bundle import update_manifest
from helpers.triton_server import run_calls

STAGES = ("text_encoder", "prior", "decoder", "vqgan", "previewer")
TYPES = {onnx.TensorProto.FLOAT: "TYPE_FP32", onnx.TensorProto.INT64: "TYPE_INT64"}
VARIANTS = {
    "onnxruntime": TritonOptions(),
    "python": TritonOptions(backend="python", device="cpu", instances=3, batch=5),
    "tensorrt": TritonOptions(backend="tensorrt", exact=False),
}


@pytest.fixture(scope="module")
def configs(bundle: Path, environment: Path, tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Any]:
    """The configs of all variants by "VARIANT/MODEL"."""
    folder = tmp_path_factory.mktemp("variants")
    add_plans(bundle, "sm89", "sm120")
    for name, options in VARIANTS.items():
        export_triton(bundle, folder / name, options)
    return run_calls("parse_configs", "", "", folder)


def add_plans(bundle: Path, *capabilities: str) -> None:
    """Plans of whole graphs, for images of 512 to 1024 pixels, two at most. Their files are not TensorRT's."""

    def with_plans(manifest: Manifest) -> Manifest:
        return manifest.model_copy(
            update={
                "stages": {
                    stage: entry.model_copy(
                        update={"plans": tuple(plan_of(bundle, stage, entry, sm) for sm in capabilities)}
                    )
                    for stage, entry in manifest.stages.items()
                }
            }
        )

    update_manifest(bundle, with_plans)


def plan_of(bundle: Path, stage: Stage, entry: StageEntry, capability: str) -> PlanEntry:
    path = bundle / stage / "plans" / f"{capability}.plan"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(f"{stage} {capability}".encode())
    bounds = Bounds(*map(parse_image_size, ("512x512x1", "1024x1024x1", "1024x1024x2")))
    return PlanEntry(
        graph=MAIN_GRAPH,
        path=path.relative_to(bundle).as_posix(),
        bytes=path.stat().st_size,
        sha256=hashlib.sha256(path.read_bytes()).hexdigest(),
        backend="tensorrt",
        backend_version="10.13.0",
        device=DeviceEntry(name="a GPU", capability=capability),
        precision=entry.precision,
        profiles=(profile_for(from_json(stage, entry.config), MAIN_GRAPH, entry.inputs, bounds),),
        sources=tuple(
            PlanSource(path=file.path, fingerprint=file.fingerprint, sha256=file.sha256) for file in entry.files
        ),
        seconds=1.0,
        peak_rss=1,
    )


def ports(graph: Any) -> dict[str, tuple[str, list[str], bool]]:
    """Type and dims of one row, as a config has them, and whether a row is a number."""
    found = {}
    for port in graph:
        tensor = port.type.tensor_type
        dims = [str(dim.dim_value) if dim.HasField("dim_value") else "-1" for dim in tensor.shape.dim]
        assert dims[0] == "-1", "the batch"
        found[port.name] = (TYPES[tensor.elem_type], dims[1:] or ["1"], not dims[1:])
    return found


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("stage", STAGES)
def test_stages_have_the_ports_of_their_graphs(
    configs: Mapping[str, Any], bundle: Path, variant: str, stage: str
) -> None:
    config = configs[f"{variant}/{stage}"]
    graph = onnx.load(bundle / stage / "model.onnx", load_external_data=False).graph
    for field, expected in (("input", ports(graph.input)), ("output", ports(graph.output))):
        found = {each["name"]: (each["data_type"], each["dims"], "reshape" in each) for each in config[field]}
        assert found == expected
    assert config["name"] == stage
    assert config["backend"] == variant
    assert ("dynamic_batching" in config) == (not VARIANTS[variant].exact)


def test_batches_and_instances_are_those_asked_for(configs: Mapping[str, Any]) -> None:
    assert {configs[f"python/{name}"]["max_batch_size"] for name in (*STAGES, "cascade", "cascade_stream")} == {5}
    assert configs["python/cascade"]["instance_group"] == [{"count": 3, "kind": "KIND_CPU"}]
    assert configs["python/prior"]["instance_group"] == [{"count": 1, "kind": "KIND_CPU"}]
    assert configs["onnxruntime/prior"]["instance_group"][0].get("kind", "KIND_AUTO") == "KIND_AUTO"
    assert configs["onnxruntime/cascade"]["parameters"] == {"rows": {"string_value": "1"}}


def test_plans_are_chosen_by_gpu_and_bound_the_batch(configs: Mapping[str, Any]) -> None:
    prior, vqgan = configs["tensorrt/prior"], configs["tensorrt/vqgan"]
    assert prior["cc_model_filenames"] == {"8.9": "model_sm89.plan", "12.0": "model_sm120.plan"}
    assert prior["instance_group"] == [{"count": 1, "kind": "KIND_GPU"}]
    assert (prior["max_batch_size"], vqgan["max_batch_size"]) == (4, 1)  # two images, each with a negative prompt
    assert configs["tensorrt/cascade"]["parameters"] == {"rows": {"string_value": "4"}}


@pytest.mark.parametrize("variant", VARIANTS)
def test_only_the_stream_is_decoupled(configs: Mapping[str, Any], variant: str) -> None:
    stream = configs[f"{variant}/cascade_stream"]
    assert stream["model_transaction_policy"] == {"decoupled": True}
    decoupled = [name for name, config in configs.items() if "model_transaction_policy" in config]
    assert sorted(decoupled) == sorted(f"{each}/cascade_stream" for each in VARIANTS)
    required = [each["name"] for each in stream["input"] if not each.get("optional")]
    assert required == ["prompt"]


def test_a_plan_that_is_damaged_is_refused(bundle: Path, tmp_path: Path) -> None:
    add_plans(bundle, "sm89")
    (bundle / "vqgan" / "plans" / "sm89.plan").write_bytes(b"another")
    with pytest.raises(EngineError, match="the plan is damaged"):
        export_triton(bundle, tmp_path / "repository", VARIANTS["tensorrt"])
    assert not (tmp_path / "repository").exists()


def test_plans_for_other_gpus_are_refused(bundle: Path, tmp_path: Path) -> None:
    add_plans(bundle, "sm89")

    def move(manifest: Manifest) -> Manifest:
        prior = manifest.stages[Stage.PRIOR]
        other = prior.plans[0].model_copy(update={"device": DeviceEntry(name="another", capability="sm75")})
        stages = {**manifest.stages, Stage.PRIOR: prior.model_copy(update={"plans": (other,)})}
        return manifest.model_copy(update={"stages": stages})

    update_manifest(bundle, move)
    with pytest.raises(EngineError, match=r"for different GPUs: text_encoder sm89; prior sm75"):
        export_triton(bundle, tmp_path / "repository", VARIANTS["tensorrt"])


def test_plans_that_take_no_single_row_are_not_exact(bundle: Path, tmp_path: Path) -> None:
    add_plans(bundle, "sm89")

    def widen(manifest: Manifest) -> Manifest:
        decoder = manifest.stages[Stage.DECODER]
        plan = decoder.plans[0]
        profile = plan.profiles[0]
        shapes = {name: port.model_copy(update={"min": (2, *port.min[1:])}) for name, port in profile.ports.items()}
        plan = plan.model_copy(update={"profiles": (profile.model_copy(update={"ports": shapes}),)})
        stages = {**manifest.stages, Stage.DECODER: decoder.model_copy(update={"plans": (plan,)})}
        return manifest.model_copy(update={"stages": stages})

    update_manifest(bundle, widen)
    with pytest.raises(ExportError, match="the plans of the decoder take no single row"):
        export_triton(bundle, tmp_path / "repository", TritonOptions(backend="tensorrt"))
