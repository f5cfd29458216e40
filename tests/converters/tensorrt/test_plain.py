"""TensorRT proper, which needs the GPU it builds for: everything up to its calls, which a small module stands in for.

The stand-in has what TensorRT 10 and 11 have, or less for an early 10.0; it writes down how it was used.
"""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from cascadekit.cli import main
from cascadekit.converters.tensorrt import BuildOptions, build, builder, device
from cascadekit.runtime.engines.nvidia_driver import DriverGpu
from cascadekit.schemas.errors import EngineError
from cascadekit.schemas.plan_entries import DeviceEntry
from cascadekit.schemas.profiles import Bounds, parse_image_size
from cascadekit.schemas.stages import Stage
from cascadekit.storage.bundle import open_bundle

H100 = DeviceEntry(name="NVIDIA H100", capability="sm90")
SMALL = Bounds(*[parse_image_size("256x384")] * 3)
VQGAN = BuildOptions("tensorrt", stages=(Stage.VQGAN,), profiles=(SMALL,))

COMMON = """
import json, os
__version__ = "10.0.1"
used = {"flags": [], "shapes": {}}

class NetworkDefinitionCreationFlag:
    STRONGLY_TYPED = 1

class BuilderFlag:
    TF32 = "TF32"
    REFIT = "REFIT"

class ILogger:
    INTERNAL_ERROR, ERROR, WARNING = 0, 1, 2

class Port:
    def __init__(self, name):
        self.name = name

class Network:
    num_inputs, num_layers = 1, 5

    def get_input(self, number):
        return Port("latents")

class Profile:
    def set_shape(self, name, *shapes):
        used["shapes"][name] = shapes

class Cache:
    def __init__(self, content):
        self.content = bytes(content)

    def serialize(self):
        return self.content + b"+"

class Config:
    def add_optimization_profile(self, profile):
        pass

    def set_flag(self, flag):
        used["flags"].append(flag)

    def clear_flag(self, flag):
        used["cleared"] = flag

    def create_timing_cache(self, content):
        return Cache(content)

    def set_timing_cache(self, cache, ignore_mismatch):
        used["timing"] = cache.content.decode()

class OnnxParser:
    num_errors = 0

    def __init__(self, network, logger):
        self.logger = logger

    def parse_from_file(self, path):
        used["graph"] = path
        return True

def finish():
    with open(os.environ["USED"], "w") as file:
        json.dump(used, file)

class Builder:
    def __init__(self, logger):
        self.logger = logger

    def create_network(self, flags):
        used["network"] = flags
        return Network()

    def create_builder_config(self):
        return Config()

    def create_optimization_profile(self):
        return Profile()
"""
EARLY = """
    def build_serialized_network(self, network, config):
        finish()
        return b"a plan"
"""
LATER = """
    def build_serialized_network_to_stream(self, network, config, stream):
        finish()
        config.progress_monitor.phase_start("Building Engine", None, 3)
        return stream.write(b"a ") + stream.write(b"plan") == 6

class IStreamWriter:
    pass

class IProgressMonitor:
    pass

Config.progress_monitor = None
"""
FAILING = """
    def build_serialized_network_to_stream(self, network, config, stream):
        self.logger.log(ILogger.ERROR, "Cuda failure: cudaError 35")
        self.logger.log(ILogger.WARNING, "it is slow")
        self.logger.log(ILogger.ERROR, "tensor.cpp:7: no kernel\\n  for this")
        self.logger.log(ILogger.ERROR, "Engine could not be created")
        return False

class IStreamWriter:
    pass
"""


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Callable[[], Any]]:
    """A function that installs the stand-in with one of the endings, and gives another that tells how it was used."""

    def install(ending: str) -> Callable[[], Any]:
        site = tmp_path / "site"
        site.mkdir()
        (site / "tensorrt.py").write_text(COMMON + ending)
        monkeypatch.syspath_prepend(site)
        monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(site), os.environ.get("PYTHONPATH", "")]))
        monkeypatch.setenv("USED", str(tmp_path / "used.json"))
        monkeypatch.setattr(builder, "present_device", lambda: H100)
        monkeypatch.setitem(sys.modules, "tensorrt", None)  # so that the stand-in is taken out again
        del sys.modules["tensorrt"]
        return lambda: json.loads((tmp_path / "used.json").read_text())

    return install


@pytest.mark.parametrize("ending", [EARLY, LATER], ids=["10.0", "later"])
def test_how_it_is_used(bundle: Path, installed: Any, ending: str) -> None:
    used = installed(ending)
    (built,) = build(bundle, VQGAN)
    assert used() == {
        "flags": [],
        "network": 1 << 1,  # strongly typed
        "graph": str(bundle / "vqgan/model.onnx"),
        "shapes": {"latents": [[1, 4, 96, 64]] * 3},
        "cleared": "TF32",
        "timing": "",
    }
    plan = built.plan
    assert (plan.device, plan.targets, plan.backend_version) == (H100, (), "10.0.1")
    assert (bundle / plan.path).read_bytes() == b"a plan"
    assert "model-bf16-tensorrt-" in plan.path
    assert (bundle / "vqgan/plans/timing.cache").read_bytes() == b"+"
    assert not plan.refittable
    (again,) = build(bundle, BuildOptions(**vars(VQGAN) | {"refittable": True}))
    assert (used()["timing"], used()["flags"]) == ("+", ["REFIT"])
    assert again.plan.refittable
    assert again.plan.path != plan.path
    assert "NVIDIA H100 (sm90)" in CliRunner().invoke(main, ["inspect", str(bundle)]).stdout


@pytest.mark.parametrize("has_it", [True, False])
def test_streaming_is_asked_for_by_name(bundle: Path, installed: Any, has_it: bool) -> None:
    used = installed(LATER + "BuilderFlag.WEIGHT_STREAMING = 'WEIGHT_STREAMING'\n" * has_it)
    wishes = BuildOptions(**vars(VQGAN) | {"weight_streaming": True})
    if has_it:
        (built,) = build(bundle, wishes)
        assert built.plan.weight_streaming
        assert used()["flags"] == ["WEIGHT_STREAMING"]
    else:
        with pytest.raises(
            EngineError, match=r"tensorrt 10.0.1 cannot stream weights; build with weight_streaming=False"
        ):
            build(bundle, wishes)


def test_a_plan_is_for_one_gpu(bundle: Path, installed: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    installed(LATER)
    build(bundle, VQGAN)
    assert build(bundle, VQGAN)[0].how == "kept"
    other = DeviceEntry(name="NVIDIA L4", capability="sm89")
    monkeypatch.setattr(builder, "present_device", lambda: other)
    assert build(bundle, VQGAN)[0].how == "built"
    plans = open_bundle(bundle).entry(Stage.VQGAN).plans
    assert [plan.device.name for plan in plans if plan.device] == ["NVIDIA H100", "NVIDIA L4"]


def test_an_old_gpu(bundle: Path, installed: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    installed(LATER)
    monkeypatch.setattr(builder, "present_device", lambda: DeviceEntry(name="Tesla T4", capability="sm75"))
    result = CliRunner().invoke(main, ["build", str(bundle), "--backend", "tensorrt"])
    assert result.exit_code == 2
    assert "sm75 in tensorrt has no bf16; export it again: " in result.stderr


def test_why_it_failed(bundle: Path, installed: Any) -> None:
    installed(FAILING)
    with pytest.raises(EngineError) as caught:
        build(bundle, VQGAN)
    assert str(caught.value) == "vqgan/model: tensorrt cannot build it: no kernel for this"


def test_targets_are_for_rtx(bundle: Path, installed: Any) -> None:
    installed(LATER)
    result = CliRunner().invoke(main, ["build", str(bundle), "--backend", "tensorrt", "--arch", "sm89"])
    assert result.exit_code == 2
    assert "TensorRT builds for the GPU it runs on; --arch is for --backend tensorrt-rtx" in result.stderr


def test_the_gpu_that_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """`tests/runtime/test_devices.py` has the calls of the driver."""
    monkeypatch.setattr(device, "first_gpu", lambda: DriverGpu("NVIDIA GeForce RTX 5090", 32 << 30, "sm120"))
    assert device.present_device() == DeviceEntry(name="NVIDIA GeForce RTX 5090", capability="sm120")
    monkeypatch.setattr(device, "first_gpu", lambda: "there is no NVIDIA driver")
    with pytest.raises(EngineError, match='there is no NVIDIA driver; backend="tensorrt-rtx" builds without a GPU'):
        device.present_device()
