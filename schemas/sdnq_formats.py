"""The formats of SDNQ (the quantisation of SD.Next) that are written, and the settings that its package reads."""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple


class SdnqFormat(NamedTuple):
    """A format: SDNQ's name, the dtype of codes in the file, the dtype as it is read, bits, and the largest code.

    Codes with a `zero` begin at the least value of a group, others are symmetric."""

    name: str
    stored: str
    dtype: str
    bits: int
    top: float
    zero: bool = False


SDNQ_CHOICES: Mapping[str, SdnqFormat] = {
    "SDNQ_INT8": SdnqFormat("int8", "I8", "INT8", 8, 127),
    "SDNQ_FP8": SdnqFormat("float8_e4m3fn", "F8_E4M3", "F8_E4M3", 8, 448),
    "SDNQ_UINT4": SdnqFormat("uint4", "U8", "UINT4", 4, 15, zero=True),
}
VERSION = "0.2.8"  # of the package that opened our files


def group_of(form: SdnqFormat, columns: int) -> int:
    """Return how many values of a Linear's row share a factor, as SDNQ chooses for a group size of 0."""
    wanted = 2 ** (form.bits + 2)
    groups = columns // wanted
    while groups > 1 and columns % groups:
        groups -= 1
    return columns // groups if groups > 1 else columns


def settings_of(form: SdnqFormat, floats: Iterable[str]) -> dict[str, Any]:
    """Return the `quantization_config` of a network in which the modules `floats` are not quantised."""
    return {
        "quant_method": "sdnq",
        "weights_dtype": form.name,
        "group_size": 0,
        "dequantize_fp32": True,
        "add_skip_keys": False,
        "modules_to_not_convert": [f"{module}.weight" for module in floats],
        "sdnq_version": VERSION,
    }
