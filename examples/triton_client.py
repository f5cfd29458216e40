"""Generate images on a Triton server that serves a repository of `cascadekit export-triton`.

pip install 'tritonclient[grpc]' pillow
python examples/triton_client.py "a fox, glossy style" image.png
python examples/triton_client.py "a fox, glossy style" image.png previews=3 width=1024 height=1024 seed=7
"""

import queue
import sys
from pathlib import Path

import numpy as np
import tritonclient.grpc as triton
from PIL import Image

TYPES = {
    "UINT64": ("seed",),
    "INT32": ("width", "height", "prior_steps", "decoder_steps", "previews"),
    "FP64": ("prior_guidance", "decoder_guidance"),
    "BYTES": ("prompt", "negative", "sampler"),
}
DTYPES = {"UINT64": np.uint64, "INT32": np.int32, "FP64": np.float64, "BYTES": object}


def request_inputs(fields: dict[str, str]) -> list[triton.InferInput]:
    """One row of tensors (1, 1), for one image."""
    inputs = []
    for kind, names in TYPES.items():
        for name in names & fields.keys():
            value = fields[name].encode() if kind == "BYTES" else DTYPES[kind](fields[name])
            inputs.append(triton.InferInput(name, [1, 1], kind))
            inputs[-1].set_data_from_numpy(np.array([[value]], DTYPES[kind]))
    return inputs


def generate(client: triton.InferenceServerClient, fields: dict[str, str]) -> triton.InferResult:
    """The model `cascade` answers once."""
    return client.infer("cascade", request_inputs(fields))


def generate_with_previews(client: triton.InferenceServerClient, fields: dict[str, str], output: Path) -> None:
    """The model `cascade_stream` answers for each preview and for the image."""
    answers: queue.Queue[tuple[triton.InferResult, Exception | None]] = queue.Queue()
    client.start_stream(lambda result, error: answers.put((result, error)))
    try:
        client.async_stream_infer("cascade_stream", request_inputs(fields))
        while True:
            result, error = answers.get()
            if error:
                raise error
            number = int(result.as_numpy("preview").item())
            save(result, output.with_name(f"{output.stem}-preview{number}{output.suffix}") if number else output)
            if not number:
                return
    finally:
        client.stop_stream()


def save(result: triton.InferResult, path: Path) -> None:
    Image.fromarray(result.as_numpy("image")[0]).save(path)
    print(f"wrote {path}")


def main(prompt: str, output: str, *more: str) -> None:
    fields = {"prompt": prompt, **dict(each.split("=", 1) for each in more)}
    client = triton.InferenceServerClient(fields.pop("url", "127.0.0.1:8001"))
    if "previews" in fields:
        generate_with_previews(client, fields, Path(output))
    else:
        result = generate(client, fields)
        save(result, Path(output))
        print(result.as_numpy("settings").item().decode())
    client.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
