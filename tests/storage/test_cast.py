"""Casts against torch, bit for bit: every pattern of the 16-bit formats, the edges of the wide ones, random bits."""

import itertools
import struct

import numpy as np
import pytest

from cascadekit.schemas.casts import castable, target_dtype
from cascadekit.schemas.dtypes import FLOATS
from cascadekit.storage import cast
from cascadekit.storage.cast import Array, cast_block

torch = pytest.importorskip("torch")

TORCH = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64}
SIGNED = {2: torch.int16, 4: torch.int32, 8: torch.int64}
PAIRS = [pair for pair in itertools.product(FLOATS, FLOATS) if pair[0] != pair[1]]


def as_torch(patterns: Array, dtype: str) -> torch.Tensor:
    return torch.from_numpy(patterns.view(f"i{patterns.itemsize}").copy()).view(TORCH[dtype])


def bits_of(tensor: torch.Tensor) -> Array:
    size = tensor.element_size()
    return tensor.view(SIGNED[size]).numpy().view(f"<u{size}")


def edges(exponent_bits: int, mantissa_bits: int) -> Array:
    """For every sign and exponent, the mantissas at and around each power of two and each run of ones from the top:
    all ties of all targets, both their neighbours, and the first and last value of each binade."""
    corners = {0, *(1 << bit for bit in range(mantissa_bits))}
    corners |= {(1 << mantissa_bits) - (1 << bit) for bit in range(mantissa_bits)}
    corners |= {(3 << bit) & ((1 << mantissa_bits) - 1) for bit in range(mantissa_bits)}
    near = {corner + step for corner in corners for step in (-1, 0, 1)}
    mantissas = np.array(sorted(m for m in near if 0 <= m < 1 << mantissa_bits), np.uint64)
    exponents = np.arange(1 << exponent_bits, dtype=np.uint64) << np.uint64(mantissa_bits)
    positive = (exponents[:, None] | mantissas).ravel()
    sign = np.uint64(1 << (exponent_bits + mantissa_bits))
    return np.concatenate([positive, positive | sign])


def patterns(dtype: str) -> Array:
    rng = np.random.default_rng(2024)
    match dtype:
        case "F32":
            return np.concatenate([edges(8, 23).astype("<u4"), rng.integers(0, 1 << 32, 4_000_000, "<u4")])
        case "F64":
            anything = rng.integers(0, 1 << 64, 500_000, "<u8")
            # Nearly all random doubles overflow or vanish in the narrow formats; these lie within and around them.
            near_float32 = as_float64(rng.integers(0, 1 << 32, 1_500_000, "<u4")) + rng.integers(-3, 4, 1_500_000)
            return np.concatenate([edges(11, 52).astype("<u8"), anything, near_float32.astype("<u8")])
    return np.arange(1 << 16, dtype="<u2")


def as_float64(float32_patterns: Array) -> Array:
    with np.errstate(all="ignore"):
        return float32_patterns.view("<f4").astype("<f8").view("<i8")


@pytest.fixture(scope="module", params=PAIRS, ids=[f"{source}-{target}" for source, target in PAIRS])
def cast_pair(request: pytest.FixtureRequest) -> tuple[str, str, torch.Tensor, Array, int]:
    """Source and target dtype, the values, and what the cast makes of them: bits and overflow count."""
    source, target = request.param
    values = patterns(source)
    out, overflow = cast_block(values.tobytes(), source, target)
    return source, target, as_torch(values, source), out.view(f"<u{out.itemsize}"), overflow


def test_equals_torch(cast_pair: tuple[str, str, torch.Tensor, Array, int]) -> None:
    _, target, values, bits, overflow = cast_pair
    expected = values.to(TORCH[target])
    known = ~values.isnan().numpy()
    np.testing.assert_array_equal(bits[known], bits_of(expected)[known])
    assert overflow == int((expected.isinf() & values.isfinite()).sum())


def test_nan_stays_nan(cast_pair: tuple[str, str, torch.Tensor, Array, int]) -> None:
    """Sign, quiet bit and leading payload; what torch does too, except towards BF16, where it depends on layout."""
    _, target, values, bits, _ = cast_pair
    nan = values.isnan()
    ours = as_torch(bits, target)[nan]
    assert len(ours) > 100
    assert ours.isnan().all()
    assert torch.equal(ours.signbit(), values[nan].signbit())
    if target != "BF16":
        np.testing.assert_array_equal(bits[nan.numpy()], bits_of(values.to(TORCH[target])[nan]))


@pytest.mark.parametrize(
    ("source", "target", "pattern", "expected"),
    [
        ("F32", "BF16", 0x7F80_0001, 0x7FC0),  # the whole payload is cut off: must not become infinity
        ("F32", "BF16", 0xFFFF_FFFF, 0xFFFF),  # rounding would carry into the sign
        ("F32", "BF16", 0x7FA1_2345, 0x7FE1),
        ("F32", "F16", 0x7F80_0001, 0x7E00),
        ("F32", "F16", 0xFFC1_2345, 0xFE09),
        ("F16", "F32", 0x7C01, 0x7FC0_2000),
        ("BF16", "F32", 0x7F81, 0x7F81_0000),  # the one cast that leaves a signalling NaN as it is
        ("F16", "BF16", 0xFC08, 0xFFC1),
        ("F16", "BF16", 0x7FFF, 0x7FFF),
        ("BF16", "F16", 0x7FC1, 0x7E08),
    ],
)
def test_nan_patterns(source: str, target: str, pattern: int, expected: int) -> None:
    sizes = {2: "<H", 4: "<I"}
    size = 4 if source == "F32" else 2
    out, overflow = cast_block(struct.pack(sizes[size], pattern), source, target)
    assert (int(out.view(f"<u{out.itemsize}")[0]), overflow) == (expected, 0)


def test_values_worked_out_by_hand() -> None:
    def half(*values: float) -> list[float]:
        return cast_block(struct.pack(f"<{len(values)}f", *values), "F32", "F16")[0].tolist()

    def brain(*values: float) -> list[int]:
        return cast_block(struct.pack(f"<{len(values)}f", *values), "F32", "BF16")[0].tolist()

    assert half(65504, 65519.996, 65520, -65520) == [65504, 65504, np.inf, -np.inf]
    assert half(2**-24, 2**-25, 2**-25 * 1.000001, 1.5 * 2**-24) == [2**-24, 0, 2**-24, 2**-23]
    assert half(1 + 2**-11, 1 + 3 * 2**-11) == [1, 1 + 2**-9]  # ties go to the even neighbour
    assert brain(1 + 2**-8, 1 + 3 * 2**-8, -0.0, 3.4e38) == [0x3F80, 0x3F82, 0x8000, 0x7F80]
    one_bit_over = struct.pack("<d", 1 + 2**-8 + 2**-40)
    assert cast_block(one_bit_over, "F64", "BF16")[0].tolist() == [0x3F80]  # through float32, as torch does


def test_infinities_are_not_overflow() -> None:
    data = struct.pack("<5f", 1e6, -np.inf, np.inf, np.nan, -1e6)
    assert cast_block(data, "F32", "F16")[1] == 2
    assert cast_block(data, "F32", "BF16")[1] == 0
    assert cast_block(struct.pack("<2d", 1e300, np.inf), "F64", "F32")[1] == 1
    assert cast_block(struct.pack("<2d", 1e300, 1e6), "F64", "F16")[1] == 2


@pytest.mark.parametrize(("source", "target"), PAIRS)
def test_steps_do_not_show(monkeypatch: pytest.MonkeyPatch, source: str, target: str) -> None:
    values = np.random.default_rng(7).integers(0, 256, 8 * 101, np.uint8).tobytes()
    whole, overflow = cast_block(values, source, target)
    for step in (1, 3, 7, 100, 1000):
        monkeypatch.setattr(cast, "_CHUNK", step)
        parts, counted = cast_block(values, source, target)
        assert (parts.tobytes(), counted) == (whole.tobytes(), overflow)


@pytest.mark.parametrize(("source", "target"), PAIRS)
def test_any_alignment(source: str, target: str) -> None:
    values = np.random.default_rng(8).integers(0, 256, 8 * 33, np.uint8).tobytes()
    expected = cast_block(values, source, target)[0].tobytes()
    for shift in (1, 2, 3, 5):
        shifted = memoryview(bytes(shift) + values)[shift:]
        assert cast_block(shifted, source, target)[0].tobytes() == expected


@pytest.mark.parametrize(("source", "target"), [*itertools.product(FLOATS, FLOATS)])
def test_nothing_gives_nothing(source: str, target: str) -> None:
    out, overflow = cast_block(b"", source, target)
    assert (out.size, overflow) == (0, 0)


def test_same_dtype_keeps_every_bit() -> None:
    data = struct.pack("<3I", 0x7F80_0001, 0xFFFF_FFFF, 1)
    out, overflow = cast_block(data, "F32", "F32")
    assert (out.tobytes(), overflow) == (data, 0)


def test_target_dtype() -> None:
    assert target_dtype("F32", "BF16") == "BF16"
    assert target_dtype("BF16", "F16") == "F16"
    assert target_dtype("F8_E4M3", "F16") == "F16"
    assert [target_dtype(whole, "F16") for whole in ("I64", "U8", "BOOL")] == ["I64", "U8", "BOOL"]
    assert target_dtype("F32", None) == "F32"
    assert castable("F32", "F16")
    assert castable("F8_E4M3", "F16")
    assert not castable("F16", "F8_E4M3")
    assert not castable("F4", "F16")
    assert not castable("F32", "I64")
