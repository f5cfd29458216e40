"""The generator against torch itself, and against recorded hashes where torch is not installed."""

import hashlib
import os
import subprocess
import sys
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from cascadekit.runtime.sampling.noise import Noise
from cascadekit.runtime.sampling.torch_generator import TorchGenerator, _box_muller
from cascadekit.schemas.errors import UsageError

SEEDS = [0, 1, 42, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**32 + 5, 2**53 + 1, 2**63, 2**64 - 1, -1, -(2**63)]
UNIFORMS = 2**24
STATE_WORDS = 624
CRAFTED = 608  # whole blocks of 16 that a set state yields before it is renewed


@pytest.fixture(scope="session")
def torch() -> ModuleType:
    """torch, where it has the kernel that is followed."""
    import torch as module

    if module.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"):
        pytest.skip("torch takes another kernel on this CPU")
    return module


def torch_randn(torch: ModuleType, shape: tuple[int, ...], generator: Any) -> Any:
    return torch.randn(shape, generator=generator).numpy()


def same_bits(ours: Any, theirs: Any) -> bool:
    """Equal including the sign of zero."""
    assert ours.dtype == theirs.dtype == np.float32
    return bool(ours.shape == theirs.shape and ours.tobytes() == theirs.tobytes())


@pytest.mark.parametrize("seed", SEEDS)
def test_seeds(torch: ModuleType, seed: int) -> None:
    ours, theirs = TorchGenerator(seed), torch.Generator("cpu").manual_seed(seed)
    for shape in [(1, 16, 24, 24), (17,), (1, 4, 64, 64), (16,)]:
        assert same_bits(ours.randn(shape), torch_randn(torch, shape, theirs))


@pytest.mark.parametrize(
    "shape",
    [(16,), (4, 4), (17,), (31,), (32,), (33,), (1, 3, 7, 11), (2, 4, 256, 256)],
)
def test_shapes(torch: ModuleType, shape: tuple[int, ...]) -> None:
    ours, theirs = TorchGenerator(7), torch.Generator("cpu").manual_seed(7)
    for _ in range(3):
        assert same_bits(ours.randn(shape), torch_randn(torch, shape, theirs))


@pytest.mark.parametrize(
    ("shape", "rows"),
    [
        ((4, 4, 9, 7), [2]),
        ((5, 3, 5), [0, 4]),  # rows that share blocks of 16, and a rest of them at the end
        ((5, 3, 5), [3, 1, 3]),
        ((40, 1), [38, 0, 17]),
        ((7, 3), [6, 5]),
        ((1, 16, 24, 24), [0]),
        ((3, 4, 300, 300), [1]),
        ((3, 4, 300, 300), []),
    ],
)
def test_rows_alone(torch: ModuleType, shape: tuple[int, ...], rows: list[int]) -> None:
    ours, theirs = TorchGenerator(9), torch.Generator("cpu").manual_seed(9)
    for _ in range(3):
        assert same_bits(ours.randn_rows(shape, rows), torch_randn(torch, shape, theirs)[rows])
        assert same_bits(ours.randn((3, 7)), torch_randn(torch, (3, 7), theirs))


def test_rows_that_are_not_there() -> None:
    with pytest.raises(UsageError, match=r"rows \[2\]: expected rows of noise of shape \(2, 30\)"):
        TorchGenerator(0).randn_rows((2, 30), [2])


def test_mixed_draws_carry_the_state(torch: ModuleType) -> None:
    ours, theirs = TorchGenerator(2**40 + 3), torch.Generator("cpu").manual_seed(2**40 + 3)
    sizes = [*np.random.default_rng(0).integers(16, 60, 1500).tolist(), 623, 16, 624, 16, 625, 20001]
    for size in sizes:
        assert same_bits(ours.randn((size,)), torch_randn(torch, (size,), theirs))


@pytest.mark.parametrize("seed", [0, 2**63 + 12345])
def test_millions(torch: ModuleType, seed: int) -> None:
    shape = (4_000_003,)
    theirs = torch.Generator("cpu").manual_seed(seed)
    assert same_bits(TorchGenerator(seed).randn(shape), torch_randn(torch, shape, theirs))


def untempered(outputs: Any) -> Any:
    """State words from which MT19937 makes ``outputs``; undoes its four tempering steps, last one first."""
    word = np.uint32
    y = outputs ^ (outputs >> word(18))
    y ^= (y << word(15)) & word(0xEFC60000)
    x = y
    for _ in range(4):  # each round recovers seven more bits
        x = y ^ ((x << word(7)) & word(0x9D2C5680))
    y = x
    for _ in range(2):
        x = y ^ (x >> word(11))
    return x


def torch_normals(torch: ModuleType, uniforms: Any) -> Any:
    """Torch's normals from chosen 24-bit uniforms, by generators set to yield them; both (n, CRAFTED)."""
    generator = torch.Generator("cpu")
    state = generator.get_state().numpy().copy()
    state[8:12].view(np.int32)[0] = STATE_WORDS  # left
    state[16:24].view(np.uint64)[0] = 0  # next
    words = state[24 : 24 + 8 * STATE_WORDS].view(np.uint64)
    crafted, tensor = untempered(uniforms), torch.from_numpy(state)
    normals = np.empty(uniforms.shape, np.float32)
    for row, out in zip(crafted, torch.from_numpy(normals), strict=True):
        words[:CRAFTED] = row
        generator.set_state(tensor)
        out.normal_(generator=generator)
    return normals


@pytest.mark.parametrize("one_of", [4, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("walked", ["radius", "angle"])
def test_every_uniform(torch: ModuleType, walked: str, one_of: int) -> None:
    """All 2**24 arguments of the logarithm, then of sine and cosine, the other half of the pair held fixed.

    By default a quarter of them.

    Angle 0 leaves the radius as it is; the other way round 14506667 gives radius 2, which leaves sine and cosine
    exact. The rest of Box-Muller is one multiplication.
    """
    held, at = (0, 0) if walked == "radius" else (14506667, 1)
    per_part = 5000 * CRAFTED // 2
    for first in range(0, UNIFORMS, one_of * per_part):
        uniforms = np.full((5000 * CRAFTED // 16, 2, 8), held, np.uint32)
        uniforms[:, at] = (np.arange(first, first + per_part, dtype=np.uint32) % UNIFORMS).reshape(-1, 8)
        ours = (uniforms * 2.0**-24).astype(np.float32).reshape(-1)
        _box_muller(ours)
        assert same_bits(ours, torch_normals(torch, uniforms.reshape(-1, CRAFTED)).reshape(-1))


def test_kernel_without_avx2_is_close(torch: ModuleType) -> None:
    """The bound that the module states for torch's other kernel."""
    code = (
        "import sys, torch; g = torch.Generator('cpu').manual_seed(5);"
        "sys.stdout.buffer.write(torch.randn(1 << 20, generator=g).numpy().tobytes())"
    )
    env = {**os.environ, "ATEN_CPU_CAPABILITY": "default"}
    theirs = np.frombuffer(subprocess.check_output([sys.executable, "-c", code], env=env), np.float32)
    assert np.abs(TorchGenerator(5).randn((1 << 20,)) - theirs).max() < 3e-6


@pytest.mark.parametrize(
    ("shape", "digest"),
    [
        ((1, 16, 24, 24), "8f4666aec0cd7825"),
        ((1, 4, 250, 250), "1853df63a9921339"),
    ],
)
def test_recorded(shape: tuple[int, ...], digest: str) -> None:
    values = TorchGenerator(2024).randn(shape)
    assert hashlib.sha256(values.astype("<f4").tobytes()).hexdigest()[:16] == digest


def test_batch_from_one_generator(torch: ModuleType) -> None:
    theirs = torch.Generator("cpu").manual_seed(9)
    assert same_bits(Noise(9, 3).draw((3, 4, 5, 5)), torch_randn(torch, (3, 4, 5, 5), theirs))


@pytest.mark.parametrize("shape", [(3, 16, 6, 6), (3, 4, 2, 2), (1, 25), (3, 16)])
def test_batch_from_a_list(torch: ModuleType, shape: tuple[int, ...]) -> None:
    ours = Noise(list(range(shape[0])), shape[0])
    theirs = [torch.Generator("cpu").manual_seed(seed) for seed in range(shape[0])]
    for _ in range(2):
        expected = np.concatenate([torch_randn(torch, (1, *shape[1:]), one) for one in theirs])
        assert same_bits(ours.draw(shape), expected)


@pytest.mark.parametrize("count", [0, 1, 3])
def test_wrong_number_of_generators(count: int) -> None:
    with pytest.raises(UsageError, match=f"{count} seeds for 2 images; give one, or one for each"):
        Noise([0] * count, 2)


@pytest.mark.parametrize("seed", [2**64, -(2**63) - 1, 1.0, True, "0", None])
def test_bad_seeds(seed: Any) -> None:
    with pytest.raises(UsageError, match="seed"):
        TorchGenerator(seed)


def test_numpy_integers_are_seeds() -> None:
    assert same_bits(TorchGenerator(np.int64(-3)).randn((20,)), TorchGenerator(-3).randn((20,)))  # type: ignore[arg-type]


@pytest.mark.parametrize("shape", [(0,), (3, 5), (2, -9)])
def test_fewer_values_than_a_block(shape: tuple[int, ...]) -> None:
    with pytest.raises(UsageError, match="expected at least 16 values"):
        TorchGenerator(0).randn(shape)
