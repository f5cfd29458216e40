"""The tiny cascade, made once for all tests: original files, model folder, bundle.

Each fixture imports what it needs: tests of schemas/ and storage/ run without torch and onnx.
"""

import gc
import importlib.util
import multiprocessing
import os
import shutil
import signal
from collections.abc import Iterator
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from cascadekit.runtime.engines.engine_table import EngineChoice
    from helpers.whole import Whole

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
DATA = Path(__file__).parent / "data"
# What commands that tests kill import when they are called.
PRELOADED = (
    "pytest onnxruntime cascadekit.cli.convert cascadekit.converters.checkpoints.convert cascadekit.cli.lora.apply "
    "cascadekit.converters.lora.merge_bundle cascadekit.cli.generate_prompt_file "
    "cascadekit.runtime.batch.batch_runner"
).split()


def pytest_configure() -> None:
    """Let signals have their usual effect, here and in children, where whoever started the tests had them ignored."""
    for number, usual in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, usual)


@pytest.fixture(scope="module", autouse=True)
def imports_out_of_the_collectors_way() -> None:
    """Beside torch, diffusers and transformers a full collection takes half a second, unless the collector may skip
    what those modules made."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """The networks are tiny: a second thread costs more than it does."""
    if importlib.util.find_spec("torch"):
        import torch

        torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def nothing_is_flushed() -> Iterator[None]:
    """Tests write thousands of files, and a flush takes milliseconds; what a process wrote survives it without."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield


@pytest.fixture(scope="session", autouse=True)
def choices() -> "Iterator[tuple[EngineChoice, ...]]":
    """The engines of "auto". Those of a CPU are left out of the table for all tests, which so get fp32 everywhere."""
    from cascadekit.runtime.engines import engine_table

    found = engine_table.CHOICES
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine_table, "CHOICES", tuple(choice for choice in found if choice.device != "cpu"))
        yield found


@pytest.fixture(scope="session")
def server() -> ForkServerContext:
    """Starts processes that have imported everything, as forks of another; a process of tests has one server."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    return context


@pytest.fixture(scope="session")
def catalog_folder() -> Path:
    return DATA / "catalog"


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds original/, model/ and bundle/ of the tiny cascade; read only."""
    pytest.importorskip("onnx")
    from cascadekit import convert, export
    from cascadekit.converters.checkpoints.tiny_cascade import write_tiny_cascade

    root = tmp_path_factory.mktemp("tiny")
    write_tiny_cascade(root / "original")
    convert([root / "original"], root / "model", "diffusers")
    export(root / "model", root / "bundle", weights="copy")
    return root


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory) -> "Whole":
    """A cascade of all stages, and lite ones beside it; read only."""
    from helpers.whole import make_whole

    return make_whole(tmp_path_factory.mktemp("whole"))


@pytest.fixture(scope="session")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny cascade's original files alone, for tests that need no bundle; read only."""
    from cascadekit.converters.checkpoints.tiny_cascade import write_tiny_cascade

    folder = tmp_path_factory.mktemp("original")
    write_tiny_cascade(folder)
    return folder


@pytest.fixture(scope="module")
def browser() -> "Iterator[Any]":
    """Headless Chromium; without it or playwright the test is skipped."""
    if CHROMIUM is None:
        pytest.skip("no Chromium is installed")
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright drives the browser")
    with playwright.sync_playwright() as driver:
        opened = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture(scope="session")
def bindings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders of TensorRT's bindings by version, and of empty libraries by major version; read only."""
    from helpers.tensorrt_bindings_of import unpack_bindings

    return unpack_bindings(tmp_path_factory.mktemp("tensorrt"))
