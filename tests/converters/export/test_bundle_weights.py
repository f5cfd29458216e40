"""How weights come into a bundle, what the manifest records of them, and that exports are the same every time."""

import errno
import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import pytest
from click.testing import CliRunner, Result
from safetensors.numpy import load_file, save_file

from cascadekit import export
from cascadekit.cli import main
from cascadekit.converters.export import bundle_weights as placing
from cascadekit.converters.export import export_stage
from cascadekit.schemas.config_json import to_json
from cascadekit.schemas.errors import ConversionError, ExportError
from cascadekit.schemas.manifest import StageEntry
from cascadekit.schemas.stages import PRESETS, Stage, Variant
from cascadekit.storage import file_ranges as copying
from cascadekit.storage.bundle import open_bundle
from helpers.standins import write_stand_in

WEIGHTS = "diffusion_pytorch_model.safetensors"
GRAPHS = ("model.onnx", "conditioning.onnx", "step.onnx")


def call(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


@pytest.fixture
def prior(tiny: Path, tmp_path: Path) -> Path:
    """A folder of its own with the tiny prior."""
    return Path(shutil.copytree(tiny / "model" / "prior", tmp_path / "prior"))


def exported(source: Path, output: Path, **options: Any) -> StageEntry:
    return export(source, output, **options).stages[Stage.PRIOR]


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def clones(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system that clones: the ioctl gives the target the source's bytes."""

    def ioctl(target: int, request: int, source: int) -> int:
        assert request == 0x40049409  # FICLONE of linux/fs.h: _IOW(0x94, 9, int)
        return os.write(target, os.pread(source, os.fstat(source).st_size, 0))

    monkeypatch.setattr(fcntl, "ioctl", ioctl)


def test_links_where_nothing_clones(prior: Path, tmp_path: Path) -> None:
    entry = exported(prior, tmp_path / "bundle", weights="link")
    assert entry.weights == "link"
    assert (tmp_path / "bundle/prior" / WEIGHTS).samefile(prior / WEIGHTS)
    graph, *_, weights = entry.files
    assert graph.sha256 == sha256(tmp_path / "bundle" / graph.path)
    assert weights.sha256 == entry.sources[0].sha256 == sha256(prior / WEIGHTS)
    assert weights.fingerprint == entry.sources[0].fingerprint
    assert weights.mtime_ns == (prior / WEIGHTS).stat().st_mtime_ns


def test_weights_are_not_hashed_when_not_asked(prior: Path, tmp_path: Path) -> None:
    for weights in ("link", "copy"):
        entry = exported(prior, tmp_path / weights, weights=weights, hash=False)
        assert (entry.files[-1].sha256, entry.sources[0].sha256) == (None, None)
        assert all(file.sha256 for file in entry.files[:-1])


@pytest.mark.parametrize("wish", ["auto", "link"])
def test_a_clone_is_taken_before_a_link(
    prior: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wish: str
) -> None:
    clones(monkeypatch)
    assert exported(prior, tmp_path / "bundle", weights=wish).weights == "reflink"
    made = tmp_path / "bundle/prior" / WEIGHTS
    assert made.read_bytes() == (prior / WEIGHTS).read_bytes()
    assert not made.samefile(prior / WEIGHTS)
    open_bundle(tmp_path / "bundle").check(Stage.PRIOR)


def test_auto_copies_where_nothing_clones(prior: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entry = exported(prior, tmp_path / "bundle")
    assert entry.weights == "copy"
    assert {path.name for path in (tmp_path / "bundle/prior").iterdir()} == {*GRAPHS, "weights.safetensors"}
    assert all((tmp_path / "bundle" / file.path).stat().st_nlink == 1 for file in entry.files)
    assert entry.files[-1].sha256 == sha256(tmp_path / "bundle/prior/weights.safetensors")
    assert entry.sources[0].sha256 is None  # the copy is another file

    def refuse(*arguments: object) -> None:
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    monkeypatch.setattr(placing.os, "link", refuse)
    with pytest.raises(ExportError, match=r"cannot be hard-linked.*cross-device.*; use weights=\"copy\""):
        export(prior, tmp_path / "other", weights="link")


def test_names_that_no_bundle_has_are_copied_under_another(prior: Path, tmp_path: Path) -> None:
    odd = tmp_path / "a:b.safetensors"
    (prior / WEIGHTS).rename(odd)
    with pytest.raises(ExportError, match="the name has a slash, backslash, colon or control character"):
        export(odd, tmp_path / "linked", weights="link", on_plan=lambda plan: pytest.fail("a plan that cannot be"))
    assert exported(odd, tmp_path / "bundle").weights == "copy"
    open_bundle(tmp_path / "bundle").check(Stage.PRIOR)


def test_a_file_behind_a_symbolic_link(prior: Path, tmp_path: Path) -> None:
    """As huggingface_hub's cache has them: the bundle gets the file itself, by the link's name."""
    (prior / WEIGHTS).rename(tmp_path / "blob")
    (prior / WEIGHTS).symlink_to(tmp_path / "blob")
    assert exported(prior, tmp_path / "bundle", weights="link").weights == "link"
    made = tmp_path / "bundle/prior" / WEIGHTS
    assert made.samefile(tmp_path / "blob")
    assert not made.is_symlink()
    assert call("validate", tmp_path / "bundle").exit_code == 0


@pytest.mark.parametrize("block", [5000, 1 << 24])
def test_the_hash_of_a_copy_is_of_what_lies_there(
    prior: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int
) -> None:
    """Written in many small steps, or in one; the oracle is hashlib over the finished file."""
    monkeypatch.setattr(copying, "COPY_BLOCK", block)
    told: list[int] = []
    entry = exported(prior, tmp_path / "bundle", weights="copy", start_file=lambda name, total: told.append)
    path = tmp_path / "bundle/prior/weights.safetensors"
    assert entry.files[-1].sha256 == sha256(path)
    assert sum(told) == sum(tensor.nbytes for tensor in load_file(path).values())


def test_the_hash_waits_for_tensors_that_are_turned_round(tiny: Path, tmp_path: Path) -> None:
    """A transposed matrix is written after everything else, before the end of the file."""
    shutil.copytree(tiny / "original", tmp_path / "original")
    assert call("convert", tmp_path / "original", "-o", tmp_path / "comfyui", "--to", "comfyui").exit_code == 0
    for path in (tmp_path / "comfyui").iterdir():
        tensors = load_file(path)
        projection = tensors.pop("text_encoder.clip_g.transformer.text_projection.weight")
        save_file({**tensors, "text_encoder.clip_g.text_projection": projection.T.copy()}, path)
    manifest = export(tmp_path / "comfyui", tmp_path / "bundle")
    ways = {stage: entry.weights for stage, entry in manifest.stages.items()}
    assert set(ways.values()) == {"copy"}
    file = manifest.stages[Stage.TEXT_ENCODER].files[-1]
    assert file.sha256 == sha256(tmp_path / "bundle" / file.path)


def test_what_the_command_says(prior: Path, tmp_path: Path) -> None:
    result = call("export", prior, "-o", tmp_path / "linked", "--weights", "link")
    assert result.exit_code == 0, result.output
    assert "prior: hard-linked" in result.stdout
    assert "other programs cannot open the graphs" in result.stderr
    assert "must not change in place; --weights copy" in result.stderr
    for number, options in enumerate(([], ["--weights", "copy"])):
        result = call("export", prior, "-o", tmp_path / f"copied{number}", *options, "--no-hash")
        assert "prior: copied" in result.stdout
        assert "in place" not in result.stderr
        files = json.loads((tmp_path / f"copied{number}/cascade.json").read_text())["stages"]["prior"]["files"]
        assert files[-1]["sha256"] is None
    said = " ".join(call("export", "--help").output.split())
    assert "onnx.load" in said
    assert "must not change in place" in said


# Runs the commands of the first argument, a JSON list, one after the other.
COMMANDS = """
import json, sys
from cascadekit.cli import main
for arguments in json.loads(sys.argv[1]):
    try:
        main(arguments)
    except SystemExit as ended:
        assert not ended.code, arguments
"""
UNTOUCHED = """
loaded = {"torch", "diffusers", "transformers"} & set(sys.modules)
assert not loaded, loaded
"""
REFUSE = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"torch", "diffusers", "transformers"}:
            raise ImportError(name + " is not to be imported")
sys.meta_path.insert(0, Refuse())
"""


def run_commands(code: str, *commands: Sequence[object], **environment: str) -> None:
    """Run `code` on the commands in a process of its own."""
    arguments = json.dumps([[str(each) for each in command] for command in commands])
    run, env = [sys.executable, "-c", code, arguments], {**os.environ, **environment}
    ended = subprocess.run(run, env=env, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr


def contents(root: Path) -> dict[str, bytes]:
    """The files of a bundle; the times in its manifest are 0."""
    files = {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}
    manifest = json.loads(files["cascade.json"])
    for stage in manifest["stages"].values():
        for file in stage["files"]:
            file["mtime_ns"] = 0
    return {**files, "cascade.json": json.dumps(manifest).encode()}


def test_two_exports_are_the_same_bytes(tiny: Path, tmp_path: Path) -> None:
    """Two processes with other hashes of strings, other output folders; only times may differ."""
    ways = ("copy", "link")
    for seed, folder in (("1", tmp_path / "one"), ("2", tmp_path / "elsewhere/two")):
        commands = [["export", tiny / "original", "-o", folder / way, "--weights", way] for way in ways]
        run_commands(COMMANDS, *commands, PYTHONHASHSEED=seed)
    for way in ways:
        one, two = contents(tmp_path / "one" / way), contents(tmp_path / "elsewhere/two" / way)
        assert one == two
        assert len(one) == 1 + 3 + 3 + 2 + 4 + 1  # graphs of the stages, their weights, the manifest


def test_nothing_here_imports_torch(tiny: Path, tmp_path: Path) -> None:
    """Neither where it is installed nor, of exports, where it is not."""
    query = "lora_unet_down_blocks_0_2_attention_attn_to_q"
    lora = tmp_path / "lora.safetensors"
    numbers = load_file(tiny / "model/prior" / WEIGHTS)["down_blocks.0.2.attention.to_q.weight"]
    save_file({f"{query}.lora_down.weight": numbers[:4].copy(), f"{query}.lora_up.weight": numbers[:, :4].copy()}, lora)
    bundle = tmp_path / "bundle"
    exports = [
        ["export", tiny / "model", "-o", bundle, "--lora", f"{lora}:0.5", "--stage", "prior", "--force"],
        ["export", tiny / "model", "-o", bundle, "--force"],
    ]
    others = [["validate", bundle], ["lora", "apply", bundle, lora], ["lora", "apply", bundle, "--undo"]]
    run_commands(COMMANDS + UNTOUCHED, *exports, *others)
    run_commands(REFUSE + COMMANDS, *exports)


# --- What is refused, and what is left behind


def refused(message: str, *arguments: object, code: int = 1) -> None:
    result = call(*arguments)
    assert result.exit_code == code, result.output
    assert message in result.stderr, result.stderr
    assert "Traceback" not in result.output


def test_missing_tensors_are_named_together(prior: Path, tmp_path: Path) -> None:
    tensors = load_file(prior / WEIGHTS)
    lost = ("clf.1.bias", "embedding.1.weight", "up_blocks.0.0.depthwise.bias")
    save_file({name: tensor for name, tensor in tensors.items() if name not in lost}, prior / WEIGHTS)
    refused(
        "missing (3): embedding.1.weight, clf.1.bias, up_blocks.0.0.depthwise.bias",
        "export",
        prior,
        "-o",
        tmp_path / "b",
    )
    assert [path.name for path in tmp_path.iterdir()] == ["prior"]


def test_a_config_of_the_other_variant(catalog_folder: Path, tmp_path: Path) -> None:
    write_stand_in(catalog_folder / "diffusers_prior.json", tmp_path / WEIGHTS, "BF16", holes=True)
    config = to_json(PRESETS[Stage.PRIOR, Variant.LITE])
    (tmp_path / "config.json").write_text(json.dumps(config))
    refused(
        "its config.json describes the lite prior, the file holds the full one",
        "export",
        tmp_path,
        "-o",
        tmp_path / "b",
    )
    assert {path.name for path in tmp_path.iterdir()} == {WEIGHTS, "config.json"}


def test_a_folder_that_cannot_be_written(prior: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path, *arguments: object, **options: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system", str(path))

    monkeypatch.setattr(Path, "mkdir", refuse)
    refused("b: cannot be written: Read-only file system", "export", prior, "-o", tmp_path / "b")
    monkeypatch.undo()
    assert [path.name for path in tmp_path.iterdir()] == ["prior"]


def test_a_full_disk_while_copying(prior: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    refused("bytes needed): No space left on device", "export", prior, "-o", tmp_path / "b", "--weights", "copy")
    assert [path.name for path in tmp_path.iterdir()] == ["prior"]


def test_a_full_disk_halfway_through_a_copy(prior: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The thread that hashes behind the writer must end, too."""
    left = [100_000]

    def copy(source: int, offset: int, nbytes: int, target: int) -> int:
        left[0] -= nbytes
        if left[0] < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return os.write(target, os.pread(source, nbytes, offset))

    monkeypatch.setattr(copying, "COPY_BLOCK", 30_000)
    monkeypatch.setattr(copying, "_copiers", lambda: [copy])
    with pytest.raises(ConversionError, match="No space left on device"):
        export(prior, tmp_path / "b", weights="copy")
    assert [path.name for path in tmp_path.iterdir()] == ["prior"]


def test_a_full_disk_for_the_graph(prior: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(model: object, path: Path) -> None:
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(onnx, "save_model", full)
    refused("cannot be written: No space left on device", "export", prior, "-o", tmp_path / "b")
    assert [path.name for path in tmp_path.iterdir()] == ["prior"]


def test_a_graph_that_onnx_refuses_is_not_written(prior: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The check runs beside holes that stand in for the weights, and still notices a file that is not there."""
    good = export_stage.write_graphs

    def beyond(config: Any, tensors: Any, options: Any) -> Any:
        last = max(tensors, key=lambda name: tensors[name].offset)
        elsewhere = replace(tensors[last], path=tensors[last].path.with_name("other.safetensors"))
        return good(config, {**tensors, last: elsewhere}, options)

    monkeypatch.setattr(export_stage, "write_graphs", beyond)
    with pytest.raises(ExportError, match=r"prior/model\.onnx: refused by onnx.*other\.safetensors"):
        export(prior, tmp_path / "b")
    assert [path.name for path in tmp_path.iterdir()] == ["prior"]


@pytest.mark.parametrize("options", [["--no-hash"], pytest.param([], marks=pytest.mark.slow)], ids=["", "hashed"])
def test_full_size_takes_no_memory(catalog_folder: Path, tmp_path: Path, options: list[str]) -> None:
    """A linked export of a full prior, 7.2 GB, reads its header and samples alone; hashing it reads blocks."""
    (tmp_path / "model").mkdir()
    write_stand_in(catalog_folder / "original_stage_c.json", tmp_path / "model/stage_c.safetensors", "BF16", holes=True)
    peak = "import resource; print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, file=sys.stderr)"
    measured = COMMANDS + UNTOUCHED + peak
    export = ["export", str(tmp_path / "model"), "-o", str(tmp_path / "bundle"), "--weights", "link", *options]
    # A process of its own in between: a child counts as large as the one that started it.
    launch = "import subprocess, sys; sys.exit(subprocess.run(sys.argv[1:]).returncode)"
    ended = subprocess.run(
        [sys.executable, "-I", "-S", "-c", launch, sys.executable, "-c", measured, json.dumps([export])],
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    assert int(ended.stderr.strip().splitlines()[-1]) * 1024 < 120_000_000
