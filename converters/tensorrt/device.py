"""The GPU of this machine that TensorRT builds for."""

from ...runtime.engines.nvidia_driver import first_gpu
from ...schemas.errors import EngineError
from ...schemas.plan_entries import DeviceEntry


def present_device() -> DeviceEntry:
    """The first GPU of the driver. Raises EngineError when there is none, with the advice to use tensorrt-rtx."""
    gpu = first_gpu()
    if isinstance(gpu, str):
        raise EngineError(
            f'TensorRT builds for the GPU of the machine it runs on, and {gpu}; backend="tensorrt-rtx" builds without '
            "a GPU"
        )
    return DeviceEntry(name=gpu.name, capability=gpu.capability)
