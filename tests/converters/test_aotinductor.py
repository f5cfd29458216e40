"""Packages of AOTInductor: built, kept, trusted, right. Each takes the compiler half a minute."""

import hashlib
import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from cascadekit.cli import main
from cascadekit.converters.aotinductor.packages_to_build import packages_to_build
from cascadekit.converters.tensorrt import BuildOptions, build
from cascadekit.runtime.engines.engine_table import make_engine
from cascadekit.runtime.engines.plan_choice import check_plan
from cascadekit.runtime.engines.pytorch import package_choice
from cascadekit.runtime.engines.pytorch.built_here import private_copy, remember_built
from cascadekit.schemas.errors import EngineError, OutsideProfileError, UsageError
from cascadekit.schemas.plan_entries import DeviceEntry
from cascadekit.schemas.profiles import Bounds, parse_image_size
from cascadekit.schemas.stages import Stage
from cascadekit.storage.bundle import Bundle, open_bundle
from cascadekit.storage.install_hint import install_hint
from helpers.standins import accept_changes

STATIC = Bounds(*[parse_image_size("96x64")] * 3)
RANGE = Bounds(*map(parse_image_size, ("128x128", "256x192", "512x512x2")))
VQGAN = BuildOptions("aotinductor", stages=(Stage.VQGAN,), profiles=(STATIC,))
MOST = 2e-6  # relative L2 from ONNX Runtime; measured 1e-7 to 5e-7


@pytest.fixture
def bundle(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the bundle, and an empty cache folder of the user."""
    monkeypatch.setenv("CASCADEKIT_CACHE", str(tmp_path / "cache"))
    return shutil.copytree(tiny / "bundle", tmp_path / "bundle")


def latents(width: int = 24) -> dict[str, Any]:
    return {"latents": np.random.default_rng(0).standard_normal((1, 4, 16, width), dtype=np.float32)}


def off(found: Any, expected: Any) -> float:
    return max(float(np.linalg.norm(found[n] - expected[n]) / np.linalg.norm(expected[n])) for n in expected)


def test_a_package_is_built_kept_trusted_and_right(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    with monkeypatch.context() as patch:
        patch.setenv("TMPDIR", str(temporary))
        # torch otherwise compiles a program for each vector extension, to see whether the compiler knows it.
        patch.setenv("TORCHINDUCTOR_VEC_ISA_OK", "1")
        (built,) = build(bundle, VQGAN)
    assert built.how == "built"
    assert not list(temporary.rglob("*.h*")), "a compiler was given headers from a folder that others can write to"
    assert (bundle / built.plan.path).stat().st_size < 4e6, "the weights are in it"
    assert not list(bundle.rglob(".*"))
    assert build(bundle, VQGAN)[0].how == "kept"

    opened = open_bundle(bundle)
    engine = make_engine("aotinductor", opened)
    assert engine.graphs(Stage.VQGAN) == ("model",)
    expected = make_engine("onnxruntime", opened).load(Stage.VQGAN)(latents())
    with engine.load(Stage.VQGAN) as runner:
        assert off(runner(latents()), expected) < MOST
        with pytest.raises(OutsideProfileError, match="they are for 96x64"):
            runner(latents(32))

    weights = bundle / "vqgan/weights.safetensors"  # the package serves other weights, such as those with a LoRA
    content = bytearray(weights.read_bytes())
    start = 8 + int.from_bytes(content[:8], "little")
    np.frombuffer(content, "<f4", offset=start)[:] *= np.float32(1.1)  # in place, as the graph has the offsets
    weights.write_bytes(content)
    accept_changes(bundle)
    other = make_engine("onnxruntime", open_bundle(bundle)).load(Stage.VQGAN)(latents())
    assert off(other, expected) > 0.01
    assert off(make_engine("aotinductor", open_bundle(bundle)).load(Stage.VQGAN)(latents()), other) < MOST

    monkeypatch.setenv("CASCADEKIT_CACHE", str(tmp_path / "somebody else's"))
    assert make_engine("aotinductor", open_bundle(bundle)).graphs(Stage.VQGAN) == ()
    with pytest.raises(EngineError, match="was not built by you on this machine, and a package is code"):
        make_engine("aotinductor", open_bundle(bundle)).load(Stage.VQGAN)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [Stage.TEXT_ENCODER, Stage.PRIOR, Stage.DECODER])
def test_one_package_serves_a_range_of_sizes(bundle: Path, stage: Stage) -> None:
    build(bundle, VQGAN, stages=(stage,), profiles=(RANGE,))
    opened = open_bundle(bundle)
    runner, expected = (make_engine(name, opened).load(stage) for name in ("aotinductor", "onnxruntime"))
    (plan,) = opened.entry(stage).plans
    ends = [
        {name: getattr(port, end) for name, port in plan.profiles[0].ports.items()} for end in ("min", "opt", "max")
    ]
    for shapes in ends:
        rng = np.random.default_rng(0)
        inputs: dict[str, Any] = {}
        for port in opened.entry(stage).inputs:
            shape = shapes[port.name]
            integers = port.dtype == "int64"
            inputs[port.name] = rng.integers(0, 60, shape) if integers else rng.random(shape, dtype=np.float32)
        assert off(runner(inputs), expected(inputs)) < MOST, shapes


def test_what_cannot_be_built_is_refused_before_a_worker_starts(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = open_bundle(bundle)
    for options, words in (
        ({"targets": ("sm89",)}, r"targets=\.\.\. is for TensorRT; AOTInductor builds for this machine"),
        ({"refittable": True}, "refittable=True is for TensorRT"),
        ({"graphs": ("model", "step")}, "AOTInductor builds the graphs model and encoder, not step"),
    ):
        with pytest.raises(UsageError, match=words):
            build(bundle, VQGAN, **options)
    with pytest.raises(EngineError, match=r'device="cuda": torch \S+ finds no GPU here'):
        build(bundle, VQGAN, device="cuda")
    with pytest.raises(UsageError, match=r'device="cuda" is for backend="aotinductor"'):
        build(bundle, backend="tensorrt-rtx", targets=("sm89",), device="cuda")
    monkeypatch.setenv("CXX", "no-such-compiler")
    result = CliRunner().invoke(main, ["build", str(bundle), "--backend", "aotinductor", "--stage", "vqgan"])
    assert result.exit_code == 2 or result.exit_code == 1
    assert "AOTInductor needs a C++ compiler, and no-such-compiler is not here" in " ".join(result.output.split())
    monkeypatch.delenv("CXX")
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(EngineError, match=re.escape(install_hint("torch"))):
        packages_to_build(opened, VQGAN)


def test_the_key_covers_what_decides_the_code(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = open_bundle(bundle)

    def key(**changes: Any) -> str:
        (planned,) = packages_to_build(opened, BuildOptions(**{**vars(VQGAN), **changes}))
        return planned.key

    first = key()
    assert key() == first
    others = {key(profiles=(RANGE,)), key(graphs=("encoder",)), key(stages=(Stage.DECODER,))}
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "ABACUS")
    assert len({first, *others, key()}) == 5


def test_a_package_of_somebody_else_is_not_loaded(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever makes a bundle writes the SHA-256 too, so that it proves nothing."""
    (planned,) = packages_to_build(open_bundle(bundle), VQGAN)
    planned.path.parent.mkdir()
    planned.path.write_bytes(b"code")
    sha256 = hashlib.sha256(b"code").hexdigest()
    _list_plan(bundle, planned, sha256)
    monkeypatch.setattr(torch._inductor, "aoti_load_package", lambda *given, **options: pytest.fail("it was loaded"))
    with pytest.raises(EngineError, match=r"was not built by you .* cascadekit build .* --backend aotinductor"):
        make_engine("aotinductor", open_bundle(bundle)).load(Stage.VQGAN)
    with pytest.raises(EngineError, match="was not built by you"), private_copy(planned.path, sha256):
        pass
    remember_built(sha256)
    with private_copy(planned.path, sha256) as copy:
        planned.path.write_bytes(b"other code")
        assert copy.read_bytes() == b"code"
    with pytest.raises(EngineError, match="it changed while it was loaded"), private_copy(planned.path, sha256):
        pass


def test_the_advised_command_builds_what_is_missing(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = open_bundle(bundle)
    with pytest.raises(EngineError, match=r"--backend aotinductor --stage vqgan --graph encoder$"):
        make_engine("aotinductor", opened).load(Stage.VQGAN, "encoder")
    (planned,) = packages_to_build(opened, VQGAN)
    plan = _list_plan(bundle, planned, "0" * 64).entry(Stage.VQGAN).plans[0]
    h100 = DeviceEntry(name="NVIDIA H100", capability="sm90")
    with pytest.raises(EngineError, match=r"the plan is missing; .* --stage vqgan --device cuda$"):
        check_plan(opened, Stage.VQGAN, plan.model_copy(update={"device": h100}))
    monkeypatch.setattr(package_choice, "present_device", lambda device: h100)
    with pytest.raises(EngineError, match=r"no aotinductor plan .* --stage prior --device cuda$"):
        package_choice.packages_on(opened, "cuda").of_graph(Stage.PRIOR, "model")


def _list_plan(bundle: Path, planned: Any, sha256: str) -> Bundle:
    """Put a package into the manifest by hand."""
    manifest = json.loads((bundle / "cascade.json").read_text())
    plan = {
        "graph": "model",
        "path": planned.path.relative_to(bundle).as_posix(),
        "bytes": 4,
        "sha256": sha256,
        "backend": "aotinductor",
        "backend_version": torch.__version__,
        "device": planned.device.model_dump(),
        "precision": "fp32",
        "profiles": [planned.profiles[0].model_dump()],
        "sources": [planned.sources[0].model_dump()],
        "seconds": 1,
        "peak_rss": 1,
    }
    manifest["stages"]["vqgan"]["plans"] = [plan]
    (bundle / "cascade.json").write_text(json.dumps(manifest))
    return open_bundle(bundle)
