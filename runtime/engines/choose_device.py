"""Chooses the device of `device="auto"`: the GPU if there is one and an engine that works on it, else the CPU."""

from typing import TYPE_CHECKING

from ...schemas.errors import UsageError
from .engine_table import AUTO, CHOICES, ENGINES
from .nvidia_driver import first_gpu

if TYPE_CHECKING:
    from ...storage.bundle import Bundle

CPU, CUDA = "cpu", "cuda"
DEVICES = (AUTO, CPU, CUDA)


def choose_device(device: str, engine: str, bundle: "Bundle") -> tuple[str, str]:
    """The device that `device` and `engine` mean here, and a line for the user: empty if there was no choice.

    Raises UsageError for an unknown device."""
    if device not in DEVICES:
        raise UsageError(f"device {device!r}: expected one of {', '.join(DEVICES)}")
    able = ENGINES[engine].devices if engine in ENGINES else (CPU, CUDA)
    if device != AUTO or len(able) == 1:
        return (able[0] if device == AUTO else device), ""
    gpu = first_gpu()
    reason = gpu if isinstance(gpu, str) else _why_no_engine(engine, bundle)
    if isinstance(gpu, str) or reason:
        return CPU, f"device: cpu, because {reason}"
    return CUDA, f"device: cuda, {gpu.name}"


def _why_no_engine(engine: str, bundle: "Bundle") -> str:
    """Why neither an engine of CHOICES nor ONNX Runtime can run the bundle on the GPU; empty if one can."""
    from .provider_probe import why_not

    if engine == AUTO and any(choice.device == CUDA and choice.can_run(bundle) for choice in CHOICES):
        return ""
    return why_not(CUDA)
