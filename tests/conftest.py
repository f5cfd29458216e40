"""The tiny cascade, made once for all tests: original files, model folder, bundle.

Each fixture imports what it needs: tests of schemas/ and storage/ run without torch and onnx.
"""

import gc
import importlib.util
import multiprocessing
import os
import shutil
import signal
import sys
from collections.abc import Generator, Iterator
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from helpers.made_once import made_once

if TYPE_CHECKING:
    from cascadekit.parity.reference_run import ReferenceOutputs
    from cascadekit.runtime.engines.engine_table import EngineChoice
    from helpers.matrix import Matrix
    from helpers.whole import Whole

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
TESTS = Path(__file__).parent
DATA = TESTS / "data"
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
    # Tests start hundreds of processes, and each would compile this package again.
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    sys.dont_write_bytecode = False


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Modules and tests stay in memory, so the garbage collector would look through them in vain, for seconds."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Let `-m matrix` choose the tests that record cells of docs/formats.md.

    Tests of whole pages take long, so they come first: at the end, one of two processes would wait for them."""
    items.sort(key=lambda item: item.path.parent != TESTS)
    for item in items:
        if "matrix" in getattr(item, "fixturenames", ()):
            item.add_marker("matrix")


@pytest.fixture
def matrix(request: pytest.FixtureRequest) -> "Matrix":
    """Records cells of docs/formats.md, and compares them with the committed ones."""
    from helpers.matrix import Matrix

    return Matrix(request.node.nodeid.partition("[")[0])


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
    """Holds original/, model/ and bundle/ of the tiny cascade; read only.

    Each process has a copy: tests make hard links to its files, and record verdicts in its bundle."""
    pytest.importorskip("onnx")
    from cascadekit import convert, export
    from cascadekit.converters.checkpoints.tiny_cascade import write_tiny_cascade

    def make(root: Path) -> None:
        write_tiny_cascade(root / "original")
        convert([root / "original"], root / "model", "diffusers")
        export(root / "model", root / "bundle", weights="copy")

    return shutil.copytree(made_once(tmp_path_factory, "tiny-of-all", make), tmp_path_factory.mktemp("copy") / "tiny")


@pytest.fixture(scope="session")
def example(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundle of the example model; read only."""
    from cascadekit import export
    from cascadekit.converters.checkpoints.example_model import EXAMPLE_MODEL

    return made_once(tmp_path_factory, "models", lambda folder: export(EXAMPLE_MODEL, folder / "example")) / "example"


@pytest.fixture(scope="session")
def tiny_outputs(tiny: Path) -> "ReferenceOutputs":
    """The reference's outputs for every stage of the tiny bundle and for its image, with the floors of every type."""
    from cascadekit.converters.checkpoints.open_model import open_model
    from cascadekit.parity.reference.loading import reference_engine
    from cascadekit.parity.reference_run import run_reference
    from cascadekit.storage.bundle import open_bundle

    opened = open_bundle(tiny / "bundle")
    return run_reference(reference_engine(open_model([tiny / "model"]), tuple(opened.manifest.stages)), opened)


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory) -> "Whole":
    """A cascade of all stages, and lite ones beside it; read only."""
    from helpers.whole import Whole, make_whole

    return Whole(made_once(tmp_path_factory, "whole", make_whole))


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

    return made_once(tmp_path_factory, "tensorrt", unpack_bindings)
