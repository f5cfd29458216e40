"""The device of `--device auto`, on a machine with and without a driver, a GPU, and an engine that works on it."""

import ctypes
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cascadekit import Cascade
from cascadekit.runtime.engines import choose_device as choosing
from cascadekit.runtime.engines import nvidia_driver
from cascadekit.runtime.engines.choose_device import choose_device
from cascadekit.runtime.engines.nvidia_driver import DriverGpu, first_gpu
from cascadekit.schemas.errors import UsageError
from cascadekit.storage.bundle import open_bundle
from helpers.fake_ort_cuda import CPU, CUDA, TENSORRT, FakeOrtCuda

GPU = DriverGpu("NVIDIA Fake 4090", 24 << 30, "sm89")


def found(monkeypatch: pytest.MonkeyPatch, gpu: DriverGpu | str, **ort: Any) -> FakeOrtCuda:
    monkeypatch.setattr(choosing, "first_gpu", lambda: gpu)
    module = FakeOrtCuda(**ort)
    monkeypatch.setitem(sys.modules, "onnxruntime", module)
    return module


def test_a_gpu_that_works_is_taken(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found(monkeypatch, GPU)
    said: list[str] = []
    with Cascade.open(tiny / "bundle", say=said.append) as cascade:
        assert (cascade.device, said) == ("cuda", ["device: cuda, NVIDIA Fake 4090"])
        assert cascade.engine.device == "cuda"  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("gpu", "ort", "line"),
    [
        ("there is no NVIDIA driver", {}, "device: cpu, because there is no NVIDIA driver"),
        (GPU, {"has": (CPU,)}, "device: cpu, because this ONNX Runtime has no CUDAExecutionProvider: "),
        (GPU, {"starts": (CPU,)}, "device: cpu, because its CUDAExecutionProvider does not start; see nvidia-smi"),
    ],
)
def test_else_the_cpu(tiny: Path, monkeypatch: pytest.MonkeyPatch, gpu: Any, ort: dict[str, Any], line: str) -> None:
    found(monkeypatch, gpu, **ort)
    device, said = choose_device("auto", "auto", open_bundle(tiny / "bundle"))
    assert device == "cpu"
    assert said.startswith(line)
    assert "\n" not in said


def test_what_is_asked_for_is_taken(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found(monkeypatch, "there is no NVIDIA driver", has=(CUDA, TENSORRT))
    bundle = open_bundle(tiny / "bundle")
    assert choose_device("cuda", "auto", bundle) == ("cuda", "")
    assert choose_device("cpu", "auto", bundle) == ("cpu", "")
    assert choose_device("auto", "openvino", bundle) == ("cpu", "")
    assert choose_device("auto", "tensorrt", bundle) == ("cuda", "")  # which then says what is missing
    with pytest.raises(UsageError, match="device 'gpu': expected one of auto, cpu, cuda"):
        choose_device("gpu", "auto", bundle)


def test_plans_need_no_onnxruntime(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found(monkeypatch, GPU, has=(CPU,))
    monkeypatch.setattr(choosing, "CHOICES", (SimpleNamespace(device="cuda", can_run=lambda bundle: True),))
    assert choose_device("auto", "auto", open_bundle(tiny / "bundle")) == ("cuda", "device: cuda, NVIDIA Fake 4090")


def test_the_driver_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """The calls and their arguments are those of CUDA's driver API."""

    def name(buffer: Any, length: int, device: Any) -> int:
        assert (length, device.value) == (256, 3)
        buffer.value = b"NVIDIA H200"
        return 0

    def set_value(pointer: Any, value: int) -> int:
        pointer._obj.value = value
        return 0

    driver = SimpleNamespace(
        cuInit=lambda flags: 0,
        cuDeviceGet=lambda device, number: set_value(device, 3),
        cuDeviceGetName=name,
        cuDeviceTotalMem_v2=lambda memory, device: set_value(memory, 150 << 30),
        cuDeviceGetAttribute=lambda value, attribute, device: set_value(value, {75: 9, 76: 0}[attribute]),  # of cuda.h
    )
    monkeypatch.setattr(ctypes, "CDLL", lambda library: driver)
    assert first_gpu() == DriverGpu("NVIDIA H200", 150 << 30, "sm90")
    driver.cuInit = lambda flags: 100
    assert first_gpu() == "the NVIDIA driver offers no GPU (cuInit failed with 100)"

    def missing(library: str) -> Any:
        raise OSError(library)

    monkeypatch.setattr(nvidia_driver.ctypes, "CDLL", missing)
    assert first_gpu() == "there is no NVIDIA driver"
