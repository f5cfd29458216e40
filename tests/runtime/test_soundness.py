"""An output that is no image is an error that names stage, step and image, instead of a black PNG."""

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from cascadekit import Cascade, export
from cascadekit.cli import main
from cascadekit.runtime.sampling.controlnets import ControlPicture
from cascadekit.schemas.errors import UnsoundError, UsageError
from cascadekit.schemas.precision import Precision
from cascadekit.schemas.stages import Stage
from helpers.whole import Whole, picture

SMALL = {"width": 64, "height": 64, "prior_steps": 3, "decoder_steps": 2, "seed": 0}


@pytest.fixture(scope="module")
def fp16(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle in fp16 of the tiny cascade, whose prior's last stream goes beyond 65504."""
    root = tmp_path_factory.mktemp("fp16")
    shutil.copytree(tiny / "model", root / "model")
    path = root / "model" / "prior" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    for name in tensors:
        if name.startswith("up_blocks.1") and (".channelwise.4." in name or ".to_out.0." in name):
            tensors[name] *= 1e5
    save_file(tensors, path, {"format": "pt"})
    export(
        root / "model",
        root / "bundle",
        precisions={Stage.PRIOR: Precision.FP16},
        storage=Precision.FP32,
        fp16_safe="off",
    )
    return root / "bundle"


def test_an_overflow_of_the_prior_is_an_error_not_a_black_image(fp16: Path, tmp_path: Path) -> None:
    small = ["--size", "64x64", "--prior-steps", "2", "--decoder-steps", "1", "--engine", "onnxruntime"]
    called = ["generate", str(fp16), "x", "-o", str(tmp_path / "x.png"), *small]
    done = CliRunner().invoke(main, called)
    assert done.exit_code == 1
    assert "prior, step 1 of 2: gave NaN or infinity" in done.output
    assert "--precision prior=fp16 --fp16-safe auto, or in place of fp16 prior=bf16 or prior=fp32" in done.output
    assert not (tmp_path / "x.png").exists()


def test_a_batch_says_which_lines_failed(fp16: Path, tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("a cat\n")
    small = ["--size", "64x64", "--prior-steps", "2", "--decoder-steps", "1", "--engine", "onnxruntime"]
    done = CliRunner().invoke(
        main, ["generate", str(fp16), "--prompts", str(tmp_path / "p.txt"), "-o", str(tmp_path / "o"), *small]
    )
    assert done.exit_code == 1
    assert "failed: line 1: prior, step 1 of 2: gave NaN or infinity" in done.output
    assert not list((tmp_path / "o").glob("*.png"))


Fake = Callable[[Mapping[str, Any]], dict[str, Any]]


def broken(real: Any, at: int, row: int, value: float, port: str) -> Fake:
    """The stage, whose pass number `at` gives `value` in one place of a row."""
    passes = iter(range(1, 1000))

    def run(inputs: Mapping[str, Any]) -> dict[str, Any]:
        outputs = {name: array.copy() for name, array in real(inputs).items()}
        if next(passes) == at:
            outputs[port].reshape(len(outputs[port]), -1)[row, -1] = value
        return outputs

    return run


@pytest.mark.parametrize(("row", "image", "value"), [(2, 3, np.nan), (3, 1, np.inf), (4, 2, -np.inf)])
def test_the_image_and_the_step_are_named(
    whole: Whole, monkeypatch: pytest.MonkeyPatch, row: int, image: int, value: float
) -> None:
    """With guidance a batch of three has six rows: three with the prompts, then three without."""
    cascade = Cascade.open(whole.bundle, threads=1, stages={Stage.PRIOR: whole.lite})
    with cascade, cascade.engine.load(Stage.DECODER) as real:
        fake = broken(real, 2, row, value, "noise_pred")
        monkeypatch.setattr(cascade.engine, "load", _loading(cascade, Stage.DECODER, fake))
        with pytest.raises(UnsoundError, match=rf"^decoder, step 2 of 2: .*image {image} of 3; ") as caught:
            cascade.generate(["a", "b", "c"], decoder_guidance=2.0, **SMALL)
    assert caught.value.images == (image - 1,)
    assert "validate --hash" in str(caught.value)  # in fp32 nothing overflows: it is damage, or a bug


class _Fake:
    def __init__(self, run: Fake) -> None:
        self.run = run

    def __call__(self, inputs: Any) -> Any:
        return self.run(inputs)

    def bind(self, constants: Any) -> Any:
        return lambda inputs: self.run({**constants, **inputs})

    def keep(self, inputs: Any, read: Any) -> Any:
        return self.run(inputs)

    def close(self) -> None: ...


def _loading(cascade: Cascade, stage: Stage, run: Fake) -> Callable[..., Any]:
    load = cascade.engine.load
    return lambda asked, graph="model": _Fake(run) if asked is stage else load(asked, graph)


def always(value: float, **shapes: tuple[int, ...]) -> Fake:
    return lambda inputs: {name: np.full(shape, value, np.float32) for name, shape in shapes.items()}


STAGES = {  # what a stage gives, and how it is reached
    Stage.TEXT_ENCODER: ({"prompt_embeds": (2, 77, 1280), "pooled": (2, 1, 1280)}, lambda c: c.encode_prompt("x")),
    Stage.IMAGE_ENCODER: ({"image_embeds": (1, 768)}, lambda c: c.encode_images([picture(64, 64)])),
    Stage.EFFNET_ENCODER: (
        {"effnet": (1, 16, 2, 2)},
        lambda c: c.encode_picture(picture(64, 64), height=64, width=64),
    ),
    Stage.PREVIEWER: ({"images": (1, 3, 16, 16)}, lambda c: c.preview(Stage.PRIOR, np.zeros((1, 16, 2, 2), "f4"))),
    Stage.VQGAN: ({"images": (1, 3, 64, 64)}, lambda c: c.pixels(np.zeros((1, 4, 16, 16), "f4"))),
}


@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_is_looked_at(whole: Whole, monkeypatch: pytest.MonkeyPatch, stage: Stage) -> None:
    shapes, call = STAGES[stage]
    with Cascade.open(whole.bundle, threads=1) as cascade:
        monkeypatch.setattr(cascade.engine, "load", _loading(cascade, stage, always(np.nan, **shapes)))
        with pytest.raises(UnsoundError, match=f"^{stage}, .*NaN or infinity; "):
            call(cascade)


def test_a_controlnet_is_looked_at(whole: Whole, monkeypatch: pytest.MonkeyPatch) -> None:
    with Cascade.open(whole.bundle, threads=1) as cascade:
        ports = cascade.manifest.stages[Stage.CONTROLNET_CANNY].outputs
        shapes = {port.name: (1, port.dims[1], 2, 2) for port in ports}
        monkeypatch.setattr(cascade.engine, "load", _loading(cascade, Stage.CONTROLNET_CANNY, always(np.inf, **shapes)))
        with pytest.raises(UnsoundError, match=r"^controlnet/canny, .*NaN or infinity"):
            cascade.residuals([ControlPicture("edges", picture(64, 64))], height=64, width=64)


@pytest.mark.parametrize("value", [0.0, 0.5])
def test_an_image_of_one_value_is_none(whole: Whole, monkeypatch: pytest.MonkeyPatch, value: float) -> None:
    """A VQGAN in fp16 clamps NaN to 0: black."""
    with Cascade.open(whole.bundle, threads=1, stages={Stage.PRIOR: whole.lite}) as cascade:
        fake = always(value, images=(1, 3, 64, 64))
        monkeypatch.setattr(cascade.engine, "load", _loading(cascade, Stage.VQGAN, fake))
        with pytest.raises(UnsoundError, match=rf"^vqgan, image 1 of 2: gave {value:g} in every place; "):
            cascade.generate(["a", "b"], **SMALL)


def test_latents_of_ones_own_are_looked_at(whole: Whole) -> None:
    with Cascade.open(whole.bundle, threads=1, stages={Stage.PRIOR: whole.lite}) as cascade:
        embeds = cascade.encode_prompt("x")
        bad = np.full((1, 16, 2, 2), np.nan, np.float32)
        with pytest.raises(UsageError, match="the prior's latents: expected finite numbers"):
            list(cascade.prior(embeds, height=64, width=64, latents=bad, steps=2))
        with pytest.raises(UsageError, match="the decoder's effnet: expected finite numbers"):
            list(cascade.decode(bad, embeds, height=64, width=64, steps=2))


def test_what_may_be_all_one_value(tiny: Path) -> None:
    """A ControlNet's zeros, say."""
    with Cascade.open(tiny / "bundle", threads=1) as cascade:
        require_sound = cascade.networks.require_sound
        require_sound(Stage.CONTROLNET_CANNY, np.zeros((1, 8, 2, 2), np.float32), "", varied=False)
        require_sound(Stage.PRIOR, np.zeros((1, 1, 1, 1), np.float32), "")
        require_sound(Stage.PRIOR, np.zeros((0, 1, 1, 1), np.float32), "")
