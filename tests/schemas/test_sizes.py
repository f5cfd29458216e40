"""Latent sizes against the formulas of Stability's code and of diffusers."""

import math

import pytest

from cascadekit.schemas.errors import UsageError
from cascadekit.schemas.sizes import SizePolicy, latent_sizes


def test_exact_policy_gives_the_size_asked_for() -> None:
    for side in range(64, 2049, 8):
        sizes = latent_sizes(side, 1024)
        assert sizes.image == (side, 1024)
        assert sizes.prior == (math.ceil(side / 42.67), 24)
        assert sizes.decoder[0] % 2 == 0, side


@pytest.mark.parametrize(
    ("side", "prior", "decoder"), [(256, 6, 64), (1024, 24, 256), (1152, 27, 288), (2048, 48, 512)]
)
def test_diffusers_policy_at_multiples_of_128(side: int, prior: int, decoder: int) -> None:
    sizes = latent_sizes(side, side, SizePolicy.DIFFUSERS)
    assert (sizes.prior[0], sizes.decoder[0], sizes.image[0]) == (prior, decoder, side)


def test_diffusers_policy_where_another_size_comes_out() -> None:
    assert latent_sizes(1064, 1024, SizePolicy.DIFFUSERS).image == (1064, 1024)
    assert latent_sizes(1040, 1024, SizePolicy.DIFFUSERS).image == (1064, 1024)


def test_diffusers_policy_refuses_what_crashes_there() -> None:
    with pytest.raises(UsageError, match=r'832.*odd.*size_policy="exact"'):
        latent_sizes(832, 1024, SizePolicy.DIFFUSERS)


@pytest.mark.parametrize(("side", "nearest"), [(1001, 1000), (30, 64), (0, 64), (-8, 64), (1022, 1024)])
def test_sizes_that_cannot_be(side: int, nearest: int) -> None:
    with pytest.raises(UsageError, match=rf"height {side}: expected a multiple of 8.*nearest is {nearest}"):
        latent_sizes(side, 1024)
