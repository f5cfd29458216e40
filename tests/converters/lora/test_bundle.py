"""LoRAs on exported bundles: the drawn numbers against diffusers with weights merged by the formula in torch, and
undoing to the last byte. Kills leave the old bundle or the new one."""

import errno
import fcntl
import hashlib
import json
import os
import shutil
import signal
from collections.abc import Mapping
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.torch import load_file, save_file

from cascadekit import export
from cascadekit.cli import main
from cascadekit.converters.lora import formulas
from cascadekit.converters.lora.merge_bundle import apply_loras, undo_loras
from cascadekit.schemas.errors import CascadeError, CheckpointError, ConversionError, LayoutError, UsageError
from cascadekit.schemas.stages import Stage
from cascadekit.storage.bundle import open_bundle
from helpers.standins import accept_changes

WEIGHTS = "diffusion_pytorch_model.safetensors"
Q = "down_blocks.0.2.attention.to_q"
WIDE = "up_blocks.1.0.channelwise.0"
FC1 = "text_model.encoder.layers.0.mlp.fc1"
KEYS = {
    Q: "lora_unet_down_blocks_0_2_attention_attn_to_q",
    WIDE: "lora_unet_up_blocks_1_0_channelwise_0",
    FC1: "lora_te_" + FC1.replace(".", "_"),
}
STAGE_FILES = {Stage.PRIOR: f"prior/{WEIGHTS}", Stage.TEXT_ENCODER: "text_encoder/model.safetensors"}

Tensors = dict[str, torch.Tensor]
Snapshot = dict[str, tuple[str, int]]


def call(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


@pytest.fixture(params=["F32", "BF16", "F16"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}[request.param]


@pytest.fixture
def model(tiny: Path, tmp_path: Path) -> Path:
    """The tiny model's prior and text encoder."""
    for stage in STAGE_FILES:
        shutil.copytree(tiny / "model" / stage, tmp_path / "model" / stage)
    return tmp_path / "model"


def stored_as(model: Path, dtype: torch.dtype) -> Path:
    for name in STAGE_FILES.values():
        save_file({n: t.to(dtype) for n, t in load_file(model / name).items()}, model / name, {"format": "pt"})
    return model


def lora_file(path: Path, model: Path, modules: Mapping[str, int], seed: int = 0, alpha: float = 2.0) -> Path:
    """A kohya LoRA of rank 3 whose change is about as large as the weights it changes."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {name: t.shape for file in STAGE_FILES.values() for name, t in load_file(model / file).items()}
    tensors = {}
    for module in modules:
        out, inputs = shapes[f"{module}.weight"][:2]
        tensors[f"{KEYS[module]}.lora_up.weight"] = torch.randn(out, 3, generator=generator) / 3
        tensors[f"{KEYS[module]}.lora_down.weight"] = torch.randn(3, inputs, generator=generator) / inputs**0.5
        tensors[f"{KEYS[module]}.alpha"] = torch.tensor(alpha)
    save_file(tensors, path)
    return path


def merged(weights: Tensors, loras: list[tuple[Path, float]]) -> Tensors:
    """W + strength * alpha/rank * up @ down in float32, rounded to the dtype the weight has."""
    result = dict(weights)
    for module, key in KEYS.items():
        name = f"{module}.weight"
        if name in weights:
            wide = weights[name].float()
            for file, strength in loras:
                factors = load_file(file)
                if f"{key}.alpha" in factors:
                    up, down = factors[f"{key}.lora_up.weight"], factors[f"{key}.lora_down.weight"]
                    change = strength * factors[f"{key}.alpha"] / 3 * (up @ down)
                    wide = wide + change.reshape(wide.shape)
            result[name] = wide.to(weights[name].dtype)
    return result


def inputs_of(bundle: Path) -> dict[str, np.ndarray]:
    """Batch 2, odd sizes."""
    sizes = {"batch": 2, "height": 5, "width": 7, "tokens": 11, "images": 1}
    generator = np.random.default_rng(3)
    entry = open_bundle(bundle).entry(Stage.PRIOR)
    shapes = {port.name: [sizes[d] if isinstance(d, str) else d for d in port.dims] for port in entry.inputs}
    return {
        name: generator.random(shape, np.float32)
        if name == "timestep_ratio"
        else generator.standard_normal(shape, dtype=np.float32)
        for name, shape in shapes.items()
    }


def drawn(bundle: Path) -> np.ndarray:
    path = open_bundle(bundle).graph(Stage.PRIOR)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (result,) = session.run(None, inputs_of(bundle))
    return np.asarray(result)


def by_diffusers(bundle: Path, weights: Tensors) -> np.ndarray:
    """The prior of diffusers with these weights, in fp32."""
    config = open_bundle(bundle).entry(Stage.PRIOR).config
    network = diffusers.StableCascadeUNet.from_config(config).eval()
    network.load_state_dict({name: tensor.float() for name, tensor in weights.items()})
    inputs = {name: torch.from_numpy(value) for name, value in inputs_of(bundle).items()}
    with torch.no_grad():
        return np.asarray(network(**inputs, return_dict=False)[0].numpy())


def distance(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def weights_in(bundle: Path, stage: Stage) -> Tensors:
    (path,) = (bundle / f.path for f in open_bundle(bundle).entry(stage).files if f.path.endswith(".safetensors"))
    return load_file(path)


def snapshot(root: Path) -> Snapshot:
    """Content and time of change of every file."""
    files = (path for path in root.rglob("*") if path.is_file())
    return {str(p.relative_to(root)): (hashlib.sha256(p.read_bytes()).hexdigest(), p.stat().st_mtime_ns) for p in files}


def same_weights(found: Tensors, expected: Tensors, dtype: torch.dtype) -> None:
    """Equal but for the order in which float32 products of rank 3 are summed: then within one unit of the dtype."""
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        unit = torch.finfo(dtype).eps
        assert found[name].dtype == tensor.dtype
        torch.testing.assert_close(found[name], tensor, rtol=unit, atol=1e-7, msg=lambda m, n=name: f"{n}: {m}")
        if name.removesuffix(".weight") not in KEYS:
            assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("weights", ["copy", "link"])
def test_applying_and_undoing(model: Path, tmp_path: Path, dtype: torch.dtype, weights: Any) -> None:
    stored_as(model, dtype)
    one = lora_file(tmp_path / "one.safetensors", model, {Q: 1, WIDE: 1, FC1: 1}, 1)
    two = lora_file(tmp_path / "two.safetensors", model, {Q: 1}, 2)
    bundle = tmp_path / "bundle"
    export(model, bundle, weights=weights)
    before, source = snapshot(bundle), snapshot(model)
    plain = drawn(bundle)

    done = apply_loras(bundle, [one, two], strengths=[0.7, -0.4], text_encoder_strengths=[0.25, 1.0])
    assert len(done.effects) == 3
    assert not done.unapplied
    for stage, loras in ((Stage.PRIOR, [(one, 0.7), (two, -0.4)]), (Stage.TEXT_ENCODER, [(one, 0.25)])):
        expected = merged(load_file(model / STAGE_FILES[stage]), loras)
        same_weights(weights_in(bundle, stage), expected, dtype)
        entry = open_bundle(bundle).entry(stage)
        assert entry.weights == "copy"
        (file,) = (file for file in entry.files if file.path.endswith(".safetensors"))
        assert file.sha256 == hashlib.sha256((bundle / file.path).read_bytes()).hexdigest()
    expected = merged(load_file(model / STAGE_FILES[Stage.PRIOR]), [(one, 0.7), (two, -0.4)])
    reference = by_diffusers(bundle, expected)
    assert distance(drawn(bundle), reference) < 1e-5
    assert distance(plain, reference) > 0.01
    assert snapshot(model) == source  # never written to through a link
    now = snapshot(bundle)
    assert all(now[name] == before[name] for name in before if name.endswith(".onnx"))
    state = open_bundle(bundle).manifest.lora
    assert state is not None
    told = [(lora.name, lora.strength, lora.text_encoder_strength) for lora in state.loras]
    assert told == [("one.safetensors", 0.7, 0.25), ("two.safetensors", -0.4, 1.0)]

    assert undo_loras(bundle) == ("one.safetensors", "two.safetensors")
    assert snapshot(bundle) == before
    assert snapshot(model) == source
    if weights == "link":
        assert (bundle / f"prior/{WEIGHTS}").samefile(model / f"prior/{WEIGHTS}")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bundle", "model", "one.safetensors", "two.safetensors"]


def test_exporting_with_loras(model: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    """The same bytes as applying afterwards; what a LoRA touches is copied."""
    stored_as(model, dtype)
    one = lora_file(tmp_path / "one.safetensors", model, {Q: 1, WIDE: 1}, 1)
    two = lora_file(tmp_path / "two.safetensors", model, {Q: 1}, 2)
    manifest = export(model, tmp_path / "bundle", loras=[(one, 0.5), (two, 1.5)])
    assert manifest.stages[Stage.PRIOR].weights == "copy"
    assert manifest.stages[Stage.TEXT_ENCODER].weights in ("copy", "reflink")
    expected = merged(load_file(model / STAGE_FILES[Stage.PRIOR]), [(one, 0.5), (two, 1.5)])
    same_weights(weights_in(tmp_path / "bundle", Stage.PRIOR), expected, dtype)
    assert distance(drawn(tmp_path / "bundle"), by_diffusers(tmp_path / "bundle", expected)) < 1e-5
    export(model, tmp_path / "later", weights="copy")
    apply_loras(tmp_path / "later", [one, two], strengths=[0.5, 1.5])
    found, other = (tmp_path / name / "prior/weights.safetensors" for name in ("bundle", "later"))
    assert found.read_bytes() == other.read_bytes()
    file = manifest.stages[Stage.PRIOR].files[-1]
    assert file.sha256 == hashlib.sha256(found.read_bytes()).hexdigest()
    with pytest.raises(UsageError, match="was exported with its LoRAs; export the model again without LoRAs"):
        undo_loras(tmp_path / "bundle")
    with pytest.raises(UsageError, match=r"has one\.safetensors \(0\.5\), two\.safetensors \(1\.5\) merged in"):
        apply_loras(tmp_path / "bundle", [one])
    with pytest.raises(UsageError, match=r'weights="link" shares .* and a LoRA changes those of the prior'):
        export(model, tmp_path / "linked", weights="link", loras=[(one, 1.0)])
    assert not (tmp_path / "linked").exists()


def test_q_k_v_that_lie_in_one_tensor(tiny: Path, model: Path, tmp_path: Path) -> None:
    """A linked bundle of an original file: the graph reads rows of in_proj, and so are they changed."""
    source = tmp_path / "original"
    source.mkdir()
    shutil.copy(tiny / "original/stage_c.safetensors", source)
    lora = lora_file(tmp_path / "one.safetensors", model, {Q: 1}, 1)
    export(source, tmp_path / "bundle", weights="link")
    apply_loras(tmp_path / "bundle", [lora], strengths=[0.5])
    expected = merged(load_file(model / STAGE_FILES[Stage.PRIOR]), [(lora, 0.5)])
    assert distance(drawn(tmp_path / "bundle"), by_diffusers(tmp_path / "bundle", expected)) < 1e-5
    before, after = load_file(source / "stage_c.safetensors"), weights_in(tmp_path / "bundle", Stage.PRIOR)
    changed = [name for name in before if not torch.equal(before[name], after[name])]
    assert changed == ["down_blocks.0.2.attention.attn.in_proj_weight"]
    third = before[changed[0]].shape[0] // 3
    assert torch.equal(before[changed[0]][third:], after[changed[0]][third:])


def test_a_dora_reads_its_norms_before_anything_is_written(model: Path, tmp_path: Path) -> None:
    """kohya's magnitudes are one for each input column: norms over all rows, which are written block by block."""
    lora = lora_file(tmp_path / "one.safetensors", model, {WIDE: 1}, 1)
    weight = load_file(model / STAGE_FILES[Stage.PRIOR])[f"{WIDE}.weight"]
    factors = load_file(lora)
    scale = torch.rand(weight.shape[1], generator=torch.Generator().manual_seed(5)) + 0.5
    save_file({**factors, f"{KEYS[WIDE]}.dora_scale": scale[None, :].contiguous()}, lora)
    export(model, tmp_path / "bundle", weights="copy")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(formulas, "BLOCK_VALUES", 1000)  # many blocks, however small the weight
        apply_loras(tmp_path / "bundle", [lora])
    up, down = factors[f"{KEYS[WIDE]}.lora_up.weight"], factors[f"{KEYS[WIDE]}.lora_down.weight"]
    moved = weight.double() + (2 / 3) * (up.double() @ down.double()).reshape(weight.shape)
    expected = (moved / moved.norm(dim=0, keepdim=True) * scale.reshape(1, -1, *[1] * (weight.dim() - 2))).float()
    found = weights_in(tmp_path / "bundle", Stage.PRIOR)[f"{WIDE}.weight"]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_through_the_command_line(model: Path, tmp_path: Path) -> None:
    lora = lora_file(tmp_path / "one.safetensors", model, {Q: 1, FC1: 1}, 1)
    bundle = tmp_path / "bundle"
    assert call("export", model, "-o", bundle, "--stage", "prior", "--weights", "copy").exit_code == 0
    before = snapshot(bundle)
    result = call("lora", "apply", bundle, lora, "--strength", "0.5")
    assert result.exit_code == 0, result.output
    assert "1 tensors changed, by" in result.stdout
    assert f"not applied: {lora}: text_encoder: {FC1}" in result.stderr
    assert call("validate", bundle, "--hash").exit_code == 0
    for message, *arguments in (
        (
            f"merged in already; take them out with `cascadekit lora apply {bundle} --undo`, then apply all",
            bundle,
            lora,
        ),
        ("give LoRAs to apply, or --undo without LoRAs", bundle, lora, "--undo"),
        ("give LoRAs to apply, or --undo without LoRAs", bundle),
        ("not a bundle", model, lora),
    ):
        result = call("lora", "apply", *arguments)
        assert result.exit_code == 2
        assert message in result.stderr
    result = call("lora", "apply", bundle, "--undo")
    assert result.exit_code == 0
    assert "without one.safetensors again" in result.stdout
    assert snapshot(bundle) == before
    assert "there is nothing to undo" in call("lora", "apply", bundle, "--undo").stderr
    result = call("export", model, "-o", tmp_path / "direct", "--lora", f"{lora}:0.5", "--lora", lora)
    assert result.exit_code == 0, result.output
    (first, second) = json.loads((tmp_path / "direct/cascade.json").read_text())["lora"]["loras"]
    assert (first["strength"], second["strength"]) == (0.5, 1.0)


def test_file_systems_that_clone(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The new file starts as a clone of the old one; only what a LoRA touches is written."""
    lora = lora_file(tmp_path / "one.safetensors", model, {Q: 1}, 1)

    def ioctl(target: int, request: int, source: int) -> int:
        return os.write(target, os.pread(source, os.fstat(source).st_size, 0))

    monkeypatch.setattr(fcntl, "ioctl", ioctl)
    bundle = tmp_path / "bundle"
    export(model, bundle, weights="link")
    before, source = snapshot(bundle), snapshot(model)
    assert open_bundle(bundle).entry(Stage.PRIOR).weights == "reflink"
    apply_loras(bundle, [lora], strengths=[0.5])
    expected = merged(load_file(model / STAGE_FILES[Stage.PRIOR]), [(lora, 0.5)])
    same_weights(weights_in(bundle, Stage.PRIOR), expected, torch.float32)
    undo_loras(bundle)
    assert (snapshot(bundle), snapshot(model)) == (before, source)


def test_a_graph_that_points_out_of_the_bundle(model: Path, tmp_path: Path) -> None:
    lora = lora_file(tmp_path / "one.safetensors", model, {Q: 1}, 1)
    bundle = tmp_path / "bundle"
    export(model, bundle, stages=[Stage.PRIOR], weights="copy")
    graph = onnx.load(bundle / "prior/model.onnx", load_external_data=False)
    tensor = next(tensor for tensor in graph.graph.initializer if tensor.name == f"{Q}.weight")
    next(entry for entry in tensor.external_data if entry.key == "location").value = "../../one.safetensors"
    (bundle / "prior/model.onnx").write_bytes(graph.SerializeToString())
    accept_changes(bundle)
    before = snapshot(tmp_path)
    with pytest.raises(CheckpointError, match=r"is in '\.\./\.\./one\.safetensors', which is no file of the bundle"):
        apply_loras(bundle, [lora])
    assert snapshot(tmp_path) == before


@pytest.mark.filterwarnings("ignore:overflow")
def test_what_cannot_be_applied_leaves_the_bundle_alone(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lora = lora_file(tmp_path / "one.safetensors", model, {Q: 1}, 1)
    bundle = tmp_path / "bundle"
    export(model, bundle, weights="copy")
    before = snapshot(bundle)

    def refused(kind: type[CascadeError], message: str, file: Path = lora, **options: Any) -> None:
        with pytest.raises(kind, match=message):
            apply_loras(bundle, [file], **options)
        assert snapshot(bundle) == before
        assert not [path for path in tmp_path.iterdir() if "partial" in path.name]

    other = tmp_path / "other.safetensors"
    save_file({"lora_unet_nowhere.lora_up.weight": torch.ones(2, 2)}, other)
    refused(LayoutError, "other", other)
    refused(UsageError, "expected one strength for each LoRA", strengths=[1.0, 2.0])
    refused(ConversionError, "the merged weight is not finite", strengths=[1e39])

    def full(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", full)
        refused(ConversionError, r"bytes needed\): No space left on device")
    with (bundle / "prior/weights.safetensors").open("r+b") as file:
        file.truncate(5000)
    before = snapshot(bundle)
    refused(CheckpointError, r"expected \d+ bytes, it has 5000")


def test_undoing_with_what_is_not_the_original(model: Path, tmp_path: Path) -> None:
    lora = lora_file(tmp_path / "one.safetensors", model, {Q: 1}, 1)
    bundle = tmp_path / "bundle"
    export(model, bundle, weights="link")
    apply_loras(bundle, [lora])
    path = model / STAGE_FILES[Stage.PRIOR]
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 1))
    with pytest.raises(CheckpointError, match=r"before-lora: expected SHA-256 .*; export the model again"):
        undo_loras(bundle)
    drawn(bundle)  # the merged weights are the bundle's own
    for kept in bundle.rglob("*.before-lora"):
        kept.unlink()
    with pytest.raises(CheckpointError, match=r"before-lora: expected .* it is missing"):
        undo_loras(bundle)


def test_file_systems_without_hard_links(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lora = lora_file(tmp_path / "one.safetensors", model, {Q: 1}, 1)
    bundle = tmp_path / "bundle"
    export(model, bundle, weights="copy")
    before = snapshot(bundle)

    def refuse(*arguments: object, **options: object) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    apply_loras(bundle, [lora])
    undo_loras(bundle)
    assert snapshot(bundle) == before


KILLED = """
import os, signal, sys
from collections import Counter
from cascadekit.cli import main
seen = 0

def count(event, arguments):
    global seen
    if event == "open" or event.startswith(("os.", "shutil.", "ctypes.dlsym")):
        seen += 1
        if seen == {when}:
            os.kill(os.getpid(), signal.SIGKILL)

import cascadekit.converters.lora.merge_bundle
os.fsync = lambda descriptor: None
sys.dont_write_bytecode = True  # its files would be counted
sys.stdout = sys.stderr = open({said!r}, "w")
sys.addaudithook(count)
try:
    main({arguments!r})
finally:
    print(seen, file=sys.stderr)
"""


@pytest.mark.parametrize("step", ["apply", "undo"])
def test_killed_anywhere(model: Path, tmp_path: Path, step: str, server: ForkServerContext) -> None:
    """Whenever the process is killed, the bundle is the old one or the new one, and the next run goes through."""
    lora = lora_file(tmp_path / "one.safetensors", model, {Q: 1, FC1: 1}, 1)
    plain, done = tmp_path / "plain", tmp_path / "done"
    export(model, plain, weights="link")
    shutil.copytree(plain, done)
    apply_loras(done, [lora])

    def contents(root: Path) -> dict[str, str]:
        return {name: digest for name, (digest, _) in snapshot(root).items() if "cascade.json" not in name}

    old, new = (contents(plain), contents(done)) if step == "apply" else (contents(done), contents(plain))
    arguments = [str(lora)] if step == "apply" else ["--undo"]

    def run(root: Path, when: int) -> int | None:
        command = ["lora", "apply", str(root), *arguments]
        code = KILLED.format(when=when, arguments=command, said=str(tmp_path / "said"))
        process = server.Process(target=exec, args=(code, {"__name__": "child"}))
        process.start()
        process.join()
        return process.exitcode

    def prepared(number: int) -> Path:
        root = tmp_path / str(number) / "bundle"
        shutil.copytree(plain if step == "apply" else done, root)
        return root

    code = run(prepared(0), -1)
    said = (tmp_path / "said").read_text()
    assert code == 0, said
    total = int(said.strip().splitlines()[-1])
    for number in sorted({*range(total // 4, total, total // 4), *range(total - 7, total + 1)}):
        root = prepared(number)
        assert run(root, number) == -signal.SIGKILL
        state = contents(root)
        assert state in (old, new), number
        if state == old:
            assert run(root, -1) == 0
            assert [path.name for path in root.parent.iterdir()] == ["bundle"]
        assert contents(root) == new
        shutil.rmtree(root.parent)
