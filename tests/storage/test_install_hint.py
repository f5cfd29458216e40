"""The command for a missing extra works from where cascadekit came; the origins are those of PEP 610."""

import json
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cascadekit.storage.install_hint import ROOT, install_hint

REQUIRES = [
    "numpy>=1.26",
    "onnx>=1.16; extra == 'export'",
    'tensorrt>=10.13; extra == "tensorrt"',
    "onnx>=1.16; extra == 'tensorrt'",
]


def came_from(monkeypatch: pytest.MonkeyPatch, origin: dict[str, Any] | None) -> None:
    text = None if origin is None else json.dumps(origin)
    monkeypatch.setattr(metadata, "distribution", lambda name: SimpleNamespace(read_text=lambda file: text))
    monkeypatch.setattr(metadata, "requires", lambda name: REQUIRES)


def test_a_checkout(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(ROOT)
    assert install_hint("cpu") == "pip install -e '.[cpu]'"
    monkeypatch.chdir(tmp_path)
    assert install_hint("cpu") == f"pip install -e '{ROOT}[cpu]'"


@pytest.mark.parametrize(
    ("origin", "command"),
    [
        (None, "pip install 'cascadekit[export]'"),
        (
            {"url": "https://git.example/k.git", "vcs_info": {"vcs": "git", "commit_id": "7e1f"}},
            "pip install 'cascadekit[export] @ git+https://git.example/k.git@7e1f'",
        ),
        (
            {"url": "https://example.org/cascadekit-0.1.0-py3-none-any.whl", "archive_info": {}},
            "pip install 'cascadekit[export] @ https://example.org/cascadekit-0.1.0-py3-none-any.whl'",
        ),
        ({"url": "file:///gone/cascadekit-0.1.0-py3-none-any.whl", "archive_info": {}}, "pip install 'onnx>=1.16'"),
    ],
    ids=["index", "git", "address", "wheel that is gone"],
)
def test_an_installed_package(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, origin: dict[str, Any] | None, command: str
) -> None:
    came_from(monkeypatch, origin)
    assert install_hint("export", tmp_path) == command


def test_a_wheel_and_a_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    wheel = tmp_path / "di st" / "cascadekit-0.1.0-py3-none-any.whl"
    wheel.parent.mkdir()
    wheel.touch()
    came_from(monkeypatch, {"url": wheel.as_uri(), "archive_info": {}})
    assert install_hint("cpu", tmp_path) == f"pip install '{wheel}[cpu]'"
    monkeypatch.chdir(tmp_path)
    assert install_hint("cpu", tmp_path) == f"pip install './{wheel.relative_to(tmp_path)}[cpu]'"
    wheel.unlink()
    assert install_hint("tensorrt", tmp_path) == "pip install 'tensorrt>=10.13' 'onnx>=1.16'"
