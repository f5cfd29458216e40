"""Arrays to tensors on the device that trains, and back. `__main__` makes that device torch's default."""

from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor


def use_best_device() -> None:
    """Train on CUDA where there is a device, else on the CPU."""
    torch.set_default_device("cuda" if torch.cuda.is_available() else "cpu")


def to_device(array: NDArray[Any]) -> Tensor:
    return torch.from_numpy(array).to(torch.get_default_device())


def to_array(tensor: Tensor) -> NDArray[Any]:
    found: NDArray[Any] = tensor.detach().cpu().numpy()
    return found


def seeded(seed: int) -> torch.Generator:
    """A generator of the device that trains. Its numbers depend on the kind of device."""
    return torch.Generator(device=torch.get_default_device()).manual_seed(seed)


def load(path: Any) -> Any:
    """A state that this trainer saved, from whatever device."""
    return torch.load(path, weights_only=False, map_location=torch.get_default_device())
