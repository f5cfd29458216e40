"""Records weights as torchao, bitsandbytes and SDNQ store them, and the values that each gives back.

python tests/data/make_quantised.py [NAME...]

needs torchao 0.18.0, bitsandbytes 0.50.2 and sdnq 0.2.8. It writes two files for each format into the folder quantised:
NAME.safetensors has the tensors and the metadata as the program's own code saves them, NAME.values.safetensors the
values after the program's own dequantisation. NAME.json has the quantization_config of SDNQ."""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["SDNQ_USE_TORCH_COMPILE"] = "0"

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from safetensors.torch import save_file

from helpers.quantised import EVEN, linears

FOLDER = Path(__file__).with_name("quantised")
Tensors = dict[str, torch.Tensor]


def write(name: str, stored: Tensors, values: Tensors, metadata: dict[str, str] | None = None) -> None:
    def named(tensors: Tensors) -> Tensors:
        return {key.replace("/", "."): tensor.detach().contiguous().clone() for key, tensor in tensors.items()}

    save_file(named(stored), FOLDER / f"{name}.safetensors", metadata)
    save_file(named(values), FOLDER / f"{name}.values.safetensors")
    print(name, {key: (str(value.dtype), tuple(value.shape)) for key, value in stored.items()})


def torchao(name: str, config: Any, dtype: torch.dtype) -> None:
    from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict
    from torchao.quantization import quantize_

    model = linears(dtype)
    quantize_(model, config)
    state = {key.replace("/", "."): value for key, value in model.state_dict().items()}
    stored, metadata = flatten_tensor_state_dict(state)
    values = {f"{key}.weight": layer.weight.dequantize() for key, layer in model.items()}
    write(name, stored, values, {"format": "pt", **metadata})


def four_bits(name: str, kind: str, dtype: torch.dtype, *, nested: bool) -> None:
    import bitsandbytes

    stored, values = {}, {}
    for key, layer in linears(dtype).items():
        rows, columns = layer.weight.shape
        quantised = bitsandbytes.nn.Linear4bit(columns, rows, compress_statistics=nested, quant_type=kind)
        quantised.weight = bitsandbytes.nn.Params4bit(
            layer.weight.data, requires_grad=False, compress_statistics=nested, quant_type=kind
        )
        quantised.bias = layer.bias
        quantised = quantised.to("cpu")
        stored |= {f"{key}.{part}": tensor for part, tensor in quantised.state_dict().items()}
        weight = quantised.weight
        values[f"{key}.weight"] = bitsandbytes.functional.dequantize_4bit(weight.data, weight.quant_state)
    write(name, stored, values, {"format": "pt"})


def eight_bits(name: str) -> None:
    import bitsandbytes

    stored, values = {}, {}
    for key, layer in linears(torch.float16).items():
        rows, columns = layer.weight.shape
        quantised = bitsandbytes.nn.Linear8bitLt(columns, rows, has_fp16_weights=False)
        codes, factors, _ = bitsandbytes.functional.int8_vectorwise_quant(layer.weight.data)
        quantised.weight.data, quantised.weight.SCB, quantised.bias = codes, factors, layer.bias
        stored |= {f"{key}.{part}": tensor for part, tensor in quantised.state_dict().items()}
        values[f"{key}.weight"] = bitsandbytes.functional.int8_vectorwise_dequant(codes, factors)
    write(name, stored, values, {"format": "pt"})


def sdnq(name: str, dtype: torch.dtype = torch.float32, **settings: Any) -> None:
    from sdnq import SDNQConfig
    from sdnq.quantizer import sdnq_quantize_layer

    config = SDNQConfig(**settings)
    stored, values = {}, {}
    for key, layer in linears(dtype, EVEN).items():
        quantised, _ = sdnq_quantize_layer(
            layer, config, torch_dtype=dtype, param_name=f"{key}.weight".replace("/", ".")
        )
        stored |= {f"{key}.{part}": tensor for part, tensor in quantised.state_dict().items()}
        dequantised = quantised.sdnq_dequantizer(
            **{part: getattr(quantised, part, None) for part in ("weight", "scale", "zero_point")},
            skip_compile=True,
            dtype=torch.float32,
        )
        values[f"{key}.weight"] = dequantised
    write(name, stored, values, {"format": "pt"})
    (FOLDER / f"{name}.json").write_text(json.dumps(config.to_dict(), indent=1, default=str) + "\n")


def main() -> None:
    from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig, IntxWeightOnlyConfig, PerGroup

    FOLDER.mkdir(exist_ok=True)
    made: dict[str, Callable[[str], None]] = {
        "torchao_int8": lambda name: torchao(name, Int8WeightOnlyConfig(), torch.bfloat16),
        "torchao_float8": lambda name: torchao(name, Float8WeightOnlyConfig(), torch.float32),
        "torchao_int4": lambda name: torchao(
            name, IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(3)), torch.float16
        ),
        "bitsandbytes_nf4": lambda name: four_bits(name, "nf4", torch.bfloat16, nested=False),
        "bitsandbytes_nf4_nested": lambda name: four_bits(name, "nf4", torch.float16, nested=True),
        "bitsandbytes_fp4": lambda name: four_bits(name, "fp4", torch.float32, nested=False),
        "bitsandbytes_int8": eight_bits,
    }
    for bits, kinds in enumerate(("", "", "uint2", "int3", "uint4", "int5", "uint6", "int7", "int8")):
        if kinds:
            group = {"group_size": 5} if bits != 8 else {}
            made[f"sdnq_{kinds}"] = lambda name, kind=kinds, group=group: sdnq(name, weights_dtype=kind, **group)
    made |= {
        "sdnq_uint8": lambda name: sdnq(name, torch.bfloat16, weights_dtype="uint8", dequantize_fp32=False),
        "sdnq_int4": lambda name: sdnq(name, torch.float16, weights_dtype="int4", dequantize_fp32=False, group_size=16),
        "sdnq_float8": lambda name: sdnq(name, weights_dtype="float8_e4m3fn"),
        "sdnq_fp4": lambda name: sdnq(name, weights_dtype="fp4", group_size=16),
        "sdnq_ufp6": lambda name: sdnq(name, weights_dtype="float6_e3m3fnu"),
        "sdnq_mixed": lambda name: sdnq(
            name, weights_dtype="uint4", modules_dtype_dict={"int8": ["clip_txt_pooled_mapper"]}, group_size=32
        ),
    }
    for name in sys.argv[1:] or made:
        made[name](name)


if __name__ == "__main__":
    main()
