"""The device that PyTorch computes on: the CPU, or a GPU through CUDA without TF32."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from numpy.typing import NDArray

from ....schemas.errors import CascadeError, EngineError
from ....schemas.messages import one_line
from ..protocol import REASON_LENGTH

HOST = "cpu"


def gpu_problem(device: str) -> str | None:
    """Why this torch cannot compute on `device`, which is "cpu" or "cuda"; None when it can."""
    if device == HOST or torch.cuda.is_available():
        return None
    return f"torch {torch.__version__} finds no GPU here; install a torch with CUDA and a driver"


def require_device(device: str, engine: str) -> None:
    """Raise EngineError unless torch can compute on `device`."""
    if device not in (HOST, "cuda"):
        raise EngineError(f"device {device!r}: engine {engine} runs on cpu and cuda")
    if problem := gpu_problem(device):
        raise EngineError(f'device="{device}": {problem}, or set device="{HOST}"')


@contextmanager
def computing_on(device: torch.device) -> Iterator[None]:
    """Inside, a GPU multiplies float32 in full. TF32, torch's default for convolutions, keeps 10 of 23 bits."""
    if device.type != "cuda":
        yield
        return
    parts: tuple[Any, ...] = (torch.backends.cuda.matmul, torch.backends.cudnn)
    before = [part.allow_tf32 for part in parts]
    try:
        for part in parts:
            part.allow_tf32 = False
        yield
    finally:
        for part, value in zip(parts, before, strict=True):
            part.allow_tf32 = value


@contextmanager
def torch_errors(problem: str) -> Iterator[None]:
    """Inside, exceptions of torch become EngineError: `problem`, and what torch says."""
    try:
        yield
    except CascadeError:
        raise
    except Exception as error:  # torch raises RuntimeError and others, its compiler classes of its own
        raise EngineError(f"{problem}: {one_line(error, REASON_LENGTH)}") from error


def to_host(tensor: torch.Tensor) -> NDArray[Any]:
    """The values as float32, in the memory of the host."""
    return tensor.to(HOST, torch.float32).numpy()


def free_device(device: torch.device) -> None:
    """Give the memory that nothing holds any more back to the GPU; torch keeps it otherwise."""
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()
