"""Settings as flat values and as the sampling of each stage; unknown names are answered with the nearest ones."""

from dataclasses import fields

import pytest

from cascadekit.schemas.errors import UsageError
from cascadekit.schemas.settings import (
    DECODER_SAMPLING,
    PRIOR_SAMPLING,
    SETTINGS,
    Sampling,
    SamplingOptions,
    Settings,
    SettingsOptions,
    parse_settings,
)


def test_each_stage_has_its_sampling() -> None:
    settings = Settings(64, 64, prior_steps=3, decoder_guidance=2.0, sampler="gdf", decoder_shift=3.0, rescale=0.5)
    assert settings.prior == Sampling(3, 4.0, "gdf", 1.0, 0.5)
    assert settings.decoder == Sampling(10, 2.0, "gdf", 3.0, 0.5)
    assert (Settings(64, 64).prior, Settings(64, 64).decoder) == (PRIOR_SAMPLING, DECODER_SAMPLING)


def test_flat_values_are_read_as_they_are_written() -> None:
    settings = Settings(64, 128, prior_timesteps=(1.0, 0.5, 0.0), weighted=True)
    assert parse_settings(settings.to_json(), (8, 8)) == settings


def test_the_keywords_are_the_fields() -> None:
    assert SettingsOptions.__annotations__.keys() == SETTINGS
    assert SamplingOptions.__annotations__.keys() == {field.name for field in fields(Sampling)}


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("steps", "prior_steps or decoder_steps"),
        ("num_inference_steps", "prior_steps or decoder_steps"),
        ("guidance_scale", "prior_guidance or decoder_guidance"),
        ("wdith", "width"),
        ("size", "width or height"),
    ],
)
def test_unknown_settings(name: str, meant: str) -> None:
    with pytest.raises(UsageError, match=f"{name}: unknown, did you mean {meant}"):
        parse_settings({name: 3}, (64, 64))


@pytest.mark.parametrize(
    ("name", "meant"), [("num_inference_steps", "steps"), ("guidance_scale", "guidance"), ("prior_steps", "steps")]
)
def test_unknown_fields_of_a_sampling(name: str, meant: str) -> None:
    with pytest.raises(UsageError, match=f"{name}: unknown, did you mean {meant}"):
        PRIOR_SAMPLING.changed(**{name: 3})  # type: ignore[arg-type]


def test_a_name_like_no_other() -> None:
    with pytest.raises(UsageError, match=r"zzzz: unknown$"):
        parse_settings({"zzzz": 3}, (64, 64))
