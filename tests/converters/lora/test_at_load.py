"""LoRAs by name at load: merged weights by the formula in torch and by PEFT, what the cache shares and remakes."""

import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from diffusers import StableCascadeUNet
from safetensors.torch import load_file, save_file

from cascadekit import export
from cascadekit.converters.lora import merge_bundle as bundle
from cascadekit.converters.lora.bundle_cache import find_lora, with_loras
from cascadekit.schemas.errors import CheckpointError, ConversionError, LayoutError, MissingPackageError, UsageError
from cascadekit.schemas.stages import Stage
from cascadekit.storage.bundle import open_bundle
from cascadekit.storage.install_hint import install_hint
from cascadekit.storage.user_cache import user_cache

Q = "down_blocks.0.2.attention.to_q"
FC1 = "text_model.encoder.layers.0.mlp.fc1"
KEYS = {Q: "lora_unet_down_blocks_0_2_attention_attn_to_q", FC1: "lora_te_" + FC1.replace(".", "_")}
WEIGHTS = {Stage.PRIOR: "prior/weights.safetensors", Stage.TEXT_ENCODER: "text_encoder/weights.safetensors"}

Tensors = dict[str, torch.Tensor]


@pytest.fixture(autouse=True)
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test may look into or write to the places of who runs it."""
    monkeypatch.setenv("CASCADEKIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("CASCADEKIT_LORAS", raising=False)


@pytest.fixture
def plain(tiny: Path, tmp_path: Path) -> Path:
    """A bundle of all stages with weights of its own."""
    export(tiny / "model", tmp_path / "bundle", weights="copy")
    return tmp_path / "bundle"


def lora_file(path: Path, modules: tuple[str, ...] = (Q,), seed: int = 0, alpha: float = 2.0) -> Path:
    """A kohya LoRA of rank 3."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {Q: (64, 64), FC1: (32, 8)}
    tensors = {}
    for module in modules:
        out, inputs = shapes[module]
        tensors[f"{KEYS[module]}.lora_up.weight"] = torch.randn(out, 3, generator=generator) / 3
        tensors[f"{KEYS[module]}.lora_down.weight"] = torch.randn(3, inputs, generator=generator) / 8
        tensors[f"{KEYS[module]}.alpha"] = torch.tensor(alpha)
    path.parent.mkdir(exist_ok=True)
    save_file(tensors, path)
    return path


def change(lora: Path, module: str) -> torch.Tensor:
    """alpha/rank * B @ A, which a LoRA of strength 1 adds."""
    factors, key = load_file(lora), KEYS[module]
    change: torch.Tensor = factors[f"{key}.lora_up.weight"] @ factors[f"{key}.lora_down.weight"]
    return change * factors[f"{key}.alpha"] / 3


def snapshot(root: Path) -> dict[str, tuple[str, int]]:
    files = (path for path in root.rglob("*") if path.is_file())
    return {str(p.relative_to(root)): (hashlib.sha256(p.read_bytes()).hexdigest(), p.stat().st_mtime_ns) for p in files}


def check_merged(made: Path, plain: Path, stage: Stage, expected: Tensors) -> None:
    before, after = load_file(plain / WEIGHTS[stage]), load_file(made / WEIGHTS[stage])
    assert before.keys() == after.keys()
    for name, tensor in after.items():
        wanted = expected.get(name.removesuffix(".weight")) if name.endswith(".weight") else None
        if wanted is None:
            assert torch.equal(tensor, before[name]), name
        else:
            assert not torch.equal(tensor, before[name])
            torch.testing.assert_close(tensor, wanted, rtol=2e-6, atol=1e-7)


def test_merged_once_and_found_again(plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = lora_file(tmp_path / "loras/one.safetensors", (Q, FC1), 1)
    two = lora_file(tmp_path / "loras/two.safetensors", (Q,), 2)
    monkeypatch.setenv("CASCADEKIT_LORAS", os.pathsep.join([str(tmp_path / "none"), str(tmp_path / "loras")]))
    before = snapshot(plain)
    made = with_loras(plain, [("one", 0.5), (two, -1.5)])
    assert made.parent == tmp_path / "cache/loras"
    weights = load_file(plain / WEIGHTS[Stage.PRIOR])[f"{Q}.weight"]
    check_merged(made, plain, Stage.PRIOR, {Q: weights + 0.5 * change(one, Q) - 1.5 * change(two, Q)})
    weights = load_file(plain / WEIGHTS[Stage.TEXT_ENCODER])[f"{FC1}.weight"]
    check_merged(made, plain, Stage.TEXT_ENCODER, {FC1: weights + 0.5 * change(one, FC1)})
    assert snapshot(plain) == before

    opened = open_bundle(made)
    for stage, entry in opened.manifest.stages.items():
        opened.check(stage)
        assert entry.weights == ("copy" if stage in WEIGHTS else "link"), stage
    for path in made.rglob("*"):
        shared = path.is_dir() or path.name == "cascade.json" or path.relative_to(made).as_posix() in WEIGHTS.values()
        assert shared or path.samefile(plain / path.relative_to(made)), path
    assert {path.name for path in made.rglob("*")} == {path.name for path in plain.rglob("*")}
    state = opened.manifest.lora
    assert state is not None
    assert [(lora.name, lora.strength) for lora in state.loras] == [("one.safetensors", 0.5), ("two.safetensors", -1.5)]

    monkeypatch.setitem(sys.modules, bundle.__name__, None)  # as without the onnx package, which it imports
    assert with_loras(plain, [(str(one), 0.5), ("two.safetensors", -1.5)]) == made
    assert with_loras(plain, []) == plain
    with pytest.raises(
        MissingPackageError, match="the onnx package, which is not installed: " + re.escape(install_hint("export"))
    ):
        with_loras(plain, [(one, 0.25)])


def test_one_pair_without_a_list_is_refused(plain: Path) -> None:
    with pytest.raises(UsageError, match=r"loras: expected paths or pairs, .* found 0.8"):
        with_loras(plain, ("style.safetensors", 0.8))  # type: ignore[arg-type]


def test_as_peft_merges(tiny: Path, plain: Path, tmp_path: Path) -> None:
    """The whole prior against PEFT's merge of an adapter that PEFT saved, at strength 1."""
    config = open_bundle(plain).entry(Stage.PRIOR).config
    model = StableCascadeUNet.from_config(config)
    model.load_state_dict(load_file(tiny / "model/prior/diffusion_pytorch_model.safetensors"))
    settings: dict[str, Any] = {
        "r": 4,
        "lora_alpha": 6,
        "target_modules": ["to_q", "to_v", "to_out.0", "channelwise.0"],
    }
    adapter = peft.get_peft_model(model, peft.LoraConfig(**settings))
    generator = torch.Generator().manual_seed(1)
    for name, parameter in adapter.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.2
    adapter.save_pretrained(tmp_path / "adapter")
    theirs = adapter.merge_and_unload().state_dict()
    made = with_loras(plain, [(tmp_path / "adapter", 1.0)])
    ours = load_file(made / WEIGHTS[Stage.PRIOR])
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], rtol=1e-6, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")

    path = tmp_path / "adapter/adapter_config.json"  # its alpha is as good as a part of the weights
    path.write_text(json.dumps(json.loads(path.read_text()) | {"lora_alpha": 7}))
    assert with_loras(plain, [(tmp_path / "adapter", 1.0)]) != made


def test_what_makes_another_bundle(plain: Path, tmp_path: Path) -> None:
    """Strengths, order, names and contents of LoRAs, contents of the bundle; not where they lie, nor times."""
    one = lora_file(tmp_path / "one.safetensors", (Q,), 1)
    two = lora_file(tmp_path / "two.safetensors", (Q,), 2)
    first = with_loras(plain, [(one, 0.5), (two, 1.0)])
    others = [[(one, 0.5), (two, 0.9)], [(two, 1.0), (one, 0.5)], [(one, 0.5)]]
    assert len({first, *(with_loras(plain, each) for each in others)}) == 4
    assert with_loras(plain, [(one, 0.5), (two, 1.0)], tmp_path / "elsewhere") == tmp_path / "elsewhere" / first.name
    assert not [path for path in first.parent.iterdir() if "partial" in path.name]

    content = json.loads((plain / "cascade.json").read_text())
    for file in content["stages"]["prior"]["files"]:
        os.utime(plain / file["path"], ns=(1, 1))
        file["mtime_ns"] = 1
    (plain / "cascade.json").write_text(json.dumps(content))
    (tmp_path / "moved").mkdir()
    one = one.rename(tmp_path / "moved" / one.name)
    assert with_loras(plain, [(one, 0.5), (two, 1.0)]) == first
    content["stages"]["prior"]["files"][0]["fingerprint"] = "0" * 64
    (plain / "cascade.json").write_text(json.dumps(content))
    assert with_loras(plain, [(one, 0.5), (two, 1.0)]) != first
    two = two.rename(tmp_path / "moved/other.safetensors")
    assert with_loras(plain, [(one, 0.5), (two, 1.0)]) != first


def damage(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.unlink()  # it may be linked to the bundle's
    path.write_bytes(data)


@pytest.mark.parametrize(
    "harm",
    [
        lambda made: damage(made / WEIGHTS[Stage.PRIOR]),
        lambda made: (made / "vqgan/model.onnx").unlink(),
        lambda made: (made / "cascade.json").write_text("{"),
        lambda made: (made / "cascade.json").unlink(),
    ],
    ids=["weights", "graph", "manifest", "no manifest"],
)
def test_what_is_damaged_is_made_again(plain: Path, tmp_path: Path, harm: Callable[[Path], object]) -> None:
    lora = lora_file(tmp_path / "one.safetensors", (Q,), 1)
    made = with_loras(plain, [(lora, 0.5)])
    contents = {name: digest for name, (digest, _) in snapshot(made).items() if name != "cascade.json"}
    before = snapshot(plain)
    harm(made)
    assert with_loras(plain, [(lora, 0.5)]) == made
    assert {name: digest for name, (digest, _) in snapshot(made).items() if name != "cascade.json"} == contents
    assert snapshot(plain) == before


def test_two_at_once_make_one(plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second waits for the first, which is held up in the middle of its merge, and finds what that made."""
    lora = lora_file(tmp_path / "one.safetensors", (Q,), 1)
    call = f"print(with_loras({str(plain)!r}, [({str(lora)!r}, 0.5)]))"
    code = f"from cascadekit.converters.lora.bundle_cache import with_loras\n{call}"
    begun, go_on = threading.Event(), threading.Event()
    overwrite = bundle.overwrite

    def slow(*arguments: Any) -> Any:
        begun.set()
        assert go_on.wait(60)
        return overwrite(*arguments)

    monkeypatch.setattr(bundle, "overwrite", slow)
    found: list[Path] = []
    first = threading.Thread(target=lambda: found.append(with_loras(plain, [(lora, 0.5)])))
    first.start()
    assert begun.wait(60)
    second = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    with pytest.raises(subprocess.TimeoutExpired):
        second.wait(2)
    go_on.set()
    first.join(60)
    made = snapshot(found[0])
    output, _ = second.communicate(timeout=60)
    assert second.returncode == 0
    assert Path(output.strip()) == found[0]
    assert snapshot(found[0]) == made  # not made a second time


def test_a_cache_on_another_file_system(plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object, **options: object) -> None:
        raise OSError(18, "Invalid cross-device link")

    lora = lora_file(tmp_path / "one.safetensors", (Q,), 1)
    monkeypatch.setattr(os, "link", refuse)
    made = open_bundle(with_loras(plain, [(lora, 0.5)]))
    for stage, entry in made.manifest.stages.items():
        made.check(stage)
        assert entry.weights == "copy"
        assert all(not (made.root / f.path).samefile(plain / f.path) for f in entry.files)
    weights = load_file(plain / WEIGHTS[Stage.PRIOR])[f"{Q}.weight"]
    check_merged(made.root, plain, Stage.PRIOR, {Q: weights + 0.5 * change(lora, Q)})


def test_what_cannot_be_merged(plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lora = lora_file(tmp_path / "one.safetensors", (Q,), 1)
    foreign = tmp_path / "foreign.safetensors"
    save_file({"lora_unet_nowhere.lora_up.weight": torch.ones(2, 2)}, foreign)

    def refused(kind: type[Exception], words: str, *loras: tuple[Path, float], root: Path = plain) -> None:
        with pytest.raises(kind, match=words):
            with_loras(root, loras)
        left = [path for path in (tmp_path / "cache").rglob("*") if path.is_dir() and path.name != "loras"]
        assert not left

    refused(UsageError, "strengths nan: expected finite numbers", (lora, float("nan")))
    with pytest.raises(UsageError, match="none: no such LoRA file"):  # a path alone is no list of letters
        with_loras(plain, "none")
    refused(LayoutError, "foreign", (foreign, 1.0))
    refused(UsageError, "not a bundle", (lora, 1.0), root=tmp_path)
    damage(plain / "vqgan/weights.safetensors")
    refused(CheckpointError, r"vqgan/weights\.safetensors: expected SHA-256", (lora, 1.0))
    monkeypatch.setenv("CASCADEKIT_CACHE", str(foreign))
    with pytest.raises(ConversionError, match=r"the cache of LoRAs cannot be written: .* set \$CASCADEKIT_CACHE"):
        with_loras(plain, [(lora, 1.0)])


def test_a_bundle_with_loras_is_not_merged_again(plain: Path, tmp_path: Path) -> None:
    lora = lora_file(tmp_path / "one.safetensors", (Q,), 1)
    made = with_loras(plain, [(lora, 0.5)])
    with pytest.raises(UsageError, match=r"has one\.safetensors \(0\.5\) merged in already"):
        with_loras(made, [(lora, 1.0)])


def test_what_did_not_apply_is_said(tiny: Path, tmp_path: Path) -> None:
    export(tiny / "model", tmp_path / "prior_alone", stages=[Stage.PRIOR], weights="copy")
    lora = lora_file(tmp_path / "one.safetensors", (Q, FC1), 1)
    said: list[str] = []
    with_loras(tmp_path / "prior_alone", [(lora, 0.5)], say=said.append)
    assert said == [f"not applied: {lora}: text_encoder: {FC1}"]


def test_finding_loras(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = lora_file(tmp_path / "a/style.safetensors")
    second = lora_file(tmp_path / "b/style.safetensors")
    other = lora_file(tmp_path / "b/line v1.5.safetensors")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(UsageError, match=r"style: no such LoRA file; .* list your folders of LoRAs in \$CASCADEKIT_L"):
        find_lora("style")
    monkeypatch.setenv("CASCADEKIT_LORAS", os.pathsep.join([str(tmp_path / "a"), "", str(tmp_path / "b")]))
    assert find_lora("style") == find_lora("style.safetensors") == first
    assert find_lora("line v1.5") == other
    assert find_lora(str(second)) == second
    (tmp_path / "here/style").mkdir()  # a folder, but no LoRA
    assert find_lora("style") == first
    local = lora_file(tmp_path / "here/style.safetensors")
    assert find_lora("style.safetensors").samefile(local)
    with pytest.raises(UsageError, match=r"ink: no ink\.safetensors in .*a, .*b \(.*\); there are: line v1\.5, style$"):
        find_lora("ink")
    with pytest.raises(UsageError, match=r"b/ink: no such LoRA file; check the path"):
        find_lora("b/ink")


def test_where_the_cache_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert user_cache("loras") == tmp_path / "cache/loras"
    monkeypatch.delenv("CASCADEKIT_CACHE")
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert user_cache("loras") == tmp_path / "xdg/cascadekit/loras"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert user_cache("loras") == tmp_path / ".cache/cascadekit/loras"
    monkeypatch.setattr(sys, "platform", "darwin")
    assert user_cache("loras") == tmp_path / "Library/Caches/cascadekit/loras"
