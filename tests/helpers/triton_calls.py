"""Calls of a server by Triton's own clients, as a script in their environment: triton_calls.py NAME HTTP GRPC FOLDER.

Each function prints its findings as JSON; images are npz files in FOLDER. This file imports nothing of cascadekit."""

import json
import queue
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import tritonclient.grpc as grpc
import tritonclient.http as http
from triton_prompts import PROMPTS, QUICK
from tritonclient.utils import InferenceServerException

KINDS = {"seed": "UINT64", "prior_guidance": "FP64"}
DTYPES = {"BYTES": object, "UINT64": np.uint64, "FP64": np.float64, "INT32": np.int32}
MALFORMED: dict[str, dict[str, Any]] = {
    "a size that is no multiple of 8": {"prompt": "a cat", **QUICK, "width": 63},
    "an unknown sampler": {"prompt": "a cat", **QUICK, "sampler": "euler"},
    "steps beyond the limit": {"prompt": "a cat", **QUICK, "prior_steps": 101},
    "no prompt": {"seed": 1, **QUICK},
    "other bytes than UTF-8": {"prompt": b"\xff\xfe", **QUICK},
    "rows of two sizes": {"prompt": ["a", "b"], **QUICK, "width": [64, 128]},
}


def inputs(client: Any, fields: dict[str, Any]) -> list[Any]:
    """A list is a value for each row."""
    rows = max(len(value) if isinstance(value, list) else 1 for value in fields.values())
    found = []
    for name, value in fields.items():
        values = value if isinstance(value, list) else [value] * rows
        values = [each.encode() if isinstance(each, str) else each for each in values]
        kind = "BYTES" if isinstance(values[0], bytes) else KINDS.get(name, "INT32")
        found.append(client.InferInput(name, [rows, 1], kind))
        found[-1].set_data_from_numpy(np.array([[each] for each in values], DTYPES[kind]))
    return found


def fields_of(number: int) -> dict[str, Any]:
    return {"prompt": PROMPTS[number], "negative": "gray", "seed": number, **QUICK}


def ask(url: str, fields: dict[str, Any]) -> Any:
    """The image over HTTP, or the error as text."""
    client = http.InferenceServerClient(url, network_timeout=200, connection_timeout=200)
    try:
        return client.infer("cascade", inputs(http, fields)).as_numpy("image")
    except InferenceServerException as error:
        return str(error)
    finally:
        client.close()


def counts(url: str, model: str) -> tuple[int, int]:
    client = http.InferenceServerClient(url)
    found = client.get_inference_statistics(model)["model_stats"][0]
    client.close()
    return int(found["inference_count"]), int(found["execution_count"])


def together(url: str, asked: Sequence[dict[str, Any]]) -> list[Any]:
    with ThreadPoolExecutor(len(asked)) as callers:
        return list(callers.map(lambda fields: ask(url, fields), asked))


def concurrent(web: str, remote: str, folder: Path) -> dict[str, Any]:
    """Good calls at the same time over HTTP, and again among bad ones."""
    good = [fields_of(number) for number in range(len(PROMPTS))]
    before = counts(web, "cascade")
    first = together(web, good)
    after, until = counts(web, "cascade"), time.monotonic() + 20
    while after[0] < before[0] + len(good) and time.monotonic() < until:  # the server counts after it has answered
        time.sleep(0.05)
        after = counts(web, "cascade")
    second = together(web, [*MALFORMED.values(), *good])
    bad, again = second[: len(MALFORMED)], second[len(MALFORMED) :]
    np.savez(folder / "images.npz", first=np.concatenate(first), again=np.concatenate(again))
    errors = dict(zip(MALFORMED, bad, strict=True))
    return {"images": after[0] - before[0], "batches": after[1] - before[1], "errors": errors}


def listed(web: str, remote: str, folder: Path) -> dict[str, Any]:
    """The images of the calls that calls.json lists, one after the other."""
    images = [ask(web, fields)[0] for fields in json.loads((folder / "calls.json").read_text())]
    np.savez(folder / "images.npz", images=images)
    return {}


def remote(web: str, remote: str, folder: Path) -> dict[str, Any]:
    """Two rows in one call over gRPC, a call that is cancelled, and one after it."""
    client = grpc.InferenceServerClient(remote)
    both = {name: [fields_of(n)[name] for n in (0, 3)] for name in fields_of(0)}
    result = client.infer("cascade", inputs(grpc, both))
    long = {**fields_of(1), "prior_steps": 100, "decoder_steps": 100, "width": 512, "height": 512}
    done: queue.Queue[Any] = queue.Queue()
    running = client.async_infer("cascade", inputs(grpc, long), lambda result, error: done.put(error))
    time.sleep(1.5)
    running.cancel()
    error = done.get(timeout=60)
    began = time.monotonic()
    again = client.infer("cascade", inputs(grpc, fields_of(0))).as_numpy("image")
    seconds = time.monotonic() - began
    np.savez(folder / "images.npz", both=result.as_numpy("image"), again=again)
    settings = [json.loads(each) for each in result.as_numpy("settings").flat]
    client.close()
    return {"settings": settings, "cancelled": str(error), "seconds_after": seconds}


def stream(web: str, remote: str, folder: Path) -> dict[str, Any]:
    """Previews and image of a good call, and the error of a bad one, over one stream."""
    client = grpc.InferenceServerClient(remote)
    answers: queue.Queue[Any] = queue.Queue()
    client.start_stream(lambda result, error: answers.put((result, error)))
    kept, shapes, errors = {}, [], []
    for previews in (2, 9):
        fields = {**fields_of(0), "previews": previews}
        client.async_stream_infer("cascade_stream", inputs(grpc, fields), enable_empty_final_response=True)
    ended = 0
    while ended < 2:
        result, error = answers.get(timeout=200)
        if error:
            errors.append(str(error))
            continue
        ended += result.get_response().parameters["triton_final_response"].bool_param
        if result.as_numpy("image") is not None:
            preview = int(result.as_numpy("preview").item())
            kept[str(preview)] = result.as_numpy("image")
            shapes.append([preview, *result.as_numpy("image").shape])
    client.stop_stream()
    np.savez(folder / "images.npz", **kept)
    return {"answers": shapes, "errors": errors}


def parse_configs(web: str, remote: str, folder: Path) -> dict[str, Any]:
    """Every config.pbtxt below a folder, as Triton's protobufs read it."""
    from google.protobuf import json_format, text_format
    from tritonclient.grpc import model_config_pb2

    found = {}
    for path in sorted(folder.glob("**/config.pbtxt")):
        config = text_format.Parse(path.read_text(), model_config_pb2.ModelConfig())
        options: dict[str, Any] = {"preserving_proto_field_name": True}
        found[path.parent.relative_to(folder).as_posix()] = json_format.MessageToDict(config, **options)
    return found


if __name__ == "__main__":
    name, web_url, remote_url, place = sys.argv[1:]
    run: Callable[[str, str, Path], dict[str, Any]] = globals()[name]
    print(json.dumps(run(web_url, remote_url, Path(place))))
