"""The server of the nvidia-pytriton wheel, on the CPU, over a repository whose stages run in Python."""

import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cascadekit import Cascade
from cascadekit.converters.triton.repository import export_triton
from cascadekit.converters.triton.triton_options import TritonOptions
from cascadekit.runtime.engines.onnxruntime import OnnxRuntimeEngine
from cascadekit.runtime.text.tokenizer import ClipTokenizer
from cascadekit.storage.bundle import open_bundle
from helpers.triton_prompts import PROMPTS, QUICK
from helpers.triton_server import END, PYTHON, ROOT, Served, serving


@pytest.fixture(scope="module")
def served(bundle: Path, environment: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("served")
    export_triton(bundle, folder / "repository", TritonOptions(backend="python", device="cpu"))
    with serving(folder) as server:
        yield server


@pytest.fixture(scope="module")
def expected(bundle: Path) -> dict[int, Any]:
    """Each prompt's image, generated alone, without a server, by the same whole graphs."""
    opened = open_bundle(bundle)
    engine = OnnxRuntimeEngine(opened)
    engine.in_parts = ()
    found = {}
    with Cascade(engine, opened.manifest, ClipTokenizer.open(None), rows=1) as cascade:
        for number, prompt in enumerate(PROMPTS):
            image = cascade.generate(prompt, negative="gray", seed=[number], **QUICK).images[0]
            found[number] = np.asarray(image)
    return found


def test_callers_share_batches_and_wrong_calls_fail_alone(
    served: Served, expected: dict[int, Any], tmp_path: Path
) -> None:
    found = served.call("concurrent", tmp_path)
    with np.load(tmp_path / "images.npz") as images:
        for number, image in expected.items():
            assert np.array_equal(images[str(number)][0], image), PROMPTS[number]
    assert found["images"] > len(PROMPTS)  # those that were wrong reached the model, too
    assert found["batches"] < len(PROMPTS)
    said = {
        "a size that is no multiple of 8": "width 63: expected a multiple of 8",
        "an unknown sampler": "sampler 'euler': expected",
        "steps beyond the limit": "steps: 101: expected at most 100",
        "no prompt": "prompt",
        "other bytes than UTF-8": "prompt: expected text in UTF-8",
        "rows of two sizes": "rows of 128x96 and 64x96: expected one size",
    }
    assert found["errors"].keys() == said.keys()
    for name, words in said.items():
        assert words in found["errors"][name], name


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
    assert [answer[0] for answer in found["answers"]] == [1, 2, 0][-len(found["answers"]) :]
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
    assert served.processes()
    served.process.send_signal(signal.SIGTERM)
    assert served.process.wait(END) == 0, served.log.read_text()[-4000:]
    assert not served.processes()
    log = served.log.read_text()
    assert "Traceback" not in log
    assert "failed to stop" not in log
