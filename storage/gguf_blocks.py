"""Packs float32 values into the blocks of GGUF files and unpacks them, in numpy.

Unpacked values equal those of `gguf.quants.dequantize` bit for bit. Q8_0, Q5_1, Q5_0 and Q4_0 are packed as gguf-py
does it, bit for bit. gguf-py cannot pack Q6_K, Q5_K and Q4_K: here each sub-block gets the scale (and minimum) with the
least squared error among a few candidates. Layouts: ggml-common.h of llama.cpp."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..schemas.block_types import BLOCK_TYPES

Array = NDArray[Any]
Floats = NDArray[np.float32]

SUPER = 256  # values of a K block
_IQ4 = np.array([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], np.float32)
_STEP = 1 << 17  # values packed at a time, so that the candidates' scratch space stays in a core's cache


def unpack(data: Array, dtype: str) -> Floats:
    """Return the float32 values of whole blocks, given as bytes, as a flat array."""
    kind = BLOCK_TYPES[dtype]
    with np.errstate(all="ignore"):
        return _UNPACK[dtype](data.reshape(-1, kind.nbytes)).reshape(-1)


def pack(values: Floats, dtype: str) -> Array:
    """Return float32 values, whole blocks of finite numbers, as the bytes of blocks in one of `WRITTEN`."""
    kind = BLOCK_TYPES[dtype]
    out = np.empty((values.size // kind.values, kind.nbytes), np.uint8)
    blocks, step = values.reshape(-1, kind.values), _STEP // kind.values
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        for start in range(0, len(out), step):
            out[start : start + step] = np.concatenate(_PACK[dtype](blocks[start : start + step]), axis=1)
    return out.reshape(-1)


def _half(data: Array) -> Floats:
    return np.ascontiguousarray(data).view("<f2").astype(np.float32)


def _bytes(values: Array) -> Array:
    """Numbers, a row for each block, as bytes of float16."""
    return values.astype("<f2").view(np.uint8)


def _nibbles(data: Array, run: int) -> Array:
    """The lower halves of `run` bytes, then their upper halves, then the next bytes."""
    runs = data.reshape(len(data), -1, 1, run) >> np.array([[0], [4]], np.uint8)
    return np.asarray((runs & 15).reshape(len(data), -1))


def _bit_planes(data: Array, run: int, width: int) -> Array:
    """Fields of `width` bits: the lowest of `run` bytes, then the next of the same bytes, then those of the next."""
    shifts = np.arange(0, 8, width, dtype=np.uint8)[:, None]
    fields = data.reshape(len(data), -1, 1, run) >> shifts
    fields &= (1 << width) - 1
    return np.asarray(fields.reshape(len(data), -1))


def _pack_nibbles(codes: Array, run: int) -> Array:
    pairs = codes.reshape(len(codes), -1, 2, run)
    return np.asarray((pairs[:, :, 0] | pairs[:, :, 1] << 4).reshape(len(codes), -1))


def _pack_planes(fields: Array, run: int, width: int) -> Array:
    planes = fields.reshape(len(fields), -1, 8 // width, run) << np.arange(0, 8, width, dtype=np.uint8)[:, None]
    return np.asarray(np.bitwise_or.reduce(planes, axis=2).reshape(len(fields), -1))


def _per_sub_block(scale: Floats, codes: Array) -> Floats:
    """Codes of 256 values times the scale of their sub-block."""
    return scale[:, :, None] * codes.reshape(len(codes), scale.shape[1], -1).astype(np.float32)


# Reading


def _unpack_q8_0(b: Array) -> Floats:
    return _half(b[:, :2]) * b[:, 2:].view(np.int8).astype(np.float32)


def _unpack_q4_0(b: Array) -> Floats:
    return _half(b[:, :2]) * (_nibbles(b[:, 2:], 16).astype(np.float32) - 8)


def _unpack_q4_1(b: Array) -> Floats:
    return _half(b[:, :2]) * _nibbles(b[:, 4:], 16).astype(np.float32) + _half(b[:, 2:4])


def _fifth_bits(data: Array) -> Array:
    return np.unpackbits(np.ascontiguousarray(data), axis=1, bitorder="little") << 4


def _unpack_q5_0(b: Array) -> Floats:
    codes = _nibbles(b[:, 6:], 16) | _fifth_bits(b[:, 2:6])
    return _half(b[:, :2]) * (codes.astype(np.float32) - 16)


def _unpack_q5_1(b: Array) -> Floats:
    codes = _nibbles(b[:, 8:], 16) | _fifth_bits(b[:, 4:8])
    return _half(b[:, :2]) * codes.astype(np.float32) + _half(b[:, 2:4])


def _unpack_iq4_nl(b: Array) -> Floats:
    return np.asarray(_half(b[:, :2]) * _IQ4[_nibbles(b[:, 2:], 16)])


def _unpack_iq4_xs(b: Array) -> Floats:
    high: Array = np.ascontiguousarray(b[:, 2:4]).view("<u2") >> np.arange(0, 16, 2, dtype=np.uint16) & 3
    low = np.stack([b[:, 4:8] & 15, b[:, 4:8] >> 4], axis=2).reshape(len(b), 8)
    scale = _half(b[:, :2]) * ((low | high.astype(np.uint8) << 4).astype(np.float32) - 32)
    return np.asarray(scale[:, :, None] * _IQ4[_nibbles(b[:, 8:], 16)].reshape(len(b), 8, 32))


def _unpack_q2_k(b: Array) -> Floats:
    scale = _half(b[:, 80:82]) * (b[:, :16] & 15).astype(np.float32)
    least = _half(b[:, 82:84]) * (b[:, :16] >> 4).astype(np.float32)
    return _per_sub_block(scale, _bit_planes(b[:, 16:80], 32, 2)) - least[:, :, None]


def _unpack_q3_k(b: Array) -> Floats:
    low, high = _nibbles(b[:, 96:104], 8), _bit_planes(b[:, 104:108], 4, 2)
    scale = _half(b[:, 108:110]) * ((low | high << 4).astype(np.float32) - 32)
    codes = _bit_planes(b[:, 32:96], 32, 2).astype(np.float32) - 4
    return _per_sub_block(scale, codes + 4 * _bit_planes(b[:, :32], 32, 1).astype(np.float32))


def _scales_and_minima(b: Array) -> tuple[Floats, Floats]:
    """The scale and the minimum of each of the 8 sub-blocks of a Q4_K or Q5_K block, 6 bits each in 12 bytes."""
    first, second, mixed = b[:, 4:8], b[:, 8:12], b[:, 12:16]
    scale = np.concatenate([first & 63, mixed & 15 | first >> 2 & 48], axis=1)
    least = np.concatenate([second & 63, mixed >> 4 | second >> 2 & 48], axis=1)
    return _half(b[:, :2]) * scale.astype(np.float32), _half(b[:, 2:4]) * least.astype(np.float32)


def _unpack_q4_k(b: Array) -> Floats:
    scale, least = _scales_and_minima(b)
    return _per_sub_block(scale, _nibbles(b[:, 16:], 32)) - least[:, :, None]


def _unpack_q5_k(b: Array) -> Floats:
    scale, least = _scales_and_minima(b)
    codes = _nibbles(b[:, 48:], 32) | _bit_planes(b[:, 16:48], 32, 1) << 4
    return _per_sub_block(scale, codes) - least[:, :, None]


def _unpack_q6_k(b: Array) -> Floats:
    scale = _half(b[:, 208:210]) * np.ascontiguousarray(b[:, 192:208]).view(np.int8).astype(np.float32)
    codes = _nibbles(b[:, :128], 64) | _bit_planes(b[:, 128:192], 32, 2) << 4
    return _per_sub_block(scale, codes.astype(np.float32) - 32)


_UNPACK: Mapping[str, Callable[[Array], Floats]] = {
    "Q4_0": _unpack_q4_0,
    "Q4_1": _unpack_q4_1,
    "Q5_0": _unpack_q5_0,
    "Q5_1": _unpack_q5_1,
    "Q8_0": _unpack_q8_0,
    "Q2_K": _unpack_q2_k,
    "Q3_K": _unpack_q3_k,
    "Q4_K": _unpack_q4_k,
    "Q5_K": _unpack_q5_k,
    "Q6_K": _unpack_q6_k,
    "IQ4_NL": _unpack_iq4_nl,
    "IQ4_XS": _unpack_iq4_xs,
}


# Writing


def _inverse(scale: Floats) -> Floats:
    return np.where(scale == 0, np.float32(0), 1 / scale)


def _pack_q8_0(x: Floats) -> list[Array]:
    scale = np.abs(x).max(axis=1, keepdims=True) / 127
    scaled = x * _inverse(scale)
    size = np.abs(scaled)
    codes = np.floor(size)
    codes += np.floor(2 * (size - codes))  # halves away from zero
    return [_bytes(scale), (np.sign(scaled) * codes).astype(np.int8).view(np.uint8)]


def _signed_codes(x: Floats, half: int) -> tuple[Floats, Array]:
    """The scale that makes the value of largest size -`half`, and codes from 0 to 2 `half` - 1."""
    largest: Floats = np.take_along_axis(x, np.abs(x).argmax(axis=1, keepdims=True), axis=1)
    scale: Floats = largest / np.float32(-half)
    codes = np.trunc(x * _inverse(scale) + np.float32(half + 0.5)).clip(0, 2 * half - 1)
    return scale, codes.astype(np.uint8)


def _pack_q4_0(x: Floats) -> list[Array]:
    scale, codes = _signed_codes(x, 8)
    return [_bytes(scale), _pack_nibbles(codes, 16)]


def _pack_q5_0(x: Floats) -> list[Array]:
    scale, codes = _signed_codes(x, 16)
    return [_bytes(scale), np.packbits(codes >> 4, axis=1, bitorder="little"), _pack_nibbles(codes & 15, 16)]


def _pack_q5_1(x: Floats) -> list[Array]:
    least = x.min(axis=1, keepdims=True)
    scale = (x.max(axis=1, keepdims=True) - least) / 31
    codes = np.trunc((x - least) * _inverse(scale) + np.float32(0.5)).clip(0, 31).astype(np.uint8)
    high = np.packbits(codes >> 4, axis=1, bitorder="little")
    return [_bytes(scale), _bytes(least), high, _pack_nibbles(codes & 15, 16)]


def _pack_q6_k(x: Floats) -> list[Array]:
    """16 sub-blocks of 16 values: code times an 8-bit scale times the block's scale."""
    parts = x.reshape(len(x), 16, 16)
    scales = _best_scales(parts, 32)
    largest = np.take_along_axis(scales, np.abs(scales).argmax(axis=1, keepdims=True), axis=1)
    unit = (largest / -128).astype(np.float16)
    wide = unit.astype(np.float32)
    small = np.rint(scales * _inverse(wide)).clip(-128, 127)
    codes = np.rint(parts * _inverse(wide * small)[:, :, None]).clip(-32, 31).astype(np.int8).reshape(len(x), SUPER)
    fields = (codes + 32).astype(np.uint8)
    low, high = _pack_nibbles(fields & 15, 64), _pack_planes(fields >> 4, 32, 2)
    return [low, high, small.astype(np.int8).view(np.uint8), _bytes(unit)]


def _best_scales(parts: Floats, half: int) -> Floats:
    """The scale of each sub-block with the least squared error among `_SIGNED` ways to stretch it."""
    largest = np.take_along_axis(parts, np.abs(parts).argmax(axis=2, keepdims=True), axis=2)
    best = np.zeros(parts.shape[:2], np.float32)
    gained = np.zeros_like(best)
    for stretch in _SIGNED:
        codes = np.rint(parts * _inverse(largest / -(half + np.float32(stretch))))
        np.clip(codes, -half, half - 1, out=codes)
        both, square = np.einsum("ijk,ijk->ij", parts, codes), np.einsum("ijk,ijk->ij", codes, codes)
        scale = both * _inverse(square)
        gain = scale * both  # by which the squared error is less than that of zeros
        better = gain > gained
        best[better], gained[better] = scale[better], gain[better]
    return best


_SIGNED = (-2.0, -1.0, -0.5, 0.0, 0.5, 1.0, 2.0)
_UNSIGNED = (-2.0, -1.5, -1.0, -0.5, 0.0, 0.5, 1.0)


def _pack_q4_k(x: Floats) -> list[Array]:
    head, codes = _scaled_codes(x, 15)
    return [*head, _pack_nibbles(codes, 32)]


def _pack_q5_k(x: Floats) -> list[Array]:
    head, codes = _scaled_codes(x, 31)
    return [*head, _pack_planes(codes >> 4, 32, 1), _pack_nibbles(codes & 15, 32)]


def _scaled_codes(x: Floats, top: int) -> tuple[list[Array], Array]:
    """The scales of Q4_K and Q5_K blocks as bytes, and codes up to `top`: 8 sub-blocks of 32 values, each with a scale
    and a minimum of 6 bits."""
    parts = x.reshape(len(x), 8, 32)
    scales, minima = _best_scales_and_minima(parts, top)
    units = [(each.max(axis=1, keepdims=True) / 63).astype(np.float16) for each in (scales, minima)]
    wide = [unit.astype(np.float32) for unit in units]
    small = [
        np.rint(each * _inverse(unit)).clip(0, 63).astype(np.uint8)
        for each, unit in zip((scales, minima), wide, strict=True)
    ]
    scale, least = wide[0] * small[0], wide[1] * small[1]
    codes = np.rint((parts + least[:, :, None]) * _inverse(scale)[:, :, None]).clip(0, top).astype(np.uint8)
    (s, t), (m, n) = (np.split(each, 2, axis=1) for each in small)
    packed = np.concatenate([s | t >> 4 << 6, m | n >> 4 << 6, t & 15 | (n & 15) << 4], axis=1)
    return [_bytes(units[0]), _bytes(units[1]), packed], codes.reshape(len(x), SUPER)


def _best_scales_and_minima(parts: Floats, top: int) -> tuple[Floats, Floats]:
    """The scale of each sub-block and the number subtracted from it, neither negative, with the least squared error
    among `_UNSIGNED` ways to stretch it."""
    least = np.minimum(parts.min(axis=2, keepdims=True), 0)
    span = parts.max(axis=2, keepdims=True) - least
    count = np.float32(parts.shape[2])
    total = parts.sum(axis=2)
    scales, minima = np.zeros_like(total), np.zeros_like(total)
    errors = np.full_like(total, np.inf)
    for stretch in _UNSIGNED:
        codes = np.rint((parts - least) * ((top + np.float32(stretch)) * _inverse(span)))
        np.clip(codes, 0, top, out=codes)
        first, square = codes.sum(axis=2), np.einsum("ijk,ijk->ij", codes, codes)
        both = np.einsum("ijk,ijk->ij", parts, codes)
        scale = (count * both - first * total) * _inverse(count * square - first * first)
        minimum = (scale * first - total) / count
        negative = minimum < 0  # the format subtracts: such a sub-block has none
        minimum[negative] = 0
        scale[negative] = (both * _inverse(square))[negative]
        np.maximum(scale, 0, out=scale)
        # The squared error of scale * code - minimum, less the squares of the values themselves.
        error = scale * (scale * square - 2 * (both + minimum * first)) + minimum * (count * minimum + 2 * total)
        better = error < errors
        scales[better], minima[better], errors[better] = scale[better], minimum[better], error[better]
    return scales, minima


_PACK: Mapping[str, Callable[[Floats], list[Array]]] = {
    "Q4_0": _pack_q4_0,
    "Q5_0": _pack_q5_0,
    "Q5_1": _pack_q5_1,
    "Q8_0": _pack_q8_0,
    "Q4_K": _pack_q4_k,
    "Q5_K": _pack_q5_k,
    "Q6_K": _pack_q6_k,
}
