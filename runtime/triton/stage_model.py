"""A stage as a Triton model that runs ONNX Runtime in Python, for servers without a backend for ONNX graphs."""

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils  # exists in processes of the server alone

from ...schemas.errors import CascadeError
from ...storage.bundle import open_bundle
from ..engines.engine_table import make_engine
from ..engines.protocol import Tensors


class StageModel:
    """The one stage of the bundle in the model's folder. Calls that the server hands over at once run together."""

    def initialize(self, args: Mapping[str, str]) -> None:
        on_gpu = args["model_instance_kind"] == "GPU"
        if on_gpu:  # the only GPU that this process sees
            os.environ["CUDA_VISIBLE_DEVICES"] = args["model_instance_device_id"]
        bundle = open_bundle(Path(args["model_repository"]) / args["model_version"])
        ((stage, self._entry),) = bundle.manifest.stages.items()
        self._runner = make_engine("onnxruntime", bundle, "cuda" if on_gpu else "cpu").load(stage)

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        calls = [
            {port.name: pb_utils.get_input_tensor_by_name(each, port.name).as_numpy() for port in self._entry.inputs}
            for each in requests
        ]
        try:
            return list(self._answers(calls))
        except CascadeError:  # a call that is wrong fails alone
            return [self._alone(call) for call in calls]

    def finalize(self) -> None:
        self._runner.close()

    def _answers(self, calls: Sequence[Tensors]) -> Iterator[Any]:
        """Run all calls as one batch, and yield the response of each."""
        together = {name: np.concatenate([call[name] for call in calls]) for name in calls[0]}
        found = self._runner(together)
        end = 0
        for call in calls:
            start, end = end, end + len(next(iter(call.values())))
            rows = [pb_utils.Tensor(name, np.ascontiguousarray(value[start:end])) for name, value in found.items()]
            yield pb_utils.InferenceResponse(rows)

    def _alone(self, call: Tensors) -> Any:
        try:
            return next(self._answers([call]))
        except CascadeError as error:
            return pb_utils.InferenceResponse(error=pb_utils.TritonError(str(error), pb_utils.TritonError.INVALID_ARG))
