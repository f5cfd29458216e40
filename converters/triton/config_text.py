"""Model configs of Triton in protobuf's text format (config.pbtxt), from plain values."""

import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from ...runtime.engines.protocol import PortSpec
from ...runtime.triton.request_tensors import RowTensor
from ...runtime.triton.triton_engine import wire_dims

PORT_TYPES: Mapping[str, str] = {"float32": "FP32", "int64": "INT64"}  # Triton's names of the ports' dtypes


class Word(str):
    """A value of an enum, which is written without quotes."""


def config_text(fields: Mapping[str, Any]) -> str:
    """A message as text. A list is a repeated field, a mapping is a message inside.

    Examples:
        >>> print(config_text({"name": "m", "dims": [1, 2], "kind": Word("KIND_CPU"), "inside": {"on": True}}), end="")
        name: "m"
        dims: 1
        dims: 2
        kind: KIND_CPU
        inside {
          on: true
        }
    """
    return "".join(f"{line}\n" for line in _lines(fields))


def _lines(fields: Mapping[str, Any]) -> Iterator[str]:
    for name, value in fields.items():
        for each in value if isinstance(value, list) else [value]:
            if isinstance(each, Mapping):
                yield f"{name} {{"
                yield from (f"  {line}" for line in _lines(each))
                yield "}"
            else:
                yield f"{name}: {each if isinstance(each, Word) else json.dumps(each)}"


def string_map(values: Mapping[str, str], value_field: str | None = None) -> list[dict[str, Any]]:
    """A map of text to text, or to a message whose `value_field` is the text."""
    return [{"key": key, "value": {value_field: value} if value_field else value} for key, value in values.items()]


def port_tensors(ports: Iterable[PortSpec]) -> list[dict[str, Any]]:
    """Inputs or outputs of a stage. The batch is no dim of a config; a number for each row has the dims [1] there."""
    return [
        {
            "name": port.name,
            "data_type": Word(f"TYPE_{PORT_TYPES[port.dtype]}"),
            "dims": [dim if isinstance(dim, int) else -1 for dim in wire_dims(port)],
            **({} if port.dims[1:] else {"reshape": {}}),
        }
        for port in ports
    ]


def row_tensors(tensors: Mapping[str, RowTensor], *, inputs: bool) -> list[dict[str, Any]]:
    """Inputs or outputs of `cascade`; only inputs can be optional."""
    return [
        {
            "name": name,
            "data_type": Word(f"TYPE_{tensor.type}"),
            "dims": list(tensor.shape),
            **({"optional": True} if inputs and tensor.optional else {}),
        }
        for name, tensor in tensors.items()
    ]
