"""The Triton models `cascade` and `cascade_stream`: prompts to images, with the sampler in Python.

The server starts a process for each instance, whose `model.py` imports the class from here. The networks are other
models of the server, asked in every step (in Triton's words: business logic scripting).
"""

import json
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils  # exists in processes of the server alone
from numpy.typing import NDArray

from ...schemas.errors import CascadeError, EngineError
from ...schemas.limits import MAX_IMAGES
from ...schemas.manifest import Manifest
from ..engines.protocol import Tensors
from ..serve.image_queue import Event, FailedImage, FinishedImage, ImageQueue, Order, PartialImage
from .request_tensors import STREAM_INPUTS, parse_previews, parse_rows
from .triton_engine import open_cascade


class CascadeModel:
    """Generates the images of all calls that the server hands over at once, those that are alike together.

    With a decoupled policy in its config it streams previews and images; without, it answers each call once."""

    def initialize(self, args: Mapping[str, str]) -> None:
        config = json.loads(args["model_config"])
        self._streams: bool = pb_utils.using_decoupled_model_transaction_policy(config)
        folder = Path(args["model_repository"]) / args["model_version"]
        self._cascade = open_cascade(folder, infer, rows=int(config["parameters"]["rows"]["string_value"]))
        self._queue = ImageQueue(self._cascade, MAX_IMAGES)

    def execute(self, requests: Sequence[Any]) -> list[Any] | None:
        answers = [(StreamedAnswer if self._streams else CollectedAnswer)(request) for request in requests]
        for answer in answers:
            if order := answer.order(self._cascade.manifest):
                self._queue.submit(order)
        self._queue.generate_all()
        ended = [answer.end() for answer in answers]
        return None if self._streams else ended

    def finalize(self) -> None:
        self._cascade.close()


class Answer:
    """The answer to one call. A call that is wrong, fails or is cancelled gets an error, and others go on."""

    def __init__(self, request: Any) -> None:
        self._request = request
        self._error: Any = None
        self._left = 0

    def order(self, manifest: Manifest) -> Order | None:
        """The images that the call asks for; None when it is wrong."""
        try:
            tensors = read_tensors(self._request, STREAM_INPUTS)
            requests, previews = parse_rows(tensors, manifest), parse_previews(tensors)
        except CascadeError as error:
            self._fail(str(error), pb_utils.TritonError.INVALID_ARG)
            return None
        except Exception as error:  # raised here, it would fail the calls beside this one
            traceback.print_exc()
            self._fail(f"an unexpected error ({type(error).__name__})", pb_utils.TritonError.INTERNAL)
            return None
        self._left = len(requests)
        return Order(requests, self.take, previews, has_left=self.is_cancelled)

    def take(self, event: Event) -> None:
        if self._error is not None:
            return
        if self.is_cancelled():
            self._fail("cancelled", pb_utils.TritonError.CANCELLED)
        elif isinstance(event, FailedImage):
            code = pb_utils.TritonError.INVALID_ARG if event.expected else pb_utils.TritonError.INTERNAL
            self._fail(event.message, code)
        else:
            self._left -= isinstance(event, FinishedImage)
            self.add(event)

    def end(self) -> Any:
        """The last response, for the server."""
        if self._left and self._error is None:
            self._fail("cancelled", pb_utils.TritonError.CANCELLED)
        return pb_utils.InferenceResponse(error=self._error) if self._error is not None else self.response()

    def _fail(self, message: str, code: int) -> None:
        self._error = pb_utils.TritonError(message, code)

    def is_cancelled(self) -> bool:
        return self._error is not None or bool(self._request.is_cancelled())

    def add(self, event: PartialImage | FinishedImage) -> None:
        raise NotImplementedError

    def response(self) -> Any:
        raise NotImplementedError


class CollectedAnswer(Answer):
    """All images of a call in one response."""

    def __init__(self, request: Any) -> None:
        super().__init__(request)
        self._images: dict[int, FinishedImage] = {}

    def add(self, event: PartialImage | FinishedImage) -> None:
        if isinstance(event, FinishedImage):
            self._images[event.index] = event

    def response(self) -> Any:
        rows = [image_tensors(self._images[index]) for index in sorted(self._images)]
        return as_response({name: np.concatenate([row[name] for row in rows]) for name in rows[0]})


class StreamedAnswer(Answer):
    """A response for each preview and each image of a call, as soon as it is there."""

    def __init__(self, request: Any) -> None:
        super().__init__(request)
        self._sender = request.get_response_sender()

    def is_cancelled(self) -> bool:
        return self._error is not None or bool(self._sender.is_cancelled())

    def add(self, event: PartialImage | FinishedImage) -> None:
        number = event.number + 1 if isinstance(event, PartialImage) else 0
        place = {"index": np.array([[event.index]], np.int32), "preview": np.array([[number]], np.int32)}
        self._sender.send(as_response({**image_tensors(event), **place}))

    def end(self) -> None:
        last = super().end()
        if last is not None:
            self._sender.send(last)
        self._sender.send(flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)

    def response(self) -> None:
        """Everything has been sent."""


def image_tensors(event: PartialImage | FinishedImage) -> dict[str, NDArray[Any]]:
    """One row of OUTPUTS; a preview has no settings."""
    if isinstance(event, PartialImage):
        picture, settings = event.image, "{}"
    else:
        picture, settings = event.generated.image, json.dumps(event.generated.metadata)
    return {"image": np.asarray(picture)[None], "settings": np.array([[settings.encode()]], object)}


def as_response(tensors: Tensors) -> Any:
    return pb_utils.InferenceResponse([pb_utils.Tensor(name, array) for name, array in tensors.items()])


def read_tensors(request: Any, names: Mapping[str, Any]) -> dict[str, NDArray[Any]]:
    """The inputs of a call that are given."""
    found = {name: pb_utils.get_input_tensor_by_name(request, name) for name in names}
    return {name: tensor.as_numpy() for name, tensor in found.items() if tensor is not None}


def infer(model: str, inputs: Tensors, outputs: Sequence[str]) -> dict[str, NDArray[Any]]:
    """Ask another model of the server. Raises EngineError with the reason when it fails."""
    tensors = [pb_utils.Tensor(name, array) for name, array in inputs.items()]
    host = pb_utils.PreferredMemory(pb_utils.TRITONSERVER_MEMORY_CPU, 0)
    asked = pb_utils.InferenceRequest(
        model_name=model, requested_output_names=list(outputs), inputs=tensors, preferred_memory=host
    )
    response = asked.exec()
    if response.has_error():
        raise EngineError(f"the server's model {model}: {response.error().message()}")
    found = {name: pb_utils.get_output_tensor_by_name(response, name) for name in outputs}
    return {name: np.array(tensor.as_numpy()) for name, tensor in found.items()}
