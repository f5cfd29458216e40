"""The predicted peak is within 15% of that of a real process: pictures, ControlNets, previews, tiny networks.

The networks beside the cascade are as large as in the releases, prior and decoder are tiny: no other stage hides them.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from cascadekit import export
from cascadekit.converters.checkpoints.model_folder import write_folder_files
from cascadekit.schemas.stages import (
    PRESETS,
    PROJ_BLOCKS_ENDS,
    ControlNetConfig,
    EffnetEncoderConfig,
    ImageEncoderConfig,
    NetworkConfig,
    PreviewerConfig,
    Stage,
    TextEncoderConfig,
    Variant,
    prior_config,
)
from cascadekit.schemas.tensors import expected_tensors, is_counter

CONFIGS: dict[Stage, NetworkConfig] = {
    Stage.TEXT_ENCODER: TextEncoderConfig(8, 32, 2, 2, 12),
    Stage.IMAGE_ENCODER: ImageEncoderConfig(512, 2048, 8, 12, 768),
    Stage.PRIOR: prior_config((64, 64), (1, 1), (8, 24), text=8, pooled=12),
    Stage.DECODER: PRESETS[Stage.DECODER, Variant.TINY],
    Stage.VQGAN: PRESETS[Stage.VQGAN, Variant.TINY],
    Stage.EFFNET_ENCODER: EffnetEncoderConfig(),
    Stage.PREVIEWER: PreviewerConfig(),
    Stage.CONTROLNET_CANNY: ControlNetConfig(1, PROJ_BLOCKS_ENDS, c_proj=64),
}
PROGRAM = """
import json, sys
import numpy as np
from PIL import Image
from cascadekit import Cascade, ControlPicture, Settings, Stage
from cascadekit.runtime.memory.prediction import Extras, predict_peak, process_bytes

bundle, side, images, memory, wanted = json.loads(sys.argv[1])
picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (512, 512, 3), np.uint8))
settings = Settings(side, side, prior_steps=2, decoder_steps=1)
given = {
    "image_prompts": [picture] * wanted.count("prompt"),
    "init_image": picture if "init" in wanted else None,
    "mask": Image.new("L", (512, 512), 255) if "mask" in wanted else None,
    "controls": [ControlPicture("edges", picture, 1.0)] if "control" in wanted else [],
}
controls = (Stage.CONTROLNET_CANNY,) if "control" in wanted else ()
extras = Extras(wanted.count("prompt"), "init" in wanted, "mask" in wanted, controls, "preview" in wanted)
with Cascade.open(bundle, engine="onnxruntime", memory=memory) as cascade:
    policy = cascade.residency.policy
    predicted = predict_peak(cascade.manifest, policy, settings, images, extras, process=process_bytes())
    show = (lambda stage, step: step.preview() if stage is Stage.PRIOR else None) if "preview" in wanted else print
    cascade.generate("x", seed=0, settings=settings, num_images=images, on_step=lambda *step: show(*step), **given)
peak = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) << 10
print(json.dumps([predicted.nbytes, str(predicted.stage), peak]))
"""


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return bundle_of(tmp_path_factory.mktemp("features"), CONFIGS)


@pytest.fixture(scope="module")
def with_vqgan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle whose vqgan is of real size, too."""
    full = {Stage.VQGAN: PRESETS[Stage.VQGAN, Variant.FULL]}
    return bundle_of(tmp_path_factory.mktemp("vqgan"), {**CONFIGS, **full})


def bundle_of(root: Path, configs: dict[Stage, NetworkConfig]) -> Path:
    """Export a model of `configs` with random weights."""
    model = root / "model"
    model.mkdir()
    write_folder_files(model, configs, index=True)
    rng = np.random.default_rng(0)
    for stage, config in configs.items():
        (model / stage).mkdir(parents=True, exist_ok=True)
        is_clip = stage in (Stage.TEXT_ENCODER, Stage.IMAGE_ENCODER)
        name = "model" if is_clip else "diffusion_pytorch_model"
        tensors = {tensor: values(rng, tensor, shape) for tensor, shape in expected_tensors(config).items()}
        save_file(tensors, model / stage / f"{name}.safetensors")
    export(model, root / "bundle", controlnet=True)
    return root / "bundle"


def values(rng: np.random.Generator, name: str, shape: tuple[int, ...]) -> Any:
    if is_counter(name):
        return np.zeros(shape, np.int64)
    drawn = rng.standard_normal(shape, np.float32)
    return np.abs(drawn) + np.float32(0.5) if "running_var" in name else drawn * np.float32(0.03)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(
    ("side", "images", "memory", "wanted", "stage"),
    [
        (768, 1, "staged", [], "vqgan"),
        (768, 2, "staged", [], "vqgan"),
        (768, 1, "staged", ["init"], "effnet_encoder"),
        (768, 1, "staged", ["control"], "controlnet/canny"),
        (512, 1, "staged", ["prompt", "prompt"], "image_encoder"),
        (512, 2, "staged", ["preview"], "previewer"),
        (768, 1, "staged", ["init", "mask"], "effnet_encoder"),
        (768, 1, "resident", ["init", "mask"], "effnet_encoder"),
        (512, 1, "resident", ["preview", "prompt", "init"], "effnet_encoder"),
        (512, 1, "resident", ["preview", "control", "prompt", "init"], "effnet_encoder"),
    ],
    ids=lambda value: str(value),
)
def test_a_process_takes_what_is_predicted(
    bundle: Path, side: int, images: int, memory: str, wanted: list[str], stage: str
) -> None:
    require_prediction(stage, [str(bundle), side, images, memory, wanted])


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(("memory", "wanted"), [("staged", ["init", "mask"]), ("resident", ["init", "mask", "prompt"])])
def test_a_process_that_keeps_part_of_a_picture_takes_what_is_predicted(
    with_vqgan: Path, memory: str, wanted: list[str]
) -> None:
    """The vqgan encodes the picture as well, so that the decoder starts from it outside the mask."""
    require_prediction("vqgan", [str(with_vqgan), 384, 1, memory, wanted])


def require_prediction(stage: str, job: list[Any]) -> None:
    ended = subprocess.run(
        [sys.executable, "-c", PROGRAM, json.dumps(job)], capture_output=True, text=True, check=False
    )
    assert ended.returncode == 0, ended.stderr
    predicted, where, peak = json.loads(ended.stdout.splitlines()[-1])
    assert where == stage
    assert predicted == pytest.approx(peak, rel=0.15)
