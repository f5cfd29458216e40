"""The command line as people and programs meet it: output, messages, exit codes."""

import json
import re
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result
from PIL import Image
from safetensors.numpy import load_file, save_file
from safetensors.torch import save_file as save_torch_file

from cascadekit import UsageError, make_demo
from cascadekit.cli import main
from cascadekit.converters.checkpoints.model_folder import write_folder_files
from cascadekit.runtime.images.png import read_settings
from cascadekit.schemas.stages import ImageEncoderConfig, NetworkConfig, PreviewerConfig, Stage
from cascadekit.schemas.tensors import expected_tensors
from cascadekit.storage.replaceable_folders import owned
from helpers.efficientnets import narrow_controlnet, narrow_effnet
from helpers.graphs import random_tensors
from helpers.standins import write_stand_in
from helpers.whole import Whole, picture

QUICK = ["--size", "64x64", "--prior-steps", "1", "--decoder-steps", "1", "--seed", "0"]


def call(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def refused(code: int, message: str, *arguments: object) -> None:
    """One clear message on standard error, no traceback, the right exit code."""
    result = call(*arguments)
    assert result.exit_code == code, result.output
    assert message in result.stderr
    assert "Traceback" not in result.output
    assert result.exception is None or isinstance(result.exception, SystemExit)


@pytest.mark.parametrize("command", ["inspect", "convert", "export", "build", "generate", "verify", "demo"])
def test_help_has_an_example(command: str) -> None:
    result = call(command, "--help")
    assert result.exit_code == 0
    assert re.search(rf"^Examples?:\n  cascadekit {command} ", result.output, re.M)
    assert max(map(len, result.output.splitlines())) <= 80


def test_inspect(tiny: Path, original: Path) -> None:
    result = call("inspect", original)
    assert result.exit_code == 0
    for word in ("stage_a.safetensors", "prior", "decoder", "original", "tiny", "F32", "547,600"):
        assert word in result.output, word
    (prior,) = json.loads(call("inspect", tiny / "model" / "prior", "--json").output)
    assert (prior["component"], prior["layout"], prior["variant"]) == ("prior", "diffusers", "tiny")
    assert (prior["parameters"], prior["problems"], prior["dtypes"].keys()) == (547600, [], {"F32"})


def test_inspect_of_a_damaged_file_lists_problems(original: Path, tmp_path: Path) -> None:
    tensors = load_file(original / "stage_c.safetensors")
    del tensors["clf.1.bias"]
    save_file(tensors, tmp_path / "c.safetensors")
    result = call("inspect", tmp_path / "c.safetensors")
    assert result.exit_code == 1
    assert "missing (1): clf.1.bias" in result.output


HELPERS: dict[str, tuple[str, NetworkConfig]] = {
    "effnet_encoder": ("e", narrow_effnet()),
    "previewer": ("p", PreviewerConfig(c_hidden=32)),
    "controlnet_canny": ("controlnet/c", narrow_controlnet(1)),
}


@pytest.fixture
def helpers(tmp_path: Path) -> Path:
    """The networks beside the cascade, all of them small."""
    folder = with_image_encoder(tmp_path / "helpers")
    for file, config in HELPERS.values():
        tensors = {name: tensor.contiguous() for name, tensor in random_tensors(config, 1).items()}
        save_torch_file(tensors, folder / f"{file}.safetensors")
    return folder


@pytest.fixture
def released_helpers(catalog_folder: Path, tmp_path: Path) -> Path:
    """The same with the release's shapes, but for the image encoder."""
    folder = with_image_encoder(tmp_path / "helpers")
    for name, (file, _) in HELPERS.items():
        write_stand_in(catalog_folder / f"original_{name}.json", folder / f"{file}.safetensors", "BF16")
    return folder


def with_image_encoder(folder: Path) -> Path:
    (folder / "controlnet").mkdir(parents=True)
    config = ImageEncoderConfig(16, 32, 2, 2, 12, image_size=20, patch_size=6)
    write_folder_files(folder, {Stage.IMAGE_ENCODER: config}, index=False)
    rng = np.random.default_rng(0)
    tensors = {n: rng.standard_normal(s, np.float32) * np.float32(0.3) for n, s in expected_tensors(config).items()}
    save_file(tensors, folder / "image_encoder" / "model.safetensors")
    return folder


def test_the_networks_beside_the_cascade(helpers: Path, tmp_path: Path) -> None:
    bundle = tmp_path / "bundle"
    stages = ["image_encoder", "effnet_encoder", "previewer", "controlnet/canny"]
    result = call("export", helpers, "-o", bundle, "--weights", "copy")
    assert result.exit_code == 0, result.output
    manifest = json.loads((bundle / "cascade.json").read_text())["stages"]
    assert list(manifest) == stages
    assert [port["name"] for port in manifest["controlnet/canny"]["graphs"]["model"]["outputs"]][:3] == [
        "control.0",
        "control.4",
        "control.8",
    ]
    for stage in stages:
        assert [file["path"] for file in manifest[stage]["files"]] == [
            f"{stage}/model.onnx",
            f"{stage}/weights.safetensors",
        ]
    verified = call("verify", bundle, "--against", helpers, "--json")
    assert verified.exit_code == 0, verified.output
    report = json.loads(verified.stdout)
    assert {comparison["name"].split(":")[0] for comparison in report["comparisons"]} == set(stages)
    assert max(comparison["relative_l2"] for comparison in report["comparisons"]) < 1e-5
    assert report["image_psnr_db"] is None
    looked_into(bundle, helpers, "image_encoder", "previewer")
    only = json.loads(call("verify", bundle, "--against", helpers, "--stage", "previewer", "--json").stdout)
    assert {comparison["name"].split(":")[0] for comparison in only["comparisons"]} == {"previewer"}


@pytest.mark.slow  # two EfficientNets
def test_bisection_of_networks_of_real_size(released_helpers: Path, tmp_path: Path) -> None:
    assert call("export", released_helpers, "-o", tmp_path / "bundle").exit_code == 0
    looked_into(tmp_path / "bundle", released_helpers, "effnet_encoder", "controlnet/canny")


def looked_into(bundle: Path, model: Path, *stages: str) -> None:
    """`verify --bisect` looks into these stages alone, at many points, and finds nothing."""
    options = [option for stage in stages for option in ("--stage", stage)]
    result = call("verify", bundle, "--against", model, "--bisect", "--json", *options)
    report = json.loads(result.stdout)
    assert result.exit_code == 0, [bisection["first"] for bisection in report["bisection"]]
    assert len(report["bisection"]) == len(stages)
    assert all(len(bisection["points"]) > 15 for bisection in report["bisection"])


def test_the_road(original: Path, tmp_path: Path) -> None:
    model, bundle, image = tmp_path / "model", tmp_path / "bundle", tmp_path / "x.png"
    files = [original / f"stage_{letter}.safetensors" for letter in "abc"]
    encoder = ("--text-encoder", original / "text_encoder")
    result = call("convert", *files, *encoder, "-o", model, "--to", "diffusers")
    assert result.exit_code == 0, result.output
    assert "prior/diffusion_pytorch_model.safetensors: 2.2 MB" in result.stderr
    assert call("export", model, "-o", bundle).exit_code == 0
    result = call("generate", bundle, "a cat", *QUICK, "-o", image)
    assert result.exit_code == 0, result.output
    assert "64x64, seed 0" in result.output
    assert Image.open(image).size == (64, 64)
    stage = ("--stage", "vqgan")  # the demo below verifies every stage
    result = call("verify", bundle, "--against", model, *stage, "--json")
    assert result.exit_code == 0
    assert json.loads(result.stdout)["passed"] is True
    result = call("verify", bundle, "--against", model, *stage)
    assert result.exit_code == 0
    assert "passed" in result.output


def test_engines_by_name(tiny: Path, tmp_path: Path) -> None:
    bundle, stage = tiny / "bundle", ("--stage", "vqgan")
    for engine in "onnxruntime-mapped", "openvino-bf16":
        result = call("generate", bundle, "x", *QUICK, "--engine", engine, "--threads", 1, "-o", tmp_path)
        assert result.exit_code == 0, result.output
        verified = call("verify", bundle, "--against", tiny / "model", *stage, "--engine", engine, "--no-verdict")
        assert verified.exit_code == 0, verified.output  # each is held to what its type can reach
    assert sorted(read_settings(path)["engine"] for path in tmp_path.iterdir()) == [
        "onnxruntime-mapped",
        "openvino-bf16",
    ]
    refused(1, "openvino runs on cpu only", "generate", bundle, "x", "--engine", "openvino", "--device", "cuda")
    assert call("generate", bundle, "x", "--engine", "abacus").exit_code == 2


def test_verify_says_no_with_exit_code_1(tiny: Path, tmp_path: Path) -> None:
    """A bundle with another scale draws other images than the model."""
    call("export", tiny / "model", "-o", tmp_path / "b", "--stage", "vqgan", "--vqgan-scale", "0.43")
    result = call("verify", tmp_path / "b", "--against", tiny / "model", "--stage", "vqgan")
    assert result.exit_code == 1
    assert "FAILED" in result.output
    assert "relative L2" in result.output


def test_many_images_into_a_folder(tiny: Path, tmp_path: Path) -> None:
    arguments = ("generate", tiny / "bundle", "a", "b", "--images", "2", *QUICK, "-o", tmp_path / "out")
    assert call(*arguments).exit_code == 0
    assert call(*arguments).exit_code == 0  # the next free numbers
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [f"{n:04d}.png" for n in range(8)]


def test_long_and_empty_prompts(tiny: Path, tmp_path: Path) -> None:
    result = call("generate", tiny / "bundle", "word " * 80, "", *QUICK, "-o", tmp_path)
    assert result.exit_code == 0
    assert "CLIP reads 77 tokens; cut off: 'word word word word word'" in result.stderr


def test_demo(tmp_path: Path) -> None:
    (tmp_path / "demo").mkdir()
    (tmp_path / "demo" / "thesis.txt").write_text("precious")
    result = call("demo", "-o", tmp_path / "demo")
    assert result.exit_code == 0, result.output
    assert (tmp_path / "demo" / "thesis.txt").read_text() == "precious"
    (tmp_path / "demo" / "thesis.txt").unlink()
    made = {path.name for path in (tmp_path / "demo").iterdir()}
    assert made == {"original", "lora", "model", "bundle", "image.png", "prompts.png", "report.html", "parity.json"}
    assert json.loads((tmp_path / "demo/parity.json").read_text())["passed"] is True
    assert f"cascadekit ui {tmp_path / 'demo' / 'bundle'}" in result.output
    refused(2, "exists already", "demo", "-o", tmp_path / "demo")
    with pytest.raises(UsageError, match="exists already"):
        make_demo(str(tmp_path / "demo"))
    found = owned(tmp_path / "demo", ["parity.json"])
    assert found is not None
    assert (found.marker, found.foreign) == ("parity.json", ())


def test_demo_without_torch_names_no_report(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cascadekit.parity.demo.make_demo", lambda *given, **options: None)
    assert "image.png, prompts.png, parity.json\n" in call("demo").stdout


def test_demo_on_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each file of the example model was tried, and all were listed in a message of a page."""

    def full(source: Path, target: Path) -> None:
        raise OSError(28, "No space left on device", str(source), None, str(target))

    monkeypatch.setattr(shutil, "copyfile", full)
    result = call("demo", "-o", tmp_path / "demo")
    assert result.exit_code == 1
    advice = "cannot be written: No space left on device; make room, or choose another disk"
    assert re.fullmatch(f"error: {tmp_path}/demo/original/\\S+: {advice}", result.stderr.splitlines()[-1])
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize("command", ["ui", "serve"])
def test_a_server_is_not_started_for_a_bundle_that_makes_no_images(tiny: Path, tmp_path: Path, command: str) -> None:
    """It listened, and every image failed."""
    assert call("export", tiny / "model", "-o", tmp_path / "bundle", "--stage", "prior").exit_code == 0
    said = f"{tmp_path / 'bundle'}: has no text_encoder, decoder, vqgan; export the model with it"
    refused(2, said, command, tmp_path / "bundle", "--port", 0)


class TestWrongInputs:
    @pytest.mark.parametrize(
        "words",
        [
            ("generate", "BUNDLE", "--like", "none"),
            ("site", "BUNDLE", "-o", "site", "--onnxruntime-web", "none"),
            ("many", "none"),
        ],
    )
    def test_a_missing_file_without_its_number(self, tiny: Path, words: tuple[str, ...]) -> None:
        """Messages ended with "[Errno 2] No such file or directory: 'none'"."""
        result = call(*(tiny / "bundle" if word == "BUNDLE" else word for word in words))
        assert result.exit_code == 2
        assert re.search(r"none: .*cannot be read.*: No such file or directory; ", result.stderr)

    def test_truncated_file(self, original: Path, tmp_path: Path) -> None:
        cut = tmp_path / "stage_c.safetensors"
        cut.write_bytes((original / "stage_c.safetensors").read_bytes()[:-100])
        refused(1, "100 missing", "convert", cut, "-o", tmp_path / "out", "--to", "diffusers")

    def test_lfs_pointer(self, tmp_path: Path) -> None:
        path = tmp_path / "stage_c.safetensors"
        path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 7178375922\n")
        refused(1, "git lfs pull", "inspect", path)

    def test_sdxl(self, tmp_path: Path) -> None:
        header = {
            "conditioner.embedders.0.model.logit_scale": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]},
            "model.diffusion_model.input_blocks.0.0.bias": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]},
        }
        text = json.dumps(header).encode()
        path = tmp_path / "sdxl.safetensors"
        path.write_bytes(struct.pack("<Q", len(text)) + text + b"\0" * 8)
        refused(1, "it holds an SDXL checkpoint", "inspect", path)

    def test_unknown_dtype(self, original: Path, tmp_path: Path) -> None:
        raw = (original / "stage_c.safetensors").read_bytes()
        length = int(struct.unpack("<Q", raw[:8])[0])
        header = json.loads(raw[8 : 8 + length])
        header["clf.1.bias"]["dtype"] = "F12"  # of a library that is newer than this package
        text = json.dumps(header).encode()
        path = tmp_path / "stage_c.safetensors"
        path.write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + length :])
        words = "dtype that is not supported yet (1): clf.1.bias is F12"
        refused(1, words, "convert", path, "-o", tmp_path / "o", "--to", "original")

    def test_missing_keys(self, original: Path, tmp_path: Path) -> None:
        tensors = load_file(original / "stage_c.safetensors")
        tensors = {name: tensor for name, tensor in tensors.items() if ".depthwise.bias" not in name}
        save_file(tensors, tmp_path / "stage_c.safetensors")
        arguments = ("convert", tmp_path / "stage_c.safetensors", "-o", tmp_path / "out", "--to", "diffusers")
        refused(1, "missing (4): down_blocks.0.0.depthwise.bias, ", *arguments)

    def test_stage_b_as_stage_c(self, original: Path, tmp_path: Path) -> None:
        (tmp_path / "model" / "prior").mkdir(parents=True)
        shutil.copy(original / "stage_b.safetensors", tmp_path / "model/prior/diffusion_pytorch_model.safetensors")
        refused(1, "expected the prior here, found the decoder", "export", tmp_path / "model", "-o", tmp_path / "b")

    def test_unwritable_output(self, original: Path, tmp_path: Path) -> None:
        (tmp_path / "file").touch()
        output = tmp_path / "file" / "out"
        refused(2, "file is no folder; choose another output", "convert", original, "-o", output, "--to", "diffusers")

    def test_existing_output(self, original: Path, tmp_path: Path) -> None:
        (tmp_path / "model_index.json").touch()
        refused(2, "--force to replace", "convert", original, "-o", tmp_path, "--to", "diffusers")

    @pytest.mark.parametrize("size", ["100x64", "64x100", "8x8"])
    def test_size_that_cannot_be(self, tiny: Path, tmp_path: Path, size: str) -> None:
        refused(2, "expected a multiple of 8", "generate", tiny / "bundle", "x", "--size", size, "-o", tmp_path)

    def test_size_that_is_none(self, tiny: Path) -> None:
        refused(2, "expected WIDTHxHEIGHT", "generate", tiny / "bundle", "x", "--size", "big")

    def test_no_bundle(self, tiny: Path) -> None:
        refused(2, "not a bundle", "generate", tiny / "model", "x")

    def test_no_such_file(self, tmp_path: Path) -> None:
        refused(2, "no such file or folder", "inspect", tmp_path / "none")

    def test_debug_shows_the_traceback(self, tmp_path: Path) -> None:
        result = call("--debug", "inspect", tmp_path / "none")
        assert result.exception is not None
        assert not isinstance(result.exception, SystemExit)


def test_interrupting_leaves_nothing(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from cascadekit.runtime import cascade

    def interrupt(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cascade, "Noise", interrupt)
    refused(130, "interrupted", "generate", tiny / "bundle", "x", *QUICK, "-o", tmp_path / "x.png")
    assert not list(tmp_path.iterdir())


FORBIDDEN = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {blocked!r}:
            raise ImportError(name + " is not to be imported")
sys.meta_path.insert(0, Refuse())
"""


@pytest.mark.parametrize(
    ("blocked", "code"),
    [
        ({"torch", "diffusers", "transformers", "onnx"}, "import cascadekit, cascadekit.runtime.cascade"),
        ({"torch", "diffusers", "transformers", "onnx", "onnxruntime"}, "import cascadekit.cli"),
        ({"torch", "diffusers", "transformers", "onnx", "onnxruntime"}, "from cascadekit import convert, inspect"),
        ({"torch", "diffusers", "transformers"}, "from cascadekit import export"),
    ],
)
def test_imports_without_the_heavy_libraries(blocked: set[str], code: str) -> None:
    subprocess.run([sys.executable, "-c", FORBIDDEN.format(blocked=blocked) + code], check=True)


EACH = """
from cascadekit.cli import main
for arguments in {arguments!r}:
    try:
        main(arguments)
    except SystemExit as ended:
        assert not ended.code, arguments
"""


def test_everything_of_generate_without_torch_diffusers_transformers_and_onnx(
    whole: Whole, tiny: Path, tmp_path: Path
) -> None:
    """The engine of "auto" may be OpenVINO, which compiles a large graph for seconds: it gets the tiny cascade."""
    blocked = {"torch", "diffusers", "transformers", "onnx"}
    photo, mask = tmp_path / "photo.png", tmp_path / "mask.png"
    picture(96, 80, 1).save(photo)
    drawn = Image.new("L", (96, 80))
    drawn.paste(255, (16, 16, 64, 60))
    drawn.save(mask)
    (tmp_path / "lines.jsonl").write_text(json.dumps({"prompt": "a (red:1.2) cat, " * 30, "name": "long"}) + "\n")
    quick = ["--size", "128x128", "--prior-steps", 2, "--decoder-steps", 1, "--seed", 0]
    pictures = ["--image-prompt", photo, "--init-image", photo, "--mask", mask, "--strength", 0.9]
    controls = ["--control", f"canny={photo}:0.5", "--control", f"inpainting={photo}", "--preview-every", 1]
    prompts = ["--prompts", tmp_path / "lines.jsonl", "--weighted", "--long-prompts", "--sampler", "gdf"]
    plain = ["--engine", "onnxruntime"]
    calls = [
        [whole.bundle, "x", *quick, *pictures, *controls, *plain, "-o", tmp_path / "x.png"],
        [tiny / "bundle", *quick, *prompts, "--memory", "resident", "-o", tmp_path / "out"],
        [whole.bundle, "--like", tmp_path / "x.png", *plain, "-o", tmp_path / "again.png"],
    ]
    arguments = [[str(each) for each in ("generate", *call)] for call in calls]
    code = FORBIDDEN.format(blocked=blocked) + EACH.format(arguments=arguments)
    subprocess.run([sys.executable, "-c", code], check=True)
    assert (tmp_path / "x.png").read_bytes() == (tmp_path / "again.png").read_bytes()
    assert (tmp_path / "out" / "long.png").is_file()
