"""torch's CPU generator in numpy: the same normal noise bit for bit, without torch.

A seed stands for an image only if every program draws the same noise from it. The noise here is therefore that of
diffusers' ``randn_tensor`` with CPU generators: ``torch.randn`` in float32.

The code follows ``normal_`` of torch's x86-64 Linux builds on CPUs with AVX2 or AVX-512, which share one kernel. It was
compared with torch 2.13.

The values are 24-bit uniforms that Box-Muller turns into normals in blocks of 16. Logarithm, sine and cosine are the
Cephes polynomials of ``avx_mathfun.h``, in which GCC contracts ``a * b + c`` to fused multiply-adds. Each polynomial
takes one of 2**24 uniforms, and the tests compare all of them. The arithmetic here is IEEE only, so the result is the
same on every machine.

Three kinds of noise are left out. torch computes fewer than 16 values in another way, and no latents have so few.
Releases of torch consume the generator differently for bfloat16 and float16. With ``ATEN_CPU_CAPABILITY=default``, and
on CPUs without AVX2, torch uses libm. Two in five of 2**25 such values differed from those here, all by less than 3e-6.
Builds by other compilers (Windows, macOS) have not been compared.
"""

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ...schemas.errors import UsageError
from ..engines.protocol import F32

F64 = NDArray[np.float64]

BLOCK = 16  # values of one vector step of normal_: 8 that give the radius, 8 that give the angle
LANES = BLOCK // 2
PASSED = 1 << 20  # words thrown away at once
CHUNK = 1024  # blocks per pass of the numpy code: its temporaries then stay in the cache


def _rounded(values: Sequence[float]) -> tuple[float, ...]:
    """Constants rounded to float32 as in the C code, and held as doubles."""
    return tuple(float(np.float32(value)) for value in values)


# All from torch's aten/src/ATen/native/cpu/avx_mathfun.h, there from Cephes logf.c and sinf.c.
LOG_P = _rounded(
    (
        7.0376836292e-2,
        -1.1514610310e-1,
        1.1676998740e-1,
        -1.2420140846e-1,
        1.4249322787e-1,
        -1.6668057665e-1,
        2.0000714765e-1,
        -2.4999993993e-1,
        3.3333331174e-1,
    )
)
SIN_P = _rounded((-1.9515295891e-4, 8.3321608736e-3, -1.6666654611e-1))
COS_P = _rounded((2.443315711809948e-5, -1.388731625493765e-3, 4.166664568298827e-2))
SQRT_HALF, FOUR_OVER_PI = _rounded((0.707106781186547524, 1.27323954473516))
LN2_LOW, LN2_HIGH = _rounded((-2.12194440e-4, 0.693359375))  # their sum is ln 2
MINUS_QUARTER_PI = _rounded((-0.78515625, -2.4187564849853515625e-4, -3.77489497744594108e-8))  # as a sum of three
TWO_PI = np.float32(2 * math.pi)


class TorchGenerator:
    """Replaces ``torch.Generator("cpu").manual_seed(seed)``: the same values, and the same state after every draw.

    The code is normal_fill of ATen/native/cpu/DistributionTemplates.h.

    ``seed`` is an integer from -2**63 to 2**64 - 1; anything else raises UsageError. Seeds that are equal modulo 2**32
    give the same noise, as torch's CPU engine uses the lower 32 bits (two's complement).
    """

    def __init__(self, seed: int) -> None:
        if isinstance(seed, bool) or not isinstance(seed, int | np.integer):
            raise UsageError(f"seed {seed!r}: expected an integer")
        if not -(2**63) <= int(seed) < 2**64:
            raise UsageError(f"seed {seed}: expected -2**63 to 2**64 - 1")
        # torch's mt19937_engine and numpy's legacy seeding are both the init_genrand of Matsumoto and Nishimura.
        self._engine = np.random.RandomState(int(seed) & 0xFFFFFFFF)

    def randn(self, shape: tuple[int, ...]) -> F32:
        """``torch.randn(shape, generator=self)``: a new float32 array of ``shape``. Raises as ``randn_rows`` does."""
        return self.randn_rows(shape, range(shape[0]))

    def randn_rows(self, shape: tuple[int, ...], rows: Sequence[int]) -> F32:
        """``randn(shape)[rows]``, in the memory of these rows alone; the values of other rows are skipped.

        The generator is then in the same state as after ``randn``. Raises UsageError for a row that ``shape`` lacks,
        and for a shape of fewer than 16 values.
        """
        if not all(0 <= row < shape[0] for row in rows):
            raise UsageError(f"rows {list(rows)}: expected rows of noise of shape {tuple(shape)}")
        count = math.prod(shape)
        if count < BLOCK:
            raise UsageError(f"noise of shape {tuple(shape)}: expected at least {BLOCK} values")
        width = count // shape[0]
        kept = np.empty((len(rows), width), np.float32)
        blocks = count // BLOCK
        done = 0  # values that the generator has passed
        for start, stop in _ranges(rows, width):  # in blocks; the last one may go beyond what is whole
            whole = min(stop, blocks) * BLOCK
            self._pass_over(start * BLOCK - done)
            values = self._uniforms(whole - start * BLOCK)
            _box_muller(values)
            _keep(kept, rows, values, start * BLOCK)
            done = whole
        self._pass_over(count - done)
        if count % BLOCK:  # torch overwrites the last 16 values with new ones
            values = self._uniforms(BLOCK)
            _box_muller(values)
            _keep(kept, rows, values, count - BLOCK)
        return kept.reshape(len(rows), *shape[1:])

    def _pass_over(self, words: int) -> None:
        for start in range(0, words, PASSED):
            self._words(min(PASSED, words - start))

    def _words(self, count: int) -> NDArray[np.uint32]:
        """Raw outputs of the engine; over the full range randint returns them unchanged."""
        return self._engine.randint(0, 2**32, count, np.uint32)

    def _uniforms(self, count: int) -> F32:
        """uniform_real_distribution<float>: the lower 24 bits of a word each, in [0, 1)."""
        return (self._words(count) & np.uint32(0xFFFFFF)).astype(np.float32) * np.float32(2**-24)


def _ranges(rows: Sequence[int], width: int) -> list[tuple[int, int]]:
    """The blocks that `rows` of `width` values reach into: (first, one after the last), touching ranges joined."""
    found: list[tuple[int, int]] = []
    for row in sorted(set(rows)):
        start, stop = row * width // BLOCK, -(-(row + 1) * width // BLOCK)
        if found and start <= found[-1][1]:
            start = found.pop()[0]
        found.append((start, stop))
    return found


def _keep(kept: F32, rows: Sequence[int], values: F32, at: int) -> None:
    """Copy the values of each of `rows` into `kept`; the first of `values` is number `at` of the whole noise."""
    width = kept.shape[1]
    for place, row in enumerate(rows):
        start, stop = max(row * width, at), min((row + 1) * width, at + len(values))
        if start < stop:
            kept[place, start - row * width : stop - row * width] = values[start - at : stop - at]


def _box_muller(values: F32) -> None:
    """Turn uniforms into normals in place: NormalFill16<float, true> of DistributionTemplates.h.

    ``values`` is contiguous, and its size is a multiple of 16. In a block, value i < 8 sets the radius of a pair and
    value i + 8 its angle. The cosine half of the pair goes to i, the sine half to i + 8.
    """
    blocks = values.reshape(-1, 2, LANES)
    for start in range(0, len(blocks), CHUNK):
        block = blocks[start : start + CHUNK]
        radius = np.sqrt(np.float32(-2) * _log(np.float32(1) - block[:, 0]))
        sine, cosine = _sincos(TWO_PI * block[:, 1])
        # Adding the mean 0 turns -0 into +0, as torch's code does.
        block[:, 0] = radius * cosine + np.float32(0)
        block[:, 1] = radius * sine + np.float32(0)


def _round(values: F64) -> F64:
    """Round to float32, in a double array: products of two such values are exact there."""
    return values.astype(np.float32).astype(np.float64)


def _fma(a: F64 | float, b: F64, c: F64 | float) -> F64:
    """float32 ``a * b + c`` with one rounding.

    The sum is rounded to double first, which would matter if it fell on the middle between two float32 values. For
    the 2**24 arguments that occur, it changes no result.
    """
    return _round(a * b + c)


def _log(x: F32) -> F32:
    """log256_ps for ``x`` in [2**-24, 1], multiply-adds fused as GCC does it."""
    mantissa, exponent = np.frexp(x)
    m, e = mantissa.astype(np.float64), exponent.astype(np.float64)
    small = m < SQRT_HALF
    e -= small
    m = np.where(small, m + m, m) - 1
    square = _round(m * m)
    y = _fma(LOG_P[0], m, LOG_P[1])
    for coefficient in LOG_P[2:]:
        y = _fma(y, m, coefficient)
    y = _fma(_round(y * m), square, _round(e * LN2_LOW))
    y = _fma(-0.5, square, y)
    return _fma(LN2_HIGH, e, _round(m + y)).astype(np.float32)


def _sincos(angle: F32) -> tuple[F32, F32]:
    """sincos256_ps for ``angle`` in [0, 2 pi], multiply-adds fused as GCC does it: sines, cosines."""
    x = angle.astype(np.float64)
    octant = (_round(x * FOUR_OVER_PI).astype(np.int32) + 1) & ~1
    octants = octant.astype(np.float64)
    for part in MINUS_QUARTER_PI:
        x = _fma(part, octants, x)
    square = _round(x * x)
    y = _fma(_fma(COS_P[0], square, COS_P[1]), square, COS_P[2])
    cosine = _round(_fma(_round(y * square), square, -0.5 * square) + 1)
    y = _fma(_fma(SIN_P[0], square, SIN_P[1]), square, SIN_P[2])
    sine = _fma(_round(y * square), x, x)
    swapped = octant & 2 != 0
    sines = np.where(swapped, cosine, sine)
    cosines = np.where(swapped, sine, cosine)
    np.negative(sines, out=sines, where=octant & 4 != 0)
    np.negative(cosines, out=cosines, where=(octant - 2) & 4 == 0)
    return sines.astype(np.float32), cosines.astype(np.float32)
