"""A loaded stage that computes with tensors of PyTorch, and is called with numpy arrays."""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ....schemas.config_json import from_json
from ....schemas.control import is_control
from ....schemas.errors import EngineError
from ....schemas.manifest import MAIN_GRAPH, StageEntry
from ....schemas.stages import NetworkConfig, Stage, UNetConfig
from ...memory.give_back import give_back_memory
from ..protocol import Run, StageRunner, Tensors, complete_inputs
from .captured_calls import Compute
from .device import HOST, computing_on, free_device, to_host
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
        graph: str = MAIN_GRAPH,
        *,
        compute: Compute,
        dtype: torch.dtype,
        device: str,
    ) -> None:
        self.stage = stage
        self._ports = entry.graphs[graph].inputs
        self._config: NetworkConfig = from_json(stage, entry.config)
        self._compute: Compute | None = compute
        self._dtype = dtype
        self._device = torch.device(device)

    def __call__(self, inputs: Tensors) -> dict[str, NDArray[Any]]:
        return self.bind({})(inputs)

    def bind(self, constants: Tensors) -> Run:
        fixed = self._fed(constants)

        def run(inputs: Tensors) -> dict[str, NDArray[Any]]:
            given = complete_inputs(self.stage, self._ports, {**constants, **inputs})
            fed = self._fed({name: array for name, array in given.items() if name not in constants})
            return self._run({**fixed, **fed})

        return run

    def _run(self, fed: Fed) -> dict[str, NDArray[Any]]:
        if self._compute is None:
            raise EngineError(f"{self.stage}: closed already; load it again")
        try:
            with torch.inference_mode(), computing_on(self._device):
                return {name: to_host(value) for name, value in self._compute(**fed).items()}
        except EngineError:
            raise
        except Exception as error:  # torch raises RuntimeError, its compiler classes of its own
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise EngineError(f"{self.stage}: torch failed: {reason}") from error

    def _fed(self, inputs: Tensors) -> Fed:
        """Inputs as tensors on the device, the timestep embedded and zeros for a ControlNet left out."""
        fed: Fed = {}
        for name, array in inputs.items():
            if is_control(name):
                self._require_zero(name, array)
            elif name == RATIO and isinstance(self._config, UNetConfig):
                fed[TIME] = self._on_device(embed_ratio(self._config, _tensor(array)))
            else:
                fed[name] = self._on_device(_tensor(array))
        return fed

    def _on_device(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(self._device, self._dtype if tensor.is_floating_point() else tensor.dtype)

    def _require_zero(self, name: str, array: NDArray[Any]) -> None:
        if np.any(array):
            raise EngineError(
                f'{self.stage}: engine torch does not add {name} of a ControlNet; set engine="onnxruntime"'
            )

    def close(self) -> None:
        self._compute = None
        free_device(self._device)
        if self._device.type == HOST:
            give_back_memory()


def _tensor(array: NDArray[Any]) -> torch.Tensor:
    contiguous = np.ascontiguousarray(array)
    return torch.from_numpy(contiguous if contiguous.flags.writeable else contiguous.copy())
