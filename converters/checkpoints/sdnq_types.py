"""Quantises the Linears of prior and decoder as SDNQ does, and plans their tensors.

Codes and factors equal those of SDNQ bit for bit. In a group of equal values the code is 0 here, where SDNQ divides
zero by zero."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import numpy as np
from ml_dtypes import float8_e4m3fn
from numpy.typing import NDArray

from ...schemas.errors import ConversionError
from ...schemas.quantization import candidates
from ...schemas.sdnq_formats import SDNQ_CHOICES, SdnqFormat, group_of, settings_of
from ...schemas.tensors import Shape, expected_tensors
from ...storage.float_rows import float_rows
from ...storage.safetensors_plan import CalculatedRange, TensorPlan
from ...storage.safetensors_reader import TensorRange
from ...storage.scaled_codes import rounded
from .component import Component
from .sampled_error import Floats, error_of_normal_numbers, in_float, sampled_error

BLOCK_VALUES = 1 << 16  # of rows at a time, so that the scratch space of a step stays in a core's cache


@dataclass(frozen=True)
class SdnqTypes:
    """The modules of a component that are quantised, and the settings that describe them."""

    form: SdnqFormat
    modules: frozenset[str]
    settings: dict[str, Any]
    floats: Mapping[str, str]  # why each other candidate stays float

    @classmethod
    def of(cls, component: Component, choice: str) -> "SdnqTypes":
        form, shapes = SDNQ_CHOICES[choice], expected_tensors(component.config)
        linears = candidates(component.stage, shapes)
        weights = ((module, component.tensors[f"{module}.weight"]) for module in linears)
        floats = {module: reason for module, matrix in weights if (reason := _unfit(matrix, linears[module], form))}
        modules = frozenset(linears.keys() - floats.keys())
        others = (name.removesuffix(".weight") for name, shape in shapes.items() if name.endswith(".weight"))
        return cls(form, modules, settings_of(form, (module for module in others if module not in modules)), floats)

    def plan(self, name: str, weight: str, matrix: TensorRange) -> dict[str, TensorPlan]:
        """Plan the tensors of the `weight` that is called `name` in the file; none when it is not quantised."""
        if weight.removesuffix(".weight") not in self.modules:
            return {}
        form, (rows, columns) = self.form, matrix.shape
        group, layer = group_of(form, columns), name.removesuffix("weight")
        groups = columns // group
        shape: Shape = (rows, groups, group) if groups > 1 else (rows, columns)
        if form.bits < 8:
            shape = (rows * columns * form.bits // 8,)
        factors = (rows, groups, 1) if groups > 1 else (rows, 1)
        plans = {name: _planned(form.stored, shape, _Part(matrix, form, "codes"))}
        for part in ("scale", "zero_point") if form.zero else ("scale",):
            plans[layer + part] = _planned("F32", factors, _Part(matrix, form, part))
        return plans

    def note(self, component: Component) -> str:
        """Return a line on how many modules are quantised, and why others stay float."""
        total = len(self.modules) + len(self.floats)
        quantised = f"{len(self.modules)} of {total} Linears in SDNQ's {self.form.name}"
        return f"{component.stage}: {quantised}{in_float(self.floats)}"


def _unfit(matrix: TensorRange, shape: Shape, form: SdnqFormat) -> str | None:
    """Why a matrix is not quantised: outliers, or what the format cannot hold."""
    if matrix.transposed or len(matrix.shape) != 2:
        return "it is no plain matrix in the file"
    if shape[1] * form.bits % 8:
        return f"its rows of {shape[1]} values do not fill bytes"
    lost = sampled_error(matrix, lambda rows: as_stored(_finite(rows, matrix), form), normal_error(form, shape[1]))
    return None if lost.tolerated else str(lost)


@cache
def normal_error(form: SdnqFormat, columns: int) -> float:
    """Return the relative L2 error of normal numbers in the format `form`."""
    return error_of_normal_numbers(columns, lambda rows: as_stored(rows, form))


def _planned(dtype: str, shape: Shape, part: "_Part") -> TensorPlan:
    nbytes = int(np.prod(shape)) * (4 if dtype == "F32" else 1)
    return TensorPlan(dtype, shape, (CalculatedRange(nbytes, part, (part.matrix,)),))


@dataclass(frozen=True)
class _Part:
    """Calculates the codes, factors or zero points of a matrix, some rows at a time."""

    matrix: TensorRange
    form: SdnqFormat
    part: str

    def __call__(self) -> Iterator[NDArray[Any]]:
        columns = self.matrix.shape[1]
        for rows in float_rows(self.matrix, max(1, BLOCK_VALUES // columns)):
            yield np.ascontiguousarray(quantised(_finite(rows, self.matrix), self.form, self.part))


def _finite(rows: Floats, matrix: TensorRange) -> Floats:
    """Return `rows` of `matrix`. Raises ConversionError for values that have no code."""
    if not np.isfinite(rows).all():
        raise ConversionError(
            f"{matrix.path}: the weight at byte {matrix.offset} holds NaN or infinities, which have no code; write it "
            "as float"
        )
    return rows


class Groups(NamedTuple):
    """The groups of rows, (rows, groups, values), and of each its factor and least code's value, (rows, groups, 1)."""

    values: Floats
    scale: Floats
    zero_point: Floats

    @classmethod
    def of(cls, rows: Floats, form: SdnqFormat) -> "Groups":
        values = rows.reshape(len(rows), -1, group_of(form, rows.shape[1]))
        if form.zero:
            least = values.min(axis=2, keepdims=True)
            return cls(values, (values.max(axis=2, keepdims=True) - least) / np.float32(form.top), least)
        scale = np.abs(values).max(axis=2, keepdims=True) / np.float32(form.top)
        return cls(values, scale, np.zeros((1, 1, 1), np.float32))

    def codes(self, form: SdnqFormat) -> NDArray[Any]:
        scaled = (self.values - self.zero_point) / np.where(self.scale == 0, np.float32(np.inf), self.scale)
        return _codes(np.asarray(scaled, np.float32), form)


def quantised(rows: Floats, form: SdnqFormat, part: str) -> NDArray[Any]:
    """Return the "codes" of rows, or the "scale" or "zero_point" of each group."""
    groups = Groups.of(rows, form)
    return groups.codes(form) if part == "codes" else np.asarray(getattr(groups, part))


def as_stored(rows: Floats, form: SdnqFormat) -> Floats:
    """Return the values that a reader gets of rows."""
    groups = Groups.of(rows, form)
    codes = groups.codes(form)
    if form.bits < 8:
        codes = np.stack([codes & 15, codes >> 4], axis=-1)
    values = codes.view(float8_e4m3fn) if form.stored == "F8_E4M3" else codes
    found = values.reshape(groups.values.shape).astype(np.float32) * groups.scale + groups.zero_point
    return np.asarray(found, np.float32).reshape(rows.shape)


def _codes(scaled: Floats, form: SdnqFormat) -> NDArray[Any]:
    if form.stored == "F8_E4M3":
        return rounded(scaled, float8_e4m3fn, form.top)
    whole = np.rint(scaled).clip(0 if form.zero else -form.top - 1, form.top)
    if form.bits == 8:
        return whole.astype(np.int8)
    pairs = whole.astype(np.uint8).reshape(-1, 2)
    return np.asarray(pairs[:, 0] | pairs[:, 1] << 4)
