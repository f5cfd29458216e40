"""The choices that the page offers; a job runs on those that it made."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from cascadekit.converters.lora.bundle_cache import find_lora, listed_loras
from cascadekit.runtime.cascade import Cascade
from cascadekit.runtime.images.png import read_settings
from cascadekit.runtime.ui.models import Choice, Models, bundles_at
from cascadekit.schemas.errors import UsageError
from helpers.page import QUICK, call, events, serving_models
from helpers.whole import Whole


@pytest.fixture
def folder(whole: Whole, tmp_path: Path) -> Path:
    """Two bundles, and beside them what is none."""
    models = tmp_path / "models"
    models.mkdir()
    for name in ("b", "a", ".hidden"):
        (models / name).symlink_to(whole.bundle)
    (models / "words.txt").write_text("")
    (models / "empty").mkdir()
    return models


def never(path: Path, engine: str, loras: Sequence[tuple[str, float]]) -> Cascade:
    raise AssertionError("nothing is opened")


def test_bundles_are_found_in_a_folder_and_beside_a_bundle(whole: Whole, folder: Path) -> None:
    assert list(bundles_at(folder)) == ["a", "b"]
    assert next(iter(bundles_at(whole.bundle))) == "bundle"
    assert list(bundles_at(folder / "b")) == ["b", "a"]
    with pytest.raises(UsageError, match="not a bundle"):
        bundles_at(folder / "empty")


def test_a_job_runs_on_what_it_chose(whole: Whole, folder: Path, tmp_path: Path) -> None:
    """The cascade that is open stays open for the same choice, and is closed before another one is opened."""
    opened: list[Any] = []

    def opener(path: Path, engine: str, loras: Sequence[tuple[str, float]]) -> Cascade:
        opened.append((path.name, engine, list(loras)))
        return Cascade.open(path, engine=engine, threads=1)

    loras = {"style": "/loras/style.safetensors"}
    with Models(folder, opener, loras=lambda: loras) as models, serving_models(models, tmp_path / "images") as server:
        info = call(server, "GET", "/api/info").json
        assert info.items() >= {"bundles": ["a", "b"], "loras": ["style"], "bundle": "a", "engine": "auto"}.items()
        engines = call(server, "GET", "/api/bundles/b").json["engines"]
        assert engines[:2] == ["auto", "onnxruntime"]
        assert not [name for name in engines if name.startswith("tensorrt")]  # the bundle has no plans
        chosen = {"bundle": "b", "engine": "onnxruntime", "loras": [{"name": "style", "strength": "0.5"}]}
        jobs = [
            events(server, call(server, "POST", "/api/jobs", {"prompt": "x", **QUICK, **choice}).json["id"])
            for choice in ({"engine": "onnxruntime"}, {"engine": "onnxruntime"}, chosen)
        ]
    assert [told[-1][0] for told in jobs] == ["done"] * 3
    assert [name for told in jobs for name, _ in told if name == "opening"] == ["opening"] * 2
    assert opened == [("a", "onnxruntime", []), ("b", "onnxruntime", [("/loras/style.safetensors", 0.5)])]
    settings = [read_settings(tmp_path / "images" / f"{number:04d}.png") or {} for number in (0, 2)]
    assert settings[0].get("loras") is None
    assert settings[1]["loras"] == [{"name": "/loras/style.safetensors", "strength": 0.5}]


def test_a_bundle_that_cannot_be_opened_is_the_jobs_error(whole: Whole, folder: Path, tmp_path: Path) -> None:
    def opener(path: Path, engine: str, loras: Sequence[tuple[str, float]]) -> Cascade:
        if path.name == "a":
            raise UsageError("not this one")
        return Cascade.open(path, engine="onnxruntime", threads=1)

    with serving_models(Models(folder, opener), tmp_path / "images") as server:
        told = [
            events(server, call(server, "POST", "/api/jobs", {"prompt": "x", "bundle": name, **QUICK}).json["id"])[-1]
            for name in ("a", "b")
        ]
    assert told[0] == ("error", {"message": "not this one", "images": []})
    assert told[1][0] == "done"


@pytest.mark.parametrize("strength", ["x", None, "nan", 1e999, 10**400, [], 1001])
def test_odd_strengths_are_refused(folder: Path, strength: Any) -> None:
    models = Models(folder, never, loras=lambda: {"style": "style"})
    with pytest.raises(UsageError, match="style: expected a strength of -1000 to 1000"):
        models.choice("a", None, [{"name": "style", "strength": strength}])


def test_loras_of_the_command_are_chosen_first(folder: Path) -> None:
    models = Models(
        folder, never, first_loras=(("/x/own.safetensors", 0.8), ("style", 1.0)), loras=lambda: {"s": "style"}
    )
    assert models.offered_loras() == {"s": "style", "/x/own.safetensors": "/x/own.safetensors"}
    assert models.choice(None, None, None) == Choice("a", "auto", models.first_loras)
    assert models.choice("b", None, []).loras == ()


def test_loras_are_listed_by_names_that_find_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given, named = tmp_path / "given", tmp_path / "named"
    for path in (given / "a.safetensors", named / "a.safetensors", named / "b.safetensors", named / ".c.safetensors"):
        path.parent.mkdir(exist_ok=True)
        path.touch()
    (named / "peft").mkdir()
    (named / "peft" / "adapter_model.safetensors").touch()
    (named / "notes.txt").touch()
    monkeypatch.setenv("CASCADEKIT_LORAS", f"{tmp_path / 'none'}:{named}")
    found = listed_loras([given])
    assert found == {"a": str(given / "a.safetensors"), "b": "b", "peft": str(named / "peft")}
    assert [find_lora(name) for name in found.values()] == [
        given / "a.safetensors",
        named / "b.safetensors",
        named / "peft",
    ]
