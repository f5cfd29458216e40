"""Arrays in GPU memory at fixed addresses, which ONNX Runtime reads and writes in place."""

import weakref
from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

import ml_dtypes  # noqa: F401, numpy knows the name of bf16 by it
import numpy as np
from numpy.typing import NDArray

BF16 = "bfloat16"
BF16_NUMBER = 16  # of the type in ONNX; numpy has none
MOST_KEPT = 4  # sets of arrays that wait to be lent again

ArraySpec = tuple[tuple[int, ...], str]  # shape and name of the dtype


class DeviceArray:
    """An array in the engine's memory. It has the `shape`, `ndim` and `dtype` of the numpy array that it stands for.

    `value` is ONNX Runtime's OrtValue, whose address never changes. `lent_by` keeps its Loan alive."""

    def __init__(self, value: Any, spec: ArraySpec, lent_by: "Loan | None" = None) -> None:
        self.value = value
        self.shape, self.dtype = spec[0], np.dtype(spec[1])
        self.ndim = len(self.shape)
        self._lent_by = lent_by

    def write(self, array: "NDArray[Any] | DeviceArray") -> None:
        """Replace the content; the address stays. Nothing is copied if `array` is at this address."""
        if isinstance(array, DeviceArray):
            if array.value is not self.value:
                self.value.update_inplace(array.value)
        else:
            self.value.update_inplace(np.ascontiguousarray(array))

    def read(self) -> NDArray[Any]:
        return read_value(self.value)


def read_value(value: Any) -> NDArray[Any]:
    """A copy of an OrtValue's content in the memory of the host."""
    array: NDArray[Any] = value.numpy()
    return array if array.flags.owndata else array.copy()  # a view where the "device" is the CPU


class Loan:
    """A set of device arrays, by port. Its memory is lent again once nothing refers to the loan or its arrays."""

    def __init__(self, values: Mapping[str, Any], specs: Mapping[str, ArraySpec]) -> None:
        self._values, self._specs = values, specs

    def arrays(self) -> dict[str, DeviceArray]:
        return {name: DeviceArray(value, self._specs[name], self) for name, value in self._values.items()}


class DeviceMemory:
    """Allocates arrays on a device, and lends sets of them at addresses that come back.

    A CUDA graph reads the addresses that it was captured with. What one graph of a stage writes for another must
    therefore lie at the same addresses for every image of one size."""

    def __init__(self, ort: Any, device: str = "cuda") -> None:
        """`ort` is the module onnxruntime; `device` is a name that its OrtValue takes."""
        self._ort = ort
        self.device = device
        self._free: list[tuple[dict[str, ArraySpec], dict[str, Any]]] = []  # in the order of their return

    def array(self, spec: ArraySpec) -> DeviceArray:
        return DeviceArray(self._allocate(spec), spec)

    def lend(self, specs: Mapping[str, ArraySpec]) -> dict[str, DeviceArray]:
        """An array for each port, at addresses that no other loan has now. The content is what was left there."""
        wanted = dict(specs)
        found = next((entry for entry in self._free if entry[0] == wanted), None)
        if found:
            self._free.remove(found)
        values = found[1] if found else {name: self._allocate(spec) for name, spec in wanted.items()}
        loan = Loan(values, wanted)
        weakref.finalize(loan, self._take_back, wanted, values)
        return loan.arrays()

    def forget(self) -> None:
        """Free the arrays that are not lent."""
        self._free.clear()

    def _take_back(self, specs: dict[str, ArraySpec], values: dict[str, Any]) -> None:
        self._free.append((specs, values))
        del self._free[:-MOST_KEPT]

    def _allocate(self, spec: ArraySpec) -> Any:
        shape, dtype = spec
        kind = BF16_NUMBER if dtype == BF16 else np.dtype(dtype).type
        return self._ort.OrtValue.ortvalue_from_shape_and_type(shape, kind, self.device, 0)


def spec_of(array: "NDArray[Any] | DeviceArray") -> ArraySpec:
    return tuple(array.shape), array.dtype.name


def resolved(dims: Sequence[int | str], sizes: Mapping[str, int]) -> tuple[int, ...] | None:
    """The shape of a port whose named dims have `sizes`; a dim may be a multiple, as in "4*height". None if unknown."""
    found = []
    for dim in dims:
        factors = str(dim).split("*")
        if not all(factor.isdecimal() or factor in sizes for factor in factors):
            return None
        found.append(prod(int(factor) if factor.isdecimal() else sizes[factor] for factor in factors))
    return tuple(found)
