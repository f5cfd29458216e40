"""References, recordings and tolerances of verify."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors import safe_open
from transformers import CLIPTextModelWithProjection

import cascadekit
from cascadekit.cli import main
from cascadekit.converters.checkpoints.example_model import EXAMPLE_MODEL
from cascadekit.converters.checkpoints.open_model import open_model
from cascadekit.parity.compare_engine import compare_engine
from cascadekit.parity.recording import read_recording
from cascadekit.parity.reference.loading import independent_engine, reference_engine
from cascadekit.parity.reference_run import NUDGE, ReferenceOutputs, reproduce_noise, run_reference
from cascadekit.parity.sample_inputs import NEGATIVE, PROMPT, PROMPTS, RATIOS, embed, make_inputs
from cascadekit.parity.tolerances import MAX_QUANTIZED_TOLERANCE, QUANTIZED_FACTOR, ROUNDOFF, stage_tolerance
from cascadekit.runtime.text.tokenizer import ClipTokenizer
from cascadekit.schemas.errors import CheckpointError, UsageError
from cascadekit.schemas.precision import Precision
from cascadekit.schemas.quantization import Quantization
from cascadekit.schemas.stages import Stage
from cascadekit.storage.bundle import open_bundle
from helpers import faults
from helpers.faults import planted

ALL = (Stage.TEXT_ENCODER, Stage.PRIOR, Stage.DECODER, Stage.VQGAN)
TOKENIZER = ClipTokenizer.open(None)


def call(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    return result.exit_code, result.output


@pytest.fixture(scope="module")
def recording(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("recorded") / "reference.safetensors"
    code, output = call("verify", tiny / "bundle", "--against", tiny / "model", "--record", path)
    assert code == 0, output
    return path


@pytest.fixture
def expected(tiny_outputs: ReferenceOutputs) -> ReferenceOutputs:
    """The content that the recording should have, by the reference in this process."""
    return tiny_outputs


# Inputs


def test_latents_are_noised_as_torch_would(tiny: Path) -> None:
    """x_t = √ᾱ x0 + √(1-ᾱ) ε, of the same draws, with ᾱ by the cosine schedule's formula."""
    entry = open_bundle(tiny / "bundle").entry(Stage.PRIOR)
    first = make_inputs(Stage.PRIOR, entry, TOKENIZER)[0]
    rng = np.random.default_rng(0)
    drawn = {}
    for port in entry.inputs:  # in the order of the ports, the noise last
        sizes = {"batch": 1, "height": 6, "width": 6, "tokens": 77, "images": 1}
        shape = [sizes[dim] if isinstance(dim, str) else dim for dim in port.dims]
        drawn[port.name] = rng.standard_normal(shape, dtype=np.float32)
    x0 = drawn["sample"]
    noise = rng.standard_normal(x0.shape, dtype=np.float32)
    t = torch.tensor(RATIOS[0], dtype=torch.float64)
    start = torch.cos(torch.tensor(0.008 / 1.008 * torch.pi / 2)) ** 2
    bar = torch.cos((t + 0.008) / 1.008 * torch.pi / 2) ** 2 / start
    expected = bar.sqrt().item() * x0 + (1 - bar).sqrt().item() * noise
    np.testing.assert_allclose(first.inputs["sample"], expected, rtol=1e-5, atol=1e-6)


def test_cases_have_real_prompts_guidance_and_every_timestep(tiny: Path) -> None:
    theirs = CLIPTextModelWithProjection.from_pretrained(tiny / "model" / "text_encoder").eval()

    def encode(inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        with torch.no_grad():
            out = theirs(**{k: torch.from_numpy(v) for k, v in inputs.items()}, output_hidden_states=True)
        return {"prompt_embeds": out.hidden_states[-1].numpy(), "pooled": out.text_embeds[:, None].numpy()}

    bundle = open_bundle(tiny / "bundle")
    embedded = embed(encode, TOKENIZER)  # type: ignore[arg-type]
    assert len(embedded.pooled) == len((*PROMPTS, NEGATIVE))
    for stage, zeroed in ((Stage.PRIOR, "clip_img"), (Stage.DECODER, "effnet")):
        cases = make_inputs(stage, bundle.entry(stage), TOKENIZER, embedded)
        assert sorted(case.t or 0 for case in cases) == sorted(RATIOS)
        (guided,) = (case for case in cases if "guided" in case.label)
        pooled = guided.inputs["clip_text_pooled"]
        assert (pooled[0] == embedded.pooled[PROMPT]).all()
        assert (pooled[1] == embedded.pooled[-1]).all()
        assert guided.inputs[zeroed][0].any()
        assert not guided.inputs[zeroed][1].any()
        assert (guided.inputs["sample"][0] == guided.inputs["sample"][1]).all()


def test_a_size_adds_its_latents(tiny: Path) -> None:
    """ceil(H/42.67) for the prior and ceil(H/4) for the decoder, at each timestep."""
    options = ("--stage", "prior", "--stage", "decoder", "--stage", "vqgan", "--size", "320x200", "--json")
    code, output = call("verify", tiny / "bundle", "--against", tiny / "model", "--no-verdict", *options)
    names = [c["name"] for c in json.loads(output[output.index("{") :])["comparisons"]]
    assert code == 0
    for t, batch in zip(RATIOS, (1, 2, 1), strict=True):
        assert any(n.startswith(f"prior: noise_pred (t {t}, batch {batch}, height 5, width 8") for n in names)
        assert any(n.startswith(f"decoder: noise_pred (t {t}, batch {batch}, height 50, width 80") for n in names)
    assert "vqgan: images (batch 1, height 50, width 80)" in names


# Tolerances


def test_floors_are_the_errors_of_the_reference_itself(tiny: Path) -> None:
    """Against networks loaded in each dtype; these round the timestep ratio too, so the vqgan, which has none."""
    model = open_model([tiny / "model"])
    bundle = open_bundle(tiny / "bundle")
    expected = run_reference(reference_engine(model, ALL), bundle, [Stage.VQGAN])
    inputs = expected.passes[0].inputs
    exact, *rough = (
        reference_engine(model, ALL, dtype=dtype).load(Stage.VQGAN)(inputs)["images"].astype(np.float64)
        for dtype in ("F64", "F32", "F16", "BF16")
    )
    floors = [float(np.linalg.norm(found - exact) / np.linalg.norm(exact)) for found in rough]
    measured = expected.floors[Stage.VQGAN]
    for precision, floor in zip((Precision.FP32, Precision.FP16, Precision.BF16), floors, strict=True):
        assert measured[precision] == pytest.approx(floor, rel=1e-2)


def test_the_floor_of_a_quantisation_is_that_of_the_worst_input(example: Path) -> None:
    """A decoder in 4 bits has ten times the error late in an image: by the first input, right graphs would fail."""
    engine, kind = reference_engine(open_model([EXAMPLE_MODEL]), ALL), Quantization.INT4
    expected = run_reference(engine, open_bundle(example), [Stage.DECODER], kinds=[kind])
    with engine.load(Stage.DECODER) as runner:
        rough = [runner(each.inputs, kind)["noise_pred"] for each in expected.passes]
    exact = [each.outputs["noise_pred"] for each in expected.passes]
    errors = [float(np.linalg.norm(x - y) / np.linalg.norm(y)) for x, y in zip(rough, exact, strict=True)]
    assert max(errors) > 5 * errors[0]
    assert expected.floors[Stage.DECODER][kind] == pytest.approx(max(errors), rel=1e-4)


def test_tolerances_are_floors_times_factors(tiny: Path) -> None:
    entry = open_bundle(tiny / "bundle").entry(Stage.PRIOR)
    fine = stage_tolerance(entry, None, {Precision.FP32: 1e-6})
    assert fine.tolerance == pytest.approx(fine.factor * 1e-6)
    coarse = stage_tolerance(entry, Precision.BF16, {Precision.FP32: 1e-6, Precision.BF16: 1e-2})
    assert coarse.tolerance == pytest.approx(coarse.factor * 1e-2)
    none = stage_tolerance(entry, None, {Precision.FP32: 0.0})
    assert none.tolerance == pytest.approx(none.factor * ROUNDOFF[Precision.FP32])
    fp16 = entry.model_copy(update={"precision": Precision.FP16})
    overflowed = stage_tolerance(fp16, None, {Precision.FP16: float("inf"), Precision.BF16: 1e-2})
    assert overflowed.tolerance == pytest.approx(overflowed.factor * 1e-2)
    int4 = entry.model_copy(update={"quantization": Quantization.INT4})
    floors = {Precision.FP32: 1e-6, Quantization.INT4: 0.06, Quantization.INT8: 0.01}
    assert stage_tolerance(int4, None, floors).tolerance == QUANTIZED_FACTOR * 0.06
    hopeless = {**floors, Quantization.INT4: float("inf")}
    assert stage_tolerance(int4, None, hopeless).tolerance == MAX_QUANTIZED_TOLERANCE
    fp8 = entry.model_copy(update={"quantization": Quantization.FP8})
    assert stage_tolerance(fp8, None, floors).tolerance == pytest.approx(0.1)
    assert stage_tolerance(int4, None, {}).tolerance == pytest.approx(0.5)


def test_gains_foresee_how_errors_grow(tiny: Path, expected: ReferenceOutputs) -> None:
    """An engine whose every pass is off by as much as one in bf16 drifts no more than gains say it may."""
    model = open_model([tiny / "model"])
    bundle = open_bundle(tiny / "bundle")
    assert expected.trajectory is not None
    gains = (*expected.trajectory.gains.values(), expected.trajectory.image_gain)
    assert all(gain * NUDGE > 1e-4 for gain in gains)
    rough = reference_engine(model, ALL, compute="bfloat16")
    rough.precision = Precision.BF16
    report = compare_engine(rough, expected, bundle)
    assert report, [str(c) for c in report.comparisons if not c]
    assert not compare_engine(reference_engine(model, ALL, compute="bfloat16"), expected, bundle)


# References


def test_diffusers_agrees(tiny: Path) -> None:
    code, output = call("verify", tiny / "bundle", "--against", tiny / "model", "--reference", "diffusers", "--json")
    report = json.loads(output[output.index("{") :])
    assert code == 0, report
    assert report["reference"] == "diffusers"
    assert any(c["name"].startswith("teacher-forced: decoder") for c in report["comparisons"])


def test_diffusers_has_not_all_stages(tiny: Path) -> None:
    with pytest.raises(UsageError, match='have no previewer; compare it with reference="cascadekit"'):
        independent_engine(open_model([tiny / "model"]), [Stage.PREVIEWER])


@pytest.mark.parametrize("precision", ["fp64", "bf16"])
def test_the_reference_computes_in_what_is_asked_for(tiny: Path, precision: str) -> None:
    options = ("--against", tiny / "model", "--stage", "decoder", "--reference-precision", precision, "--json")
    code, output = call("verify", tiny / "bundle", *options)
    report = json.loads(output[output.index("{") :])
    worst = max(c["relative_l2"] for c in report["comparisons"])
    assert (code, report["passed"]) == ((0, True) if precision == "fp64" else (1, False))
    assert worst < 2e-6 if precision == "fp64" else worst > 1e-3


# Recordings


def test_a_recording_is_what_was_expected(expected: ReferenceOutputs, recording: Path) -> None:
    loaded = read_recording(recording).outputs
    assert [(c.stage, c.label, c.t) for c in loaded.passes] == [(c.stage, c.label, c.t) for c in expected.passes]
    for one, other in zip(loaded.passes, expected.passes, strict=True):
        assert {name: value.tobytes() for name, value in one.outputs.items()} == {
            name: value.tobytes() for name, value in other.outputs.items()
        }
    assert loaded.trajectory is not None
    assert expected.trajectory is not None
    assert loaded.floors == expected.floors
    assert loaded.trajectory.gains == expected.trajectory.gains
    assert loaded.trajectory.image_gain == expected.trajectory.image_gain
    steps = [(call.stage, call.step) for call in expected.trajectory.calls]
    assert [(call.stage, call.step) for call in loaded.trajectory.calls] == steps
    tape = reproduce_noise(expected.trajectory)
    assert tape.keys() == loaded.trajectory.noise.keys()
    with safe_open(recording, "np") as file:  # as another library reads it
        assert (file.get_tensor("noise/prior draw 1") == tape[Stage.PRIOR, 1]).all()
        assert (file.get_tensor("image/image") == expected.trajectory.image).all()


def test_the_tape_is_the_noise_of_torch(recording: Path) -> None:
    trajectory = read_recording(recording).outputs.trajectory
    assert trajectory is not None
    generator = torch.Generator().manual_seed(0)
    for key, drawn in trajectory.noise.items():
        assert (torch.randn(drawn.shape, generator=generator).numpy() == drawn).all(), key
    first = next(call for call in trajectory.calls if call.stage is Stage.PRIOR)
    assert (first.inputs["sample"][:1] == trajectory.noise[Stage.PRIOR, 1]).all()


WITHOUT_TORCH = """
import sys
class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "diffusers", "transformers"):
            raise ImportError(name)
sys.meta_path.insert(0, Hidden())
from cascadekit.cli import main
main(sys.argv[1:])
"""


def test_a_recording_is_compared_without_torch(tiny: Path, recording: Path, tmp_path: Path) -> None:
    """Where torch cannot be imported a healthy bundle passes, and one with a fault fails."""
    root = Path(cascadekit.__file__).parents[1]

    def run(bundle: Path, *more: str) -> "subprocess.CompletedProcess[str]":
        command = [sys.executable, "-c", WITHOUT_TORCH, "verify", str(bundle), "--recorded", str(recording), *more]
        return subprocess.run(command, capture_output=True, text=True, cwd=root, check=False)

    healthy = run(tiny / "bundle")
    assert healthy.returncode == 0, healthy.stderr
    assert "noise: decoder draw 4" in healthy.stdout
    assert "teacher-forced: prior pass 4" in healthy.stdout
    bundle = planted(tiny / "bundle", "vqgan", tmp_path / "bundle", faults.one_weight, "up_blocks.3.weight")
    faulty = run(bundle, "--stage", "vqgan")
    assert faulty.returncode == 1, faulty.stderr
    assert "FAILED" in faulty.stdout


def test_what_is_no_recording_is_said_so(tiny: Path, recording: Path, tmp_path: Path) -> None:
    weights = tiny / "bundle" / "vqgan" / "weights.safetensors"
    code, output = call("verify", tiny / "bundle", "--recorded", weights)
    assert code == 2
    assert "not a recording; make one with" in output
    shutil.copyfile(recording, tmp_path / "cut")
    with (tmp_path / "cut").open("r+b") as file:
        file.truncate(100_000)
    with pytest.raises(CheckpointError):
        read_recording(tmp_path / "cut")
    for key in (b"calls", b"reference"):
        damaged = recording.read_bytes().replace(b'\\"' + key + b'\\":', b'\\"' + key[:-1] + b'X\\":', 1)
        (tmp_path / "damaged").write_bytes(damaged)
        with pytest.raises(CheckpointError, match="a damaged recording"):
            read_recording(tmp_path / "damaged")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "give --against as the model, or --recorded as a file"),
        (("--recorded", "x", "--bisect"), "--bisect needs the model"),
        (("--against", "x", "--bisect", "--record", "y"), "cannot be given together"),
        (
            ("--against", "x", "--report", "y.html", "--record", "y"),
            "--record runs the reference alone, without --report; leave it out",
        ),
        (("--record", "y"), "--record needs the model"),
        (("--against", "x", "--mapping"), "--mapping lists the tensors of two checkpoints; leave it out"),
        (("--against", "x", "--bisect", "--reference", "diffusers"), "looks into cascadekit's own modules"),
    ],
)
def test_options_that_do_not_go_together(tiny: Path, options: tuple[str, ...], message: str) -> None:
    code, output = call("verify", tiny / "bundle", *options)
    assert code == 2
    assert message in output
