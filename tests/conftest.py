"""The tiny cascade, made once for all tests: original files, model folder, bundle."""

import signal
from pathlib import Path

import pytest
import torch
from tensorrt_bindings_of import unpack_bindings

from cascadekit import convert, export
from cascadekit.converters.tiny import write_tiny_cascade
from whole import Whole, make_whole

DATA = Path(__file__).parent / "data"


def pytest_configure() -> None:
    """Let signals have their usual effect, here and in children, where whoever started the tests had them ignored."""
    for number, usual in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, usual)


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """The networks are tiny: a second thread costs more than it does."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def catalog_folder() -> Path:
    return DATA / "catalog"


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds original/, model/ and bundle/ of the tiny cascade; read only."""
    root = tmp_path_factory.mktemp("tiny")
    write_tiny_cascade(root / "original")
    convert([root / "original"], root / "model", "diffusers")
    export(root / "model", root / "bundle", weights="copy")
    return root


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Whole:
    """A cascade of all stages, and lite ones beside it; read only."""
    return make_whole(tmp_path_factory.mktemp("whole"))


@pytest.fixture(scope="session")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny cascade's original files alone, for tests that need no bundle; read only."""
    folder = tmp_path_factory.mktemp("original")
    write_tiny_cascade(folder)
    return folder


@pytest.fixture(scope="session")
def bindings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders of TensorRT's bindings by version, and of empty libraries by major version; read only."""
    return unpack_bindings(tmp_path_factory.mktemp("tensorrt"))
