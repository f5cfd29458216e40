"""Chooses the weights of prior and decoder to quantise for ComfyUI, and plans their tensors.

Every candidate is measured: the largest magnitude of the whole matrix, and the error of some of its rows. A matrix with
outliers stays float."""

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from ...schemas.comfy_formats import CHOICES, FORMATS, OVERALL, QUANT, SCALE, TILE, WEIGHT
from ...schemas.errors import ConversionError
from ...schemas.quantization import candidates
from ...schemas.stages import Stage
from ...schemas.tensors import Shape, expected_tensors
from ...storage.float_rows import float_rows
from ...storage.safetensors_plan import CalculatedRange, TensorPlan
from ...storage.safetensors_reader import TensorRange
from ...storage.scaled_codes import codes, group_factors, overall_factor, tiled, worth
from ...storage.threads import CAST_THREADS, run_in_order
from .comfyui_copy import can_copy, copied
from .component import Component
from .constant_values import constant, constant_text
from .gguf_types import RECOGNISED_BY
from .sampled_error import Floats, SampledError, error_of_normal_numbers, in_float, sampled_error

BLOCK_VALUES = 1 << 20  # of rows that are in memory at a time, about ten arrays of them


@dataclass(frozen=True)
class ScaledTypes:
    """The decision on every candidate of a component: the factor of all values of each module that is quantised, and
    why each other module stays float.

    `worst` is the largest error among those quantised. `copies` are modules that have the format already."""

    kind: str
    factors: dict[str, np.float32]
    floats: dict[str, str]
    worst: SampledError
    copies: frozenset[str] = frozenset()
    settings: ClassVar[dict[str, Any]] = {}  # of config.json, which ComfyUI's files do not need

    @classmethod
    def of(cls, component: Component, choice: str) -> "ScaledTypes":
        """Measure every candidate. Raises ConversionError for weights with NaN or infinities."""
        kind = CHOICES[choice]
        linears = candidates(component.stage, expected_tensors(component.config))
        floats: dict[str, str] = {}
        copies: list[str] = []
        to_measure: dict[str, TensorRange] = {}
        for module, shape in linears.items():
            matrix = component.tensors[f"{module}.weight"]
            if matrix.scale and matrix.scale.kind == kind and can_copy(matrix):
                copies.append(module)
            elif reason := _unfit(component.stage, module, shape, matrix, kind):
                floats[module] = reason
            else:
                to_measure[module] = matrix
        with ThreadPoolExecutor(CAST_THREADS) as pool:
            tasks = ((module, partial(_measured, matrix, module, kind)) for module, matrix in to_measure.items())
            found = dict(run_in_order(pool, tasks))
        floats |= {module: str(error) for module, (_, error) in found.items() if not error.tolerated}
        kept = {module: each for module, each in found.items() if module not in floats}
        return cls(
            kind,
            factors={module: overall for module, (overall, _) in kept.items()},
            floats={module: floats[module] for module in linears if module in floats},
            worst=max((error for _, error in kept.values()), default=SampledError(0.0, 0.0)),
            copies=frozenset(copies),
        )

    def plan(self, name: str, weight: str, matrix: TensorRange) -> dict[str, TensorPlan]:
        """Plan the tensors of the `weight` that is called `name` in the file; none when it is not quantised."""
        module = weight.removesuffix(WEIGHT)
        if module in self.copies:
            return copied(name, matrix)
        if module not in self.factors:
            return {}
        form, overall, layer = FORMATS[self.kind], self.factors[module], name.removesuffix(WEIGHT)
        rows, columns = matrix.shape[:2]
        width = columns // 2 if form.dtype == "FP4" else columns
        planned = {name: _calculated(form.stored, (rows, width), _Codes(matrix, self.kind, overall))}
        single = TensorPlan("F32", (), (constant(np.array(overall, "<f4")),))
        if form.group:
            shape = tuple(
                -(-size // step) * step for size, step in zip((rows, columns // form.group), TILE, strict=True)
            )
            planned[layer + SCALE] = _calculated(form.scales[0], shape, _Factors(matrix, self.kind, overall))
        if not form.group or self.kind == "nvfp4":
            planned[layer + (OVERALL if form.group else SCALE)] = single
        return planned | {layer + QUANT: constant_text(json.dumps({"format": self.kind}))}

    def note(self, component: Component) -> str:
        """Return a line on how many modules are quantised, the worst error, and why others stay float."""
        total = len(self.factors) + len(self.floats) + len(self.copies)
        error = f", worst {self.worst}" if self.factors else ""
        copies = f" and {len(self.copies)} copied" if self.copies else ""
        quantised = f"{len(self.factors)} of {total} Linears in {self.kind}{copies}{error}"
        return f"{component.stage}: {quantised}{in_float(self.floats)}"


def _measured(matrix: TensorRange, module: str, kind: str) -> tuple[np.float32, SampledError]:
    """Return the factor of all values of a matrix, and what its codes lose."""
    overall = overall_factor(kind, _largest(matrix, module))
    as_stored = partial(_as_stored, kind=kind, overall=overall)
    return overall, sampled_error(matrix, as_stored, normal_error(kind, matrix.shape[1]))


def _unfit(stage: Stage, module: str, shape: Shape, matrix: TensorRange, kind: str) -> str | None:
    multiple = FORMATS[kind].multiple
    if module == RECOGNISED_BY.get(stage):
        return "ComfyUI recognises the model by it"
    if matrix.transposed or len(matrix.shape) != 2:
        return "it is no plain matrix in the file"
    if any(size % multiple for size in shape):
        return f"its shape {list(shape)} is no multiple of {multiple}"
    return None


def _height(columns: int) -> int:
    """Rows to read at a time: whole tiles of factors."""
    return max(1, BLOCK_VALUES // columns // TILE[0]) * TILE[0]


def _largest(matrix: TensorRange, module: str) -> np.float32:
    largest = np.float32(0)
    for rows in float_rows(matrix, _height(matrix.shape[1])):
        largest = np.maximum(largest, np.maximum(rows.max(), -rows.min()))  # which keeps a NaN
    if not np.isfinite(largest):
        raise ConversionError(
            f"{matrix.path}: {module}.weight holds NaN or infinities, which have no code; write it as float"
        )
    return largest


def _as_stored(rows: Floats, kind: str, overall: np.float32) -> Floats:
    factors = group_factors(rows, kind, overall) if FORMATS[kind].group else None
    return worth(codes(rows, kind, overall), kind, overall, factors)


@cache
def normal_error(kind: str, columns: int) -> float:
    """Return the relative L2 error of normal numbers in the format `kind`."""
    return error_of_normal_numbers(
        columns, lambda rows: _as_stored(rows, kind, overall_factor(kind, np.abs(rows).max()))
    )


@dataclass(frozen=True)
class _Codes:
    """Calculates the codes of a matrix, some rows at a time."""

    matrix: TensorRange
    kind: str
    overall: np.float32

    def __call__(self) -> Iterator[NDArray[Any]]:
        for rows in float_rows(self.matrix, _height(self.matrix.shape[1])):
            yield codes(rows, self.kind, self.overall)


class _Factors(_Codes):
    """Calculates the factors of the groups of a matrix, in tiles."""

    def __call__(self) -> Iterator[NDArray[Any]]:
        for rows in float_rows(self.matrix, _height(self.matrix.shape[1])):
            yield tiled(group_factors(rows, self.kind, self.overall))


def _calculated(dtype: str, shape: Shape, blocks: _Codes) -> TensorPlan:
    return TensorPlan(dtype, shape, (CalculatedRange(int(np.prod(shape)), blocks, (blocks.matrix,)),))
