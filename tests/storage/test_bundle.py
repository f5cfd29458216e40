"""Loading a bundle notices files that are missing, cut short, replaced or changed, and lets others pass."""

import json
import os
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from cascadekit import Cascade
from cascadekit.schemas.errors import CheckpointError, UsageError
from cascadekit.schemas.stages import Stage
from cascadekit.storage.bundle import Bundle, open_bundle
from cascadekit.storage.file_hashes import find_change
from helpers.files import flip, touch

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture
def prior(tiny: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny / "model" / "prior", tmp_path / "prior"))


@pytest.fixture
def copied(prior: Path, tmp_path: Path) -> Bundle:
    from cascadekit import export

    export(prior, tmp_path / "copied", weights="copy")
    return open_bundle(tmp_path / "copied")


@pytest.fixture
def linked(prior: Path, tmp_path: Path) -> Bundle:
    from cascadekit import export

    export(prior, tmp_path / "linked", weights="link")
    return open_bundle(tmp_path / "linked")


def weights_of(bundle: Bundle) -> Path:
    return bundle.root / bundle.entry(Stage.PRIOR).files[-1].path


def refused(bundle: Bundle, message: str) -> None:
    """One line that names the file; the graph is not given out."""
    with pytest.raises(CheckpointError, match=message) as caught:
        bundle.graph(Stage.PRIOR)
    assert "\n" not in str(caught.value)
    assert str(bundle.root) in str(caught.value)


def test_a_sound_bundle(copied: Bundle, linked: Bundle) -> None:
    for bundle in (copied, linked):
        assert bundle.graph(Stage.PRIOR) == bundle.root / "prior" / "model.onnx"
        with pytest.raises(UsageError, match="no graph 'encoder'; it has model, conditioning, step"):
            bundle.graph(Stage.PRIOR, "encoder")
        assert bundle.graph(Stage.PRIOR, "step") == bundle.root / "prior" / "step.onnx"


def test_missing(copied: Bundle, linked: Bundle) -> None:
    for bundle in (copied, linked):
        path = weights_of(bundle)
        path.rename(path.with_suffix(".away"))
        refused(bundle, r"safetensors: expected \d+ bytes, it is missing; put it back, or export the model again")


def test_cut_short(copied: Bundle, linked: Bundle) -> None:
    for bundle in (copied, linked):
        os.truncate(weights_of(bundle), 1000)
    refused(copied, r"expected \d+ bytes, it has 1000; the bundle is damaged, export it again")
    refused(linked, r"expected \d+ bytes, it has 1000; the model's file, which this is a hard link to, was changed")


@pytest.mark.parametrize("position", [0, 1000, -1])
def test_a_byte_of_the_graph(copied: Bundle, position: int) -> None:
    """Whatever its time of change says."""
    path = copied.root / "prior" / "model.onnx"
    before = path.stat()
    flip(path, position % before.st_size)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    refused(copied, r"model\.onnx: expected SHA-256 [0-9a-f]{12}\.\.\., found [0-9a-f]{12}\.\.\.: changed")


@pytest.mark.parametrize("where", ["header", "first", "middle", "last"])
def test_changed_in_place_behind_a_hard_link(prior: Path, linked: Bundle, where: str) -> None:
    size = (prior / WEIGHTS).stat().st_size
    start = 8 + struct.unpack("<Q", (prior / WEIGHTS).read_bytes()[:8])[0]
    flip(prior / WEIGHTS, {"header": 20, "first": start, "middle": (start + size) // 2, "last": size - 1}[where])
    message = "expected {} .* changed since the export; the model's file, which this is a hard link to"
    refused(linked, message.format("SHA-256"))
    file = linked.entry(Stage.PRIOR).files[-1].model_copy(update={"sha256": None})  # as --no-hash leaves it
    assert "expected fingerprint" in str(find_change(linked.root / file.path, file))


def test_saved_again_behind_a_hard_link(prior: Path, linked: Bundle) -> None:
    """safetensors' own writer writes into the file that is there."""
    tensors = {name: tensor * np.float32(2) for name, tensor in load_file(prior / WEIGHTS).items()}
    data = (prior / WEIGHTS).read_bytes()
    inode = (prior / WEIGHTS).stat().st_ino
    save_file(tensors, prior / "new.safetensors", {"format": "pt"})
    with (prior / WEIGHTS).open("wb") as file:
        file.write((prior / "new.safetensors").read_bytes())
    touch(prior / WEIGHTS)
    assert (prior / WEIGHTS).stat().st_ino == inode
    refused(linked, "expected (SHA-256|[0-9]+ bytes)")
    (prior / WEIGHTS).write_bytes(data)
    linked.graph(Stage.PRIOR)  # the old content again, whatever its time


def test_replacing_the_models_file_leaves_a_linked_bundle_alone(prior: Path, linked: Bundle) -> None:
    (prior / "new").write_bytes(b"other weights")
    (prior / "new").replace(prior / WEIGHTS)
    linked.graph(Stage.PRIOR)


def test_weights_replaced_by_others_of_the_same_size(copied: Bundle) -> None:
    path = weights_of(copied)
    tensors = {name: np.ascontiguousarray(tensor[::-1]) for name, tensor in load_file(path).items()}
    save_file(tensors, path.with_name("other"), {"format": "pt"})
    data = path.read_bytes()
    header = 8 + struct.unpack("<Q", data[:8])[0]
    other = path.with_name("other").read_bytes()
    path.with_name("other").unlink()
    path.write_bytes(data[:header] + other[-(len(data) - header) :])
    touch(path)
    refused(copied, "expected SHA-256 .* the bundle is damaged, export it again")


def test_touched_but_equal(copied: Bundle, linked: Bundle, tmp_path: Path) -> None:
    for bundle in (copied, linked):
        touch(weights_of(bundle))
        touch(bundle.root / "prior" / "model.onnx")
        bundle.graph(Stage.PRIOR)
    shutil.copytree(copied.root, tmp_path / "moved", copy_function=shutil.copyfile)
    open_bundle(tmp_path / "moved").graph(Stage.PRIOR)


def test_a_file_of_the_same_time_is_trusted(linked: Bundle) -> None:
    """No byte of it is read: this is what makes loading take milliseconds."""
    path = weights_of(linked)
    before = path.stat()
    flip(path, before.st_size - 1)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    linked.graph(Stage.PRIOR)


def test_the_cascade_says_it_in_one_line(prior: Path, linked: Bundle) -> None:
    flip(prior / WEIGHTS, 200_000)
    from cascadekit.runtime.engines.onnxruntime import OnnxRuntimeEngine

    with pytest.raises(CheckpointError, match="changed in place"):
        OnnxRuntimeEngine(linked).load(Stage.PRIOR)


def test_older_bundles_say_what_to_do(tiny: Path, tmp_path: Path) -> None:
    content = json.loads((tiny / "bundle/cascade.json").read_text())
    for version, todo in ((1, "export the model again"), (3, "use the cascadekit that made it")):
        (tmp_path / "cascade.json").write_text(json.dumps(content | {"version": version, "new": 1}))
        with pytest.raises(CheckpointError, match=f"a bundle of version {version}, expected version 2; {todo}"):
            Cascade.open(tmp_path)
    (tmp_path / "cascade.json").write_text(json.dumps(content | {"format": "other", "version": 1}))
    with pytest.raises(CheckpointError, match="not a manifest of format cascadekit-bundle 2"):
        open_bundle(tmp_path)


def test_manifests_whose_graphs_are_not_theirs(tiny: Path, tmp_path: Path) -> None:
    for change, message in (
        ({"graphs": {}}, "no graph 'model'"),
        ({"files": [{**json_of(tiny)["files"][-1]}]}, "a graph that is not listed among the files"),
    ):
        content = json.loads((tiny / "bundle/cascade.json").read_text())
        content["stages"]["prior"] |= change
        (tmp_path / "cascade.json").write_text(json.dumps(content))
        with pytest.raises(CheckpointError, match=message):
            open_bundle(tmp_path)


def json_of(tiny: Path) -> dict[str, list[dict[str, object]]]:
    content: dict[str, list[dict[str, object]]] = json.loads((tiny / "bundle/cascade.json").read_text())["stages"][
        "prior"
    ]
    return content
