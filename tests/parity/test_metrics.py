"""Every figure of a comparison against its formula in numpy, torch or scikit-image, on random and on extreme inputs."""

import math
import tracemalloc

import ml_dtypes
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from cascadekit.parity.compare import compare, relative_l2
from cascadekit.parity.image_metrics import psnr, ssim
from cascadekit.parity.value_counts import HISTOGRAM_EDGES, ulp_distance
from cascadekit.schemas.errors import ParityError
from cascadekit.schemas.precision import Precision
from cascadekit.schemas.report import ValueCountEntry

RNG = np.random.default_rng(0)
NUMPY = {Precision.FP16: np.float16, Precision.BF16: ml_dtypes.bfloat16, Precision.FP32: np.float32}


def pair(shape: tuple[int, ...], scale: float, error: float, dtype: type = np.float32) -> tuple[NDArray, NDArray]:
    reference = RNG.standard_normal(shape) * scale
    return (reference * (1 + error * RNG.standard_normal(shape))).astype(dtype), reference.astype(dtype)


def counted(count: int, *first: int) -> ValueCountEntry:
    return ValueCountEntry(count=count, first=first)


@pytest.mark.parametrize("scale", [1e-44, 1e-30, 1.0, 1e30])  # the first: subnormals of float32
def test_errors_are_numpys_and_torchs(scale: float) -> None:
    found, reference = pair((3, 5, 201), scale, 1e-3)
    reference.flat[::17] = 0
    found.flat[::34] = 0
    c = compare("x", found, reference, 1.0)
    x, r = found.astype(np.float64), reference.astype(np.float64)
    error = np.abs(x - r)
    relative = error[r != 0] / np.abs(r[r != 0])
    assert c.max_abs == error.max()
    assert c.mean_abs == pytest.approx(error.mean())
    assert c.p999_abs == pytest.approx(np.percentile(error, 99.9))
    assert c.max_rel == relative.max()
    assert c.mean_rel == pytest.approx(relative.mean())
    assert c.p999_rel == pytest.approx(np.percentile(relative, 99.9))
    assert c.off_zero == np.count_nonzero(x[r == 0]) > 0
    tx, tr = torch.from_numpy(found).double(), torch.from_numpy(reference).double()
    assert c.relative_l2 == c.needed == pytest.approx(float(torch.dist(tx, tr) / tr.norm()))
    assert c.cosine == pytest.approx(float(torch.cosine_similarity(tx.flatten(), tr.flatten(), dim=0, eps=0)))
    assert c.snr_db == pytest.approx(10 * np.log10(np.sum(r * r) / np.sum(error * error)))
    assert c.reference_rms == pytest.approx(np.sqrt(np.mean(r * r)))
    assert (c.reference_max, c.found_max) == (np.abs(r).max(), np.abs(x).max())
    assert c.worst == np.unravel_index(error.argmax(), error.shape)
    assert relative_l2(found, reference) == pytest.approx(c.relative_l2)


def test_arrays_of_unlike_sizes_and_signs() -> None:
    """The ends of float32, subnormal numbers included."""
    tiny, huge = np.full(4, 1e-45, np.float32), np.full(4, 3e38, np.float32)
    assert compare("x", tiny, huge, 2.0).relative_l2 == 1
    assert compare("x", huge, tiny, 2.0).relative_l2 == pytest.approx(float(huge[0]) / float(tiny[0]))
    assert compare("x", huge, tiny, 2.0).cosine == pytest.approx(1)
    assert compare("x", -tiny, huge, 2.0).cosine == pytest.approx(-1)
    opposite = compare("x", -huge, huge, 3.0)
    assert (opposite.relative_l2, opposite.max_abs) == (2, 2 * float(huge[0]))


@pytest.mark.parametrize("count", [1, 2, 999, 1000, 1001, 5003])
def test_percentiles_of_few_and_of_many_values(count: int) -> None:
    found, reference = RNG.random(count), np.ones(count)
    expected = np.percentile(np.abs(found - reference), 99.9)
    assert compare("x", found, reference, 1.0).p999_abs == pytest.approx(expected, rel=1e-12)


def test_special_values_are_counted_and_placed() -> None:
    found, reference = pair((4, 5, 6), 1.0, 1e-3)
    found[1, 2, 3] = found[3, 0, 0] = np.nan
    found[1, 2, 4] += 0.5  # the worst, just after one that is left out
    found[2, 4, 5] = np.inf
    found[0, 1, 2] = found[3, 3, 3] = found[3, 4, 4] = -np.inf
    found[2, 0, 1], found[2, 0, 2] = -71304, 65504
    reference[2, 0, 1:3] = found[2, 0, 1:3]
    reference[3, 4, 5] = np.nan
    c = compare("x", found, reference, 1.0)
    assert c.nan == counted(2, 1, 2, 3)
    assert c.positive_infinity == counted(1, 2, 4, 5)
    assert c.negative_infinity == counted(3, 0, 1, 2)
    assert c.beyond_fp16 == counted(1, 2, 0, 1)
    assert c.reference_nonfinite == counted(1, 3, 4, 5)
    assert c.nonfinite == 6
    assert c.failures == ("6 values are NaN or infinite", "1 values of the reference are NaN or infinite")
    finite = np.isfinite(found) & np.isfinite(reference)
    x, r = found[finite].astype(np.float64), reference[finite].astype(np.float64)
    assert c.relative_l2 == pytest.approx(np.linalg.norm(x - r) / np.linalg.norm(r))
    assert c.p999_abs == pytest.approx(np.percentile(np.abs(x - r), 99.9))
    assert c.worst == np.unravel_index(np.where(finite, np.abs(found - reference), -1).argmax(), found.shape)
    assert relative_l2(found, reference) == math.inf


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_nothing_but_special_values(bad: float) -> None:
    c = compare("x", np.full(5, bad, np.float32), RNG.random(5, np.float32), 1.0)
    assert not c
    assert (c.nonfinite, c.max_abs, c.worst, sum(c.histogram.counts)) == (5, 0, None, 0)


def test_constant_and_empty() -> None:
    reference = RNG.standard_normal(8)
    assert compare("x", np.zeros(8), reference, 2.0).failures == ("the output is constant",)
    assert not compare("x", np.ones(8), np.ones(8), 0.0).constant
    assert compare("x", reference, np.ones(8), 9.0)
    assert not compare("x", np.ones(1), np.full(1, 2.0), 9.0).constant
    empty = compare("x", np.zeros((0, 3)), np.zeros((0, 3)), 0.0, Precision.BF16)
    assert empty
    assert (empty.max_abs, empty.p999_rel, empty.ulp_max, empty.ulp_mean, empty.snr_db) == (0, 0, 0, 0, math.inf)
    zeros = compare("x", np.ones(3), np.zeros(3), 1.0)
    assert (zeros.relative_l2, zeros.snr_db, zeros.off_zero, zeros.max_rel) == (math.inf, -math.inf, 3, 0)
    with pytest.raises(ParityError, match=r"expected shape \[3\] as the reference, found \[4\]"):
        compare("x", np.ones(4), np.ones(3), 1.0)


@pytest.mark.parametrize("precision", list(Precision))
def test_ulp_distance_counts_neighbours(precision: Precision) -> None:
    """Against a walk from value to value with nextafter, over zero, subnormals and the step to infinity."""
    dtype = NUMPY[precision]
    largest = {Precision.FP16: 65440, Precision.BF16: 3.3e38, Precision.FP32: 3.4028226e38}[precision]
    start = np.array([-1e-45, 0.0, 1.0, 0.1, -2.0, 6e-8, -65000, largest], np.float32).astype(dtype)
    values = start
    for steps in range(1, 20):
        with np.errstate(over="ignore"):
            values = np.nextafter(values, dtype(np.inf))
        x, r = values.astype(np.float64), start.astype(np.float64)
        finite = np.isfinite(x)
        assert set(ulp_distance(x[finite], r[finite], precision).tolist()) == {steps}
        assert set(ulp_distance(r[finite], x[finite], precision).tolist()) == {steps}


def test_ulp_distance_of_all_half_values() -> None:
    """Every finite fp16 and bf16 value, sorted: neighbours are 1 apart, but for the two zeros, which are one."""
    for precision, dtype in ((Precision.FP16, np.float16), (Precision.BF16, ml_dtypes.bfloat16)):
        with np.errstate(invalid="ignore"):  # signalling NaNs
            values = np.arange(1 << 16, dtype=np.uint16).view(dtype).astype(np.float64)
        values = np.sort(values[np.isfinite(values)])
        steps = ulp_distance(values[1:], values[:-1], precision)
        assert np.count_nonzero(steps != 1) == 1
        assert steps.sum() == values.size - 2
        noisy = values[:-1] + np.diff(values) * 0.49  # rounds back
        assert not ulp_distance(noisy, values[:-1], precision).any()


@pytest.mark.parametrize("precision", [Precision.FP16, Precision.BF16])
def test_ulp_distance_rounds_as_torch(precision: Precision) -> None:
    """Ties to even too: of values half way between two, and of random ones."""
    step = {Precision.FP16: 1 << 13, Precision.BF16: 1 << 16}[precision]  # of float32's patterns
    bits = np.arange(0x3F80_0000, 0x3F80_0000 + 40 * step, step // 2, dtype=np.uint32)
    values = np.concatenate([bits.view(np.float32), RNG.standard_normal(200, dtype=np.float32)])
    dtype = {Precision.FP16: torch.float16, Precision.BF16: torch.bfloat16}[precision]
    rounded = torch.from_numpy(values).to(dtype).double().numpy()
    assert not ulp_distance(values.astype(np.float64), rounded, precision).any()


def test_ulp_in_a_comparison() -> None:
    found, reference = pair((50,), 1.0, 1e-2)
    bits = [a.astype(ml_dtypes.bfloat16).view(np.int16).astype(int) for a in (found, reference)]
    distance = np.abs(np.subtract(*bits))  # of one sign, bits count places
    c = compare("x", found, reference, 1.0, Precision.BF16)
    assert (c.ulp_max, c.ulp_mean) == (distance.max(), pytest.approx(distance.mean()))
    assert compare("x", np.full(1, 1e30), np.full(1, 65504.0), 1e99, Precision.FP16).ulp_max == 1  # infinity is next
    assert compare("x", found, reference, 1.0).ulp_max is None


def test_histogram_is_numpys() -> None:
    found, reference = pair((3000,), 20.0, 1e-4)
    found[:7] = reference[:7]
    found[7], found[8] = reference[7] + 1e7, reference[8]
    reference = reference.astype(np.float64)
    reference[8] += 1e-14
    c = compare("x", found, reference, 1.0)
    error = np.abs(found - reference) / np.sqrt(np.mean(reference**2))
    counts, _ = np.histogram(np.log10(error[error > 0]), HISTOGRAM_EDGES)
    assert c.histogram.counts == tuple(counts)
    outside = (c.histogram.exact, c.histogram.below, c.histogram.above)
    assert outside == (np.count_nonzero(error == 0), np.count_nonzero((error < 1e-12) & (error > 0)), 1)
    assert sum(c.histogram.counts) + sum(outside) == 3000


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float64])
def test_any_float_type_and_any_strides(dtype: type) -> None:
    found, reference = pair((6, 7, 5), 1.0, 1e-2, dtype)
    turned = compare("x", found.transpose(2, 0, 1)[::2], reference.transpose(2, 0, 1)[::2], 1.0)
    x, r = (a.astype(np.float64).transpose(2, 0, 1)[::2] for a in (found, reference))
    assert turned.relative_l2 == pytest.approx(np.linalg.norm(x - r) / np.linalg.norm(r))
    assert turned.worst == np.unravel_index(np.abs(x - r).argmax(), x.shape)


def test_it_prints_the_tolerance_it_needs() -> None:
    found, reference = pair((4, 4), 1.0, 1e-3)
    c = compare("prior: noise_pred", found, reference, 1e-6)
    assert f"prior: noise_pred [4, 4]: needs a tolerance of {c.relative_l2:.1e}, has 1.0e-06" in str(c)
    assert compare("x", found, reference, c.needed)
    assert not compare("x", found, reference, np.nextafter(c.needed, 0))


def test_a_large_tensor_takes_eleven_times_its_size_at_most() -> None:
    reference = RNG.standard_normal((4, 16, 256, 256), dtype=np.float32)
    found = reference + np.float32(1e-4)
    tracemalloc.start()
    compare("x", found, reference, 1.0, Precision.FP16)
    compare("x", found.transpose(0, 2, 3, 1), reference.transpose(0, 2, 3, 1), 1.0)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 11 * reference.nbytes


@pytest.mark.parametrize("size", [(11, 11), (11, 40), (32, 32), (67, 101), (128, 96)])
def test_images_are_compared_as_by_scikit_image(size: tuple[int, int]) -> None:
    reference = RNG.random((2, 3, *size), dtype=np.float32) ** 2
    found = np.clip(reference + RNG.standard_normal(reference.shape, dtype=np.float32) * 0.1, 0, 1)
    pairs = zip(found.reshape(-1, *size), reference.reshape(-1, *size), strict=True)
    expected = [
        structural_similarity(
            x.astype(float),
            r.astype(float),
            data_range=1.0,
            gaussian_weights=True,
            sigma=1.5,
            use_sample_covariance=False,
        )
        for x, r in pairs
    ]
    assert ssim(found, reference) == pytest.approx(np.mean(expected), abs=1e-9)
    oracle = peak_signal_noise_ratio(reference.astype(float), found.astype(float), data_range=1)
    assert psnr(found, reference) == pytest.approx(oracle)
    assert ssim(reference, reference) == 1
    assert psnr(reference, reference) == math.inf
    assert ssim(np.zeros_like(reference), np.zeros_like(reference)) == 1


def test_images_too_small_or_unlike_are_refused() -> None:
    with pytest.raises(ParityError, match="11x11 and more"):
        ssim(np.zeros((3, 10, 20)), np.zeros((3, 10, 20)))
    with pytest.raises(ParityError, match="one shape"):
        ssim(np.zeros((3, 20, 20)), np.zeros((3, 20, 21)))
