"""Bundles behind links, as huggingface_hub's cache keeps them: snapshots/REVISION/... leads into blobs/SHA."""

import hashlib
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from cascadekit import Cascade, Settings
from cascadekit.converters.export.validate import validate
from cascadekit.converters.lora.merge_bundle import apply_loras, derive_bundle
from cascadekit.parity.verdict import record_verdict
from cascadekit.runtime.engines import cpu_flags, engine_table, openvino
from cascadekit.runtime.engines.engine_table import EngineChoice, make_engine
from cascadekit.schemas.errors import UsageError
from cascadekit.schemas.manifest import VerdictEntry
from cascadekit.schemas.stages import Stage
from cascadekit.storage import hub_cache_links as real_files
from cascadekit.storage.bundle import open_bundle
from cascadekit.storage.hub_cache_links import can_do_without, without_links

ENGINES = ["onnxruntime", "onnxruntime-mapped", "openvino", "openvino-bf16", "auto"]
QUICK = Settings(64, 64, prior_steps=1, decoder_steps=1)


def as_in_the_hubs_cache(bundle: Path, folder: Path) -> Path:
    """A snapshot of the files of `bundle` below `folder`."""
    repository = folder / "models--me--bundle"
    blobs, snapshot = repository / "blobs", repository / "snapshots" / "0123abc"
    blobs.mkdir(parents=True)
    for path in sorted(bundle.rglob("*")):
        if path.is_file():
            blob = blobs / hashlib.sha256(path.read_bytes()).hexdigest()
            shutil.copyfile(path, blob)
            link = snapshot / path.relative_to(bundle)
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(os.path.relpath(blob, link.parent))
    return snapshot


def write_lora(tiny: Path, path: Path) -> Path:
    """One of rank 2 for a query of the prior, in kohya's names."""
    weights = load_file(tiny / "model/prior/diffusion_pytorch_model.safetensors")
    out, inputs = weights["down_blocks.0.2.attention.to_q.weight"].shape
    rng = np.random.default_rng(0)
    key = "lora_unet_down_blocks_0_2_attention_attn_to_q"
    up, down = rng.random((out, 2), np.float32), rng.random((2, inputs), np.float32)
    save_file(
        {f"{key}.lora_up.weight": up, f"{key}.lora_down.weight": down, f"{key}.alpha": np.array(2, np.float32)}, path
    )
    return path


def state_of(snapshot: Path) -> dict[str, tuple[bool, bytes]]:
    root = snapshot.parents[1]
    return {str(p.relative_to(root)): (p.is_symlink(), p.read_bytes()) for p in root.rglob("*") if p.is_file()}


@pytest.fixture
def snapshot(tiny: Path, tmp_path: Path) -> Path:
    return as_in_the_hubs_cache(tiny / "bundle", tmp_path)


@pytest.mark.parametrize("engine", ENGINES)
def test_every_engine_runs_it_and_leaves_it_alone(tiny: Path, snapshot: Path, engine: str) -> None:
    before = state_of(snapshot)
    latents = []
    for root in (tiny / "bundle", snapshot):
        with Cascade.open(root, engine=engine, threads=1) as cascade:
            latents.append(cascade.generate("a cat", seed=0, settings=QUICK).decoder_latents)
    np.testing.assert_array_equal(*latents)
    assert state_of(snapshot) == before


def test_validate_finds_it_sound(snapshot: Path) -> None:
    assert validate(open_bundle(snapshot), hash=True)
    blob = (snapshot / "vqgan/weights.safetensors").resolve()
    blob.write_bytes(blob.read_bytes()[:-1] + b"?")
    assert not validate(open_bundle(snapshot), hash=True)


def test_a_folder_of_real_files_is_made_where_one_can_be(
    snapshot: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, choices: tuple[EngineChoice, ...]
) -> None:
    graph = snapshot / "prior/model.onnx"
    with without_links(graph) as path:
        folder = path.parent
        assert folder != graph.parent
        assert {p.name for p in folder.iterdir()} == {"model.onnx", "weights.safetensors"}
        assert not any(p.is_symlink() for p in folder.iterdir())
        assert (folder / "weights.safetensors").samefile(graph.parent / "weights.safetensors")
    assert not folder.exists()

    def refuse(*arguments: object) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(real_files.os, "link", refuse)
    with without_links(graph) as path:
        assert path == graph
    assert not can_do_without(graph)
    monkeypatch.setattr(engine_table, "CHOICES", choices)
    monkeypatch.setattr(engine_table, "WORTH_A_START", 0)
    monkeypatch.setattr(cpu_flags, "may_compute_bf16", lambda: True)
    monkeypatch.setattr(cpu_flags, "multiplies_bf16", lambda: False)  # torch-bf16 reads weights behind links
    monkeypatch.setattr(openvino, "multiplies_bf16", lambda: True)
    assert make_engine("auto", open_bundle(snapshot)).name == "onnxruntime"


def test_where_there_are_no_links_nothing_is_made(tiny: Path) -> None:
    graph = tiny / "bundle/prior/model.onnx"
    with without_links(graph) as path:
        assert path == graph


def test_loras_are_not_written_into_the_cache(tiny: Path, snapshot: Path, tmp_path: Path) -> None:
    lora = write_lora(tiny, tmp_path / "lora.safetensors")
    before = state_of(snapshot)
    with pytest.raises(
        UsageError,
        match=r"a link to a file elsewhere.*cp -rL .*leave the bundle as it is: `.* --lora",
    ):
        apply_loras(snapshot, [lora])
    derive_bundle(snapshot, tmp_path / "derived", [lora])
    assert state_of(snapshot) == before
    made = open_bundle(tmp_path / "derived")
    assert validate(made, hash=True)
    assert not any(path.is_symlink() for path in made.root.rglob("*"))
    shutil.copytree(snapshot, tmp_path / "copy")
    apply_loras(tmp_path / "copy", [lora])
    assert validate(open_bundle(tmp_path / "copy"), hash=True)


def test_a_verdict_replaces_the_link_and_not_the_blob(snapshot: Path) -> None:
    blob = (snapshot / "cascade.json").resolve()
    before = blob.read_bytes()
    verdict = VerdictEntry(
        engine="x", reference="y", date="2026-01-31", created_by="z", passed=True, image_psnr_db=None, stages={}
    )
    record_verdict(open_bundle(snapshot), verdict)
    assert blob.read_bytes() == before
    assert not (snapshot / "cascade.json").is_symlink()
    assert open_bundle(snapshot).manifest.parity[-1] == verdict
    assert Stage.PRIOR in open_bundle(snapshot).manifest.stages
