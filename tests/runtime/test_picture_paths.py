"""A path works wherever a PIL image does, and gives the same."""

from pathlib import Path

import numpy as np
from PIL import Image

from cascadekit import Cascade
from cascadekit.runtime.sampling.controlnets import ControlPicture
from helpers.whole import Whole, picture

SIZE = {"height": 64, "width": 64}


def test_paths_and_images_give_the_same(whole: Whole, tmp_path: Path) -> None:
    image, mask = picture(64, 64), Image.new("L", (64, 64), 0)
    mask.paste(255, (0, 0, 32, 64))
    image.save(tmp_path / "picture.png")
    mask.save(tmp_path / "mask.png")
    path, mask_path = tmp_path / "picture.png", str(tmp_path / "mask.png")
    with Cascade.open(whole.bundle, threads=1) as cascade:
        assert np.array_equal(cascade.encode_images([path]), cascade.encode_images([image]))
        assert np.array_equal(cascade.encode_picture(path, **SIZE), cascade.encode_picture(image, **SIZE))
        assert np.array_equal(cascade.encode_details(path, **SIZE), cascade.encode_details(image, **SIZE))
        pairs = [
            cascade.generate(
                "x",
                seed=0,
                prior_steps=2,
                decoder_steps=1,
                init_image=given,
                mask=given_mask,
                image_prompts=[given],
                controls=[ControlPicture("edges", given)],
                **SIZE,
            ).images[0]
            for given, given_mask in ((image, mask), (path, mask_path))
        ]
    assert pairs[0].tobytes() == pairs[1].tobytes()


def test_images_of_other_modes_are_converted_as_files_are(whole: Whole, tmp_path: Path) -> None:
    image = picture(64, 64).convert("RGBA")
    image.putalpha(100)
    image.save(tmp_path / "picture.png")
    with Cascade.open(whole.bundle, threads=1) as cascade:
        assert np.array_equal(cascade.encode_images([image]), cascade.encode_images([tmp_path / "picture.png"]))
