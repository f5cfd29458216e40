"""A loaded stage that computes with tensors of PyTorch, and is called with numpy arrays."""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ....schemas.config_json import from_json
from ....schemas.control import is_control
from ....schemas.errors import EngineError
from ....schemas.manifest import StageEntry
from ....schemas.stages import NetworkConfig, Stage, UNetConfig
from ...memory.give_back import give_back_memory
from ..protocol import Outputs, Run, StageRunner, Tensors, complete_inputs
from .captured_calls import Compute, captured_on_gpu
from .device import HOST, computing_on, free_device, to_host, torch_errors
from .networks.unet import embed_ratio

RATIO, TIME = "timestep_ratio", "time"  # a port, and the input of a network that takes the embedded ratio instead

Fed = dict[str, torch.Tensor]


class TensorStage(StageRunner):
    """One graph of a stage. `compute` takes and gives tensors of `dtype` on `device`; ids and masks stay int64.

    The timestep is embedded in float32 on the CPU, as in graphs of every precision, and then rounded to `dtype`."""

    def __init__(
        self,
        stage: Stage,
        entry: StageEntry,
        graph: str,
        *,
        compute: Compute,
        dtype: torch.dtype,
        device: str,
    ) -> None:
        self.stage = stage
        self._ports = entry.graphs[graph].inputs
        self._config: NetworkConfig = from_json(stage, entry.config)
        self._compute: Compute | None = captured_on_gpu(compute, stage, device)
        self._dtype = dtype
        self._device = torch.device(device)

    def __call__(self, inputs: Tensors) -> Outputs:
        return self.bind({})(inputs)

    def bind(self, constants: Tensors) -> Run:
        with torch_errors(f"{self.stage}: torch failed"):
            fixed = self._fed(constants)

        def run(inputs: Tensors) -> Outputs:
            given = complete_inputs(self.stage, self._ports, {**constants, **inputs})
            if self._compute is None:
                raise EngineError(f"{self.stage}: closed already; load it again")
            with torch_errors(f"{self.stage}: torch failed"):
                fed = self._fed({name: array for name, array in given.items() if name not in constants})
                with torch.inference_mode(), computing_on(self._device):
                    return {name: to_host(value) for name, value in self._compute(**fixed, **fed).items()}

        return run

    def _fed(self, inputs: Tensors) -> Fed:
        """Inputs as tensors on the device, the timestep embedded and zeros for a ControlNet left out."""
        fed: Fed = {}
        for name, array in inputs.items():
            if is_control(name):
                if np.any(array):
                    raise EngineError(
                        f'{self.stage}: engine torch does not add {name} of a ControlNet; set engine="onnxruntime"'
                    )
            elif name == RATIO and isinstance(self._config, UNetConfig):
                fed[TIME] = self._on_device(embed_ratio(self._config, _tensor(array)))
            else:
                fed[name] = self._on_device(_tensor(array))
        return fed

    def _on_device(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(self._device, self._dtype if tensor.is_floating_point() else tensor.dtype)

    def close(self) -> None:
        self._compute = None
        free_device(self._device)
        if self._device.type == HOST:
            give_back_memory()


def _tensor(array: NDArray[Any]) -> torch.Tensor:
    contiguous = np.ascontiguousarray(array)
    return torch.from_numpy(contiguous if contiguous.flags.writeable else contiguous.copy())
