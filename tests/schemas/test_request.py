"""Requests as flat values: what is written is read again, what is wrong is told by name."""

import json
import math
import time
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cascadekit.schemas.errors import UsageError
from cascadekit.schemas.limits import MAX_IMAGE_SIDE, MAX_IMAGES, MAX_PICTURES, MAX_STEPS, MAX_WEIGHT
from cascadekit.schemas.request import Request, loras_of, parse_request, understood
from cascadekit.schemas.settings import RANGES, Sampler, Settings, parse_settings
from cascadekit.schemas.sizes import SizePolicy

SIZE = (256, 320)
texts = st.text(st.characters(exclude_categories=("Cs",)), max_size=20)
paths = st.text(st.characters(exclude_categories=("Cs", "Cc")), min_size=1, max_size=12)
weights = st.floats(-MAX_WEIGHT, MAX_WEIGHT)
shifts, shares = st.floats(0, MAX_WEIGHT), st.floats(0, 1)
ratios = st.lists(st.floats(0, 1), max_size=4).map(tuple)
refs = st.builds(dict, path=paths, sha256=st.none() | st.text("0123456789abcdef", min_size=64, max_size=64))
controls = st.builds(dict, path=paths, name=st.sampled_from(["canny", "edges"]), strength=weights)
loras = st.builds(dict, name=paths, strength=weights)
chosen = st.builds(
    Settings,
    width=st.integers(1, MAX_IMAGE_SIDE),
    height=st.integers(1, MAX_IMAGE_SIDE),
    prior_steps=st.integers(1, 99),
    prior_guidance=weights,
    decoder_steps=st.integers(1, 99),
    decoder_guidance=weights,
    size_policy=st.sampled_from(SizePolicy),
    sampler=st.sampled_from(Sampler),
    prior_shift=shifts,
    decoder_shift=shifts,
    rescale=shares,
    prior_timesteps=ratios,
    decoder_timesteps=ratios,
    strength=shares,
    weighted=st.booleans(),
    long_prompts=st.booleans(),
)
requests = st.builds(
    Request,
    prompt=texts,
    negative=texts,
    seed=st.integers(-(2**63), 2**64 - 1),
    index=st.integers(0, 9),
    batch=st.integers(10, 99),
    settings=chosen,
    image_prompts=st.lists(refs, max_size=3),
    init_image=st.none() | refs,
    mask=st.none() | refs,
    controls=st.lists(controls, max_size=2),
    loras=st.lists(loras, max_size=2),
)


@settings(max_examples=40, deadline=None)
@given(requests)
def test_what_is_written_as_json_is_read_again(request: Request) -> None:
    written = json.dumps(request.to_json(), allow_nan=False)
    assert parse_request(json.loads(written), SIZE) == request
    told = {**json.loads(written), "vqgan_scale": 0.43, "engine": "abacus", "created_by": "x"}
    assert parse_request(told, SIZE) == request


@settings(max_examples=40, deadline=None)
@given(requests)
def test_text_is_read_as_well(request: Request) -> None:
    """As a table has it: numbers as text, nothing where nothing is said, timesteps with commas."""
    cells = {
        name: ",".join(map(repr, value)) if name.endswith("timesteps") else str(value)
        for name, value in request.settings.to_json().items()
    }
    row = {"prompt": request.prompt, "seed": str(request.seed), **cells, "mask": "", "init_image": None, "loras": ""}
    assert parse_request(row, SIZE).settings == request.settings
    assert parse_request(row, SIZE) == Request(prompt=request.prompt, seed=request.seed, settings=request.settings)


def test_defaults_are_the_samplers_and_the_bundles() -> None:
    plain, gdf = (parse_request({"prompt": "x", "seed": 1, **more}, SIZE).settings for more in ({}, {"sampler": "gdf"}))
    assert plain == Settings(256, 320)
    assert gdf == Settings(256, 320, sampler=Sampler.GDF, prior_shift=2.0, decoder_guidance=1.1, rescale=0.7)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("canny=a.png", ("canny", "a.png", 1.0)),
        ("canny=a.png:0.8", ("canny", "a.png", 0.8)),
        ("canny=a=b.png:.5", ("canny", "a=b.png", 0.5)),
        ("edges=C:\\x.png:2", ("edges", "C:\\x.png", 2.0)),
        ("super_resolution=a:b.png", ("super_resolution", "a:b.png", 1.0)),
    ],
)
def test_controls_in_short(text: str, expected: tuple[str, str, float]) -> None:
    (control,) = parse_request({"prompt": "x", "seed": 0, "controls": text}, SIZE).controls
    assert (control.name, control.path, control.strength) == expected


def test_a_control_of_many_digits_takes_no_time() -> None:
    """Four times the digits took sixteen times as long, and a server was busy for hours with a megabyte of them."""
    start = time.process_time()
    (control,) = parse_request({"prompt": "x", "seed": 0, "controls": "canny=a:" + "1" * 50_000 + "x"}, SIZE).controls
    assert control.path.startswith("a:11")
    assert time.process_time() - start < 1


def test_several_pictures_in_a_cell() -> None:
    request = parse_request({"prompt": "x", "seed": 0, "image_prompts": "a.png;b c.png"}, SIZE)
    assert [each.path for each in request.image_prompts] == ["a.png", "b c.png"]


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"sampler": "euler"}, "sampler 'euler': expected ddpm-wuerstchen or gdf"),
        ({"steps": 3}, "steps: unknown"),
        ({"settings": {}}, "request: settings: unknown"),
        ({"prior_steps": "many"}, "prior_steps: "),
        ({"prior_steps": 2.5}, "prior_steps: "),
        ({"prior_guidance": math.nan}, "prior_guidance: "),
        ({"strength": "inf"}, "strength: "),
        ({"prior_timesteps": "1,half,0"}, "prior_timesteps"),
        ({"seed": -(2**63) - 1}, "seed: "),
        ({"seed": 2**64}, "seed: "),
        ({"seed": None}, "seed: "),
        ({"batch": 0}, "batch: "),
        ({"index": 3, "batch": 3}, "index 3 of a batch of 3"),
        ({"controls": ["canny"]}, "expected NAME=PICTURE"),
        ({"image_prompts": [{"file": "x"}]}, "image_prompts.0"),
        ({"prompt": 5}, "prompt: "),
        ({"sampler": ["gdf"]}, "sampler"),
        ({"image_prompts": 5}, "image_prompts"),
        ({"width": 10**400}, "width a number of hundreds of digits: expected 1 to 8192"),
        ({"width": "1" + "0" * 400}, "width a number of hundreds of digits: expected 1 to 8192"),
        ({"height": -64}, "height=-64: expected 1 to 8192"),
        ({"decoder_steps": MAX_STEPS + 1}, "decoder_steps=1001: expected 1 to 1000"),
        ({"prior_guidance": 10**400}, "prior_guidance: "),
        ({"prior_guidance": -1e30}, "prior_guidance=-1e+30: expected -1000 to 1000"),
        ({"rescale": 1.5, "strength": 2}, "rescale=1.5: expected 0 to 1; strength=2.0: expected 0 to 1"),
        ({"prior_timesteps": [1, 10**400]}, "prior_timesteps.1: "),
        ({"prior_timesteps": "1.5,0"}, "prior_timesteps=1.5: expected ratios from 0 to 1"),
        ({"decoder_timesteps": [0.5] * (MAX_STEPS + 2)}, "decoder_timesteps: expected at most 1001, found 1002"),
        ({"sampler": 10**5000}, "sampler a number of hundreds of digits: expected"),
        ({"batch": MAX_IMAGES + 1}, "batch: "),
        ({"prompt": "\ud800"}, "prompt: "),
        ({"negative": "a\udcff"}, "half of a surrogate pair at character 2"),
        ({"controls": [{"name": "canny", "path": "x", "strength": math.nan}]}, "controls.0.strength: "),
        ({"loras": [{"name": "x", "strength": 1e30}]}, "loras.0.strength: "),
        ({"image_prompts": ["x"] * (MAX_PICTURES + 1)}, "image_prompts: "),
        ({"x" * 100_000: 1}, "unknown"),
    ],
)
def test_what_is_wrong_is_named_in_one_line(wrong: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError) as error:
        parse_request({"prompt": "x", "seed": 0, **wrong}, SIZE)
    assert words in str(error.value)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 400


@pytest.mark.parametrize("name", sorted(RANGES))
def test_settings_made_in_python_have_the_same_ranges(name: str) -> None:
    for wrong in (math.nan, math.inf, -math.inf, 1e30, 10**400, "4", None, True):
        with pytest.raises(UsageError, match=f"{name}[ =].*: expected "):
            Settings(**{"width": 64, "height": 64, name: wrong})
        with pytest.raises(UsageError, match=f"{name}[ =].*: expected "):
            replace(Settings(64, 64), **{name: wrong})


def test_settings_at_the_ends_of_their_ranges() -> None:
    for end in (1, 2):
        given = {name: bounds[end] for name, bounds in RANGES.items()}
        assert Settings(**given) == parse_settings(given, SIZE)
    assert Settings(MAX_IMAGE_SIDE, 64, prior_guidance=np.float32(4)).prior_guidance == 4
    with pytest.raises(UsageError, match="prior_timesteps=nan"):
        Settings(64, 64, prior_timesteps=(1, math.nan, 0))


def test_loras_of_metadata_are_finite() -> None:
    with pytest.raises(UsageError, match=r"loras: 0\.strength"):
        loras_of({"loras": [{"name": "x", "strength": math.nan}]})


def test_of_odd_metadata_the_sound_part_is_understood() -> None:
    """Each field by itself, whatever JSON says; what is left out is named."""
    sound = {"prompt": "x", "index": 3, "batch": 4, "seed": 2**64 - 1, "width": 64, "vqgan_scale": 0.43, "key": "k"}
    odd = (
        '{"prior_guidance": NaN, "decoder_guidance": 1e999, "height": 1'
        + "0" * 400
        + ', "engine": "\\ud800", "controls": [[]], "loras": 5, "sampler": ["gdf"], "depth": {"a": 1}, "init_image": '
        + "[" * 900
        + "]" * 900
        + "}"
    )
    found, others = understood({**json.loads(odd), **sound})
    assert found == sound
    assert others == list(json.loads(odd))
    picture = {"init_image": {"path": "a"}, "prior_timesteps": [1, 0.5]}
    assert understood(picture) == ({"init_image": {"path": "a", "sha256": None}, "prior_timesteps": (1, 0.5)}, [])
