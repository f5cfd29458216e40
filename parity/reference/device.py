"""The device that the reference computes on: the CPU, or a GPU through CUDA without TF32."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from numpy.typing import NDArray

from ...schemas.errors import UsageError

HOST = "cpu"


def require_device(device: str) -> None:
    """Raise UsageError when this torch cannot compute on `device`, which is "cpu" or "cuda"."""
    if device != HOST and not torch.cuda.is_available():
        raise UsageError(
            f'reference_device="{device}": torch {torch.__version__} finds no GPU here; '
            f'install a torch with CUDA and a driver, or set reference_device="{HOST}"'
        )


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


def to_host(tensor: torch.Tensor) -> NDArray[Any]:
    """The values as float32, in the memory of the host."""
    return tensor.to(HOST, torch.float32).numpy()


def free_device(device: torch.device) -> None:
    """Give the memory that nothing holds any more back to the GPU; torch keeps it otherwise."""
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()
