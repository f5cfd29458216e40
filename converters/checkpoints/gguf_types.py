"""Chooses the types of tensors in GGUF files, so that the programs that open them can.

diffusers' `StableCascadeUNet.from_single_file` unpacks the weights of Linears only. It takes other tensors as F32 or
F16, and recognises stage B by the number of columns of one weight, which must stay a float."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ...schemas.block_types import BLOCK_TYPES, FILE_TYPES, SCALED_TYPES, type_for
from ...schemas.casts import target_dtype
from ...schemas.dtypes import FP8
from ...schemas.passport_keys import without_passport
from ...schemas.quantization import candidates
from ...schemas.stages import Stage
from ...schemas.tensors import Shape, expected_tensors
from ...storage.safetensors_plan import TensorPlan
from ...storage.safetensors_reader import TensorRange
from .component import Component

ARCHITECTURE = "stable_cascade"
STAGES = (Stage.PRIOR, Stage.DECODER)
RECOGNISED_BY: Mapping[Stage, str] = {Stage.DECODER: "down_blocks.1.0.channelwise.0"}
QUANTIZATION_VERSION = 2  # of the block types, as ggml counts


@dataclass(frozen=True)
class GGUFTypes:
    """The modules of a component whose weights are quantised, by diffusers names, and the type of their blocks.

    Without a type, float weights stay float and quantised weights stay as they are."""

    modules: frozenset[str]
    quantize: str | None

    @classmethod
    def of(cls, component: Component, quantize: str | None) -> "GGUFTypes":
        linears = candidates(component.stage, expected_tensors(component.config))
        return cls(frozenset(linears) - {RECOGNISED_BY.get(component.stage, "")}, quantize)

    def stored_as(self, name: str, shape: Shape, ranges: Sequence[TensorRange], dtype: str | None) -> set[str]:
        """Return the types in which the tensor of `ranges` could be stored; more than one if the ranges differ.

        `name` is the diffusers name of the first range, `dtype` that of floats (None: their own)."""
        module, _, part = name.rpartition(".")
        if self.quantize and part == "weight" and module in self.modules:
            fitting = type_for(self.quantize, shape[-1])
            if fitting is not None:
                return {fitting}
        return {self._as_float(tensor, shape, dtype) for tensor in ranges}

    def _as_float(self, tensor: TensorRange, shape: Shape, dtype: str | None) -> str:
        kept = target_dtype(tensor.dtype, dtype)
        if kept in BLOCK_TYPES:  # of a module that is not to be quantised, if a type was asked for
            return "F32" if self.quantize else kept
        if kept in SCALED_TYPES:
            return "F32"
        if kept in FP8:
            return "F32" if tensor.scale else "F16"  # which hold the values exactly
        return "F32" if kept == "F64" or (kept == "BF16" and len(shape) != 2) else kept


def file_metadata(component: Component, title: str) -> dict[str, str]:
    """Return the texts of a GGUF file's metadata: the source's, and the keys that GGUF prescribes."""
    kept = {key: text for key, text in without_passport(component.metadata).items() if key != "format"}
    named = {"general.name": component.metadata.get("modelspec.title", title)}
    return named | kept | {"general.architecture": ARCHITECTURE, "general.type": "model"}


def file_numbers(kind: str) -> dict[str, int]:
    """Return the numbers of the metadata of a GGUF file that has mostly the type `kind`."""
    numbers = {"general.quantization_version": QUANTIZATION_VERSION}
    return numbers | {"general.file_type": FILE_TYPES[kind]} if kind in FILE_TYPES else numbers


def main_type(tensors: Mapping[str, TensorPlan]) -> str:
    """Return the type that takes most bytes of a file, such as Q8_0. Beside blocks, floats do not count."""
    sizes: Counter[str] = Counter()
    blocks = {plan.dtype for plan in tensors.values()} & {*BLOCK_TYPES}
    for plan in tensors.values():
        sizes[plan.dtype] += plan.nbytes if plan.dtype in blocks or not blocks else 0
    return sizes.most_common(1)[0][0]
