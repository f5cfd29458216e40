"""Load a Triton server with calls of `cascade`, over HTTP, and report speed, waiting times and batches.

pip install 'tritonclient[http]'
python examples/triton_load.py 64 8                     # 64 calls, 8 at a time
python examples/triton_load.py 64 8 127.0.0.1:8000 512  # of a server elsewhere, 512 pixels wide and high
"""

import sys
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import tritonclient.http as triton

PATIENCE = 3600.0  # seconds until a call is given up


def call(url: str, number: int, side: int) -> float:
    """Generate one image; returns the seconds that it took."""
    client = triton.InferenceServerClient(url, network_timeout=PATIENCE, connection_timeout=PATIENCE)
    values = {
        "prompt": ("BYTES", np.array([[f"image {number}".encode()]], object)),
        "seed": ("UINT64", np.array([[number]], np.uint64)),
    }
    values |= {name: ("INT32", np.array([[side]], np.int32)) for name in ("width", "height") if side}
    inputs = [triton.InferInput(name, [1, 1], kind) for name, (kind, _) in values.items()]
    for each in inputs:
        each.set_data_from_numpy(values[each.name()][1])
    began = time.monotonic()
    client.infer("cascade", inputs)
    client.close()
    return time.monotonic() - began


def counts(url: str) -> tuple[int, int]:
    """The images that `cascade` has generated, and the batches that it did so in."""
    client = triton.InferenceServerClient(url)
    found = client.get_inference_statistics("cascade")["model_stats"][0]
    client.close()
    return int(found["inference_count"]), int(found["execution_count"])


def main(calls: str = "16", together: str = "4", url: str = "127.0.0.1:8000", side: str = "0") -> None:
    before, began = counts(url), time.monotonic()
    with ThreadPoolExecutor(int(together)) as callers:
        seconds = list(callers.map(lambda number: call(url, number, int(side)), range(int(calls))))
    took, after = time.monotonic() - began, counts(url)
    images, batches = after[0] - before[0], after[1] - before[1]
    print(f"{len(seconds)} calls in {took:.1f} s: {len(seconds) / took:.2f} images/s")
    print("waited " + ", ".join(f"{np.quantile(seconds, share):.2f} s ({share:.0%})" for share in (0.5, 0.95, 1)))
    print(f"{images} images in {batches} batches")


if __name__ == "__main__":
    main(*sys.argv[1:])
