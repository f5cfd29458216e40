"""The server of the nvidia-pytriton wheel, on the CPU, over a repository whose stages run in Python."""

import json
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cascadekit import Cascade
from cascadekit.converters.triton.triton_options import TritonOptions
from cascadekit.converters.triton.write_repository import export_triton
from helpers.format_pictures import PROMPTS as JUDGED
from helpers.format_pictures import SEED, one_by_one, pixels, record_pictures
from helpers.matrix import Matrix
from helpers.triton_prompts import PROMPTS, QUICK
from helpers.triton_server import ALONE, END, PYTHON, ROOT, Served, is_running, pytriton, serving


@pytest.fixture(scope="module")
def served(bundle: Path, environment: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("served")
    export_triton(bundle, folder / "repository", TritonOptions(backend="python", device="cpu"))
    with serving(folder) as server:
        yield server


@pytest.fixture(scope="module")
def expected(bundle: Path, environment: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Any]:
    """Each prompt's image, generated alone, without a server, by the same whole graphs."""
    path = tmp_path_factory.mktemp("alone") / "images.npz"
    subprocess.run([environment, ALONE, bundle, path], check=True, timeout=300)
    with np.load(path) as images:
        return {number: images[str(number)] for number in range(len(PROMPTS))}


def test_numpy_1_changes_no_more_than_the_last_bit(bundle: Path, expected: dict[int, Any]) -> None:
    """The server of the wheel needs numpy 1; the images are those of this environment, but for rounding."""
    with Cascade.open(bundle, engine="onnxruntime", rows=1) as cascade:
        image = cascade.generate(PROMPTS[0], negative="gray", seed=[0], **QUICK).images[0]
    assert np.abs(np.asarray(image).astype(int) - expected[0]).max() <= 2


def test_callers_share_batches_and_wrong_calls_fail_alone(
    served: Served, expected: dict[int, Any], tmp_path: Path
) -> None:
    found = served.call("concurrent", tmp_path)
    with np.load(tmp_path / "images.npz") as images:
        alone = np.stack([expected[number] for number in range(len(PROMPTS))])
        assert np.array_equal(images["first"], alone)
        assert np.array_equal(images["again"], alone)
    assert found["images"] == len(PROMPTS)
    assert found["batches"] < len(PROMPTS)
    said = {
        "a size that is no multiple of 8": "width 63: expected a multiple of 8",
        "an unknown sampler": "sampler 'euler': expected",
        "steps beyond the limit": "steps: 101: expected at most 100",
        "no prompt": "prompt: expected a text for each image, found none",
        "other bytes than UTF-8": "prompt: expected text in UTF-8",
        "rows of two sizes": "rows of 128x96 and 64x96: expected one size",
    }
    assert found["errors"].keys() == said.keys()
    for name, words in said.items():
        assert words in found["errors"][name], name


@pytest.mark.slow
def test_the_judge_sees_what_was_asked_for(served: Served, bundle: Path, tmp_path: Path, matrix: Matrix) -> None:
    calls = [{"prompt": prompt, "seed": SEED} for prompt in JUDGED]
    (tmp_path / "calls.json").write_text(json.dumps(calls))
    served.call("listed", tmp_path)
    with np.load(tmp_path / "images.npz") as images:
        theirs = pixels(images["images"])
    ours = one_by_one(bundle, {"seed": SEED})
    program = "nvidia-pytriton with Triton"
    record_pictures(matrix, "triton repository", program, theirs, ours, unquantised=ours, version=pytriton())


def test_grpc_takes_rows_and_stops_what_is_cancelled(served: Served, expected: dict[int, Any], tmp_path: Path) -> None:
    found = served.call("remote", tmp_path)
    with np.load(tmp_path / "images.npz") as images:
        assert np.array_equal(images["both"], np.stack([expected[0], expected[3]]))
        assert np.array_equal(images["again"][0], expected[0])
    assert [each["seed"] for each in found["settings"]] == [0, 3]
    assert [each["prompt"] for each in found["settings"]] == [PROMPTS[0], PROMPTS[3]]
    assert "CANCELLED" in found["cancelled"]


def test_previews_come_before_the_image(served: Served, expected: dict[int, Any], tmp_path: Path) -> None:
    found = served.call("stream", tmp_path)
    assert [answer[0] for answer in found["answers"]] == [1, 2, 0]
    assert found["answers"][-1] == [0, 1, *expected[0].shape]
    with np.load(tmp_path / "images.npz") as images:
        assert np.array_equal(images["0"][0], expected[0])
        assert images["1"].std() > 1
    assert len(found["errors"]) == 1
    assert "previews: expected one number from 0 to 3, found 9" in found["errors"][0]


def test_the_examples_run(served: Served, expected: dict[int, Any], tmp_path: Path) -> None:
    from PIL import Image

    settings = [f"{name}={value}" for name, value in {"seed": 0, "negative": "gray", **QUICK}.items()]
    for more in ([], ["previews=1"]):
        words = ["triton_client.py", PROMPTS[0], "image.png", f"url={served.grpc}", *settings, *more]
        _run_example(words, tmp_path)
        assert np.array_equal(np.asarray(Image.open(tmp_path / "image.png")), expected[0])
    assert (tmp_path / "image-preview1.png").exists()
    assert "2 calls in" in _run_example(["triton_load.py", "2", "2", served.http, "64"], tmp_path)


def _run_example(words: list[str], folder: Path) -> str:
    command = [str(PYTHON), str(ROOT / "examples" / words[0]), *words[1:]]
    ended = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


def test_it_ends_when_it_is_told(served: Served) -> None:
    """The last test of the server."""
    models = served.processes()
    assert models
    served.process.send_signal(signal.SIGTERM)
    assert served.process.wait(END) == 0, served.log.read_text()[-4000:]
    assert not [pid for pid in models if is_running(pid)]
    log = served.log.read_text()
    assert "Traceback" not in log
    assert "failed to stop" not in log
