"""Write a LoRA of random numbers for a prior, to try the commands for LoRAs without training one.

python examples/make_lora.py demo/original/stage_c.safetensors style.safetensors
"""

import json
import sys
from pathlib import Path

import numpy as np

from cascadekit import inspect

RANK = 4


def main(checkpoint: str, output: str) -> None:
    prior = inspect(checkpoint).components["prior"]
    header, data = {}, b""
    rng = np.random.default_rng(0)
    for name, tensor in prior.tensors.items():
        if not name.endswith(("attention.to_q.weight", "attention.to_v.weight")):
            continue
        key = "lora_unet_" + name.removesuffix(".weight").replace(".", "_")  # as kohya's scripts name it
        rows, columns = tensor.shape
        for factor, shape in (("lora_down", (RANK, columns)), ("lora_up", (rows, RANK))):
            values = rng.standard_normal(shape, np.float32) * np.float32(shape[1] ** -0.5)
            place = [len(data), len(data) + values.nbytes]
            header[f"{key}.{factor}.weight"] = {"dtype": "F32", "shape": shape, "data_offsets": place}
            data += values.tobytes()
    text = json.dumps(header).encode()
    Path(output).write_bytes(len(text).to_bytes(8, "little") + text + data)  # a safetensors file
    print(f"wrote {output}: rank {RANK}, {len(header) // 2} modules")


if __name__ == "__main__":
    main(*sys.argv[1:])
