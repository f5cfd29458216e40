"""The cache of plans, addressed by what a plan was built from.

Beside each plan lies a JSON note with its key and manifest entry. Every folder of plans is therefore a cache: a stage's
folder in a bundle, and a folder that bundles share."""

import hashlib
import json
import os
import shutil
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from ...runtime.engines.tensorrt.plan_header import find_contradiction
from ...schemas.errors import CheckpointError
from ...schemas.json_text import load_json
from ...schemas.plan_entries import PlanEntry
from ...storage.file_hashes import sha256_of
from .worker_request import WorkerRequest

FORMAT = 1  # of the key; another one makes all plans unknown
KEY_DIGITS = 16  # of a key, in file names
SUFFIX = ".plan"


@dataclass(frozen=True)
class CachedPlan:
    """A complete plan on disk whose content is that of its note."""

    path: Path
    plan: PlanEntry


def key_of(request: WorkerRequest, version: str, sources: Iterable[str], device: str | None) -> str:
    """SHA-256, in hexadecimal, of everything that decides what a plan is: all bytes of the graph and its weights
    (`sources`, SHA-256s in their order), the backend and its version, targets, the GPU, profiles,
    flags."""
    settings = asdict(request)
    for path in ("graph", "output", "timing_cache"):
        del settings[path]
    settings["weight_inputs"] = []  # a field that jobs had once: plans that were built then keep their keys
    content = {"format": FORMAT, "version": version, "sources": list(sources), "device": device, **settings}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def file_name(request: WorkerRequest, graph: str, precision: str, key: str) -> str:
    """File name of a plan: graph, precision, GPUs or backend, and the first digits of the key."""
    return "-".join((graph, precision, *(request.targets or (request.backend,)), key[:KEY_DIGITS])) + SUFFIX


def find(folder: Path, name: str, key: str) -> CachedPlan | str | None:
    """The plan called `name` in `folder`; None when there is none, a description of the fault when it is damaged."""
    path = folder / name
    try:
        content: dict[str, Any] = load_json(path.with_suffix(".json").read_text(encoding="utf-8"))
        plan = PlanEntry.model_validate(content["plan"])
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, ValidationError) as error:
        return f"{path.with_suffix('.json')}: {type(error).__name__}"
    if content.get("key") != key:
        return f"{path}: made of other things than its name says"
    problem = find_contradiction(path, plan) or _other_content(path, plan)
    return f"{path}: {problem}" if problem else CachedPlan(path, plan)


def _other_content(path: Path, plan: PlanEntry) -> str | None:
    try:
        found = sha256_of(path)
    except CheckpointError as error:
        return str(error)
    return None if found == plan.sha256 else f"expected SHA-256 {plan.sha256[:12]}..., found {found[:12]}..."


def write_note(path: Path, plan: PlanEntry, key: str) -> None:
    """Write the JSON note of the plan at `path`: its key and its manifest entry."""
    content = {"key": key, "plan": plan.model_dump(mode="json")}
    path.with_suffix(".json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def put(plan: Path, folder: Path) -> None:
    """Bring a plan and its note into `folder`, by hard links where the file system has them. The note comes last: a
    plan without a note does not count."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in (plan, plan.with_suffix(".json")):
        staged = folder / f".{path.name}.{os.getpid()}"
        try:
            _link_or_copy(path, staged)
            staged.replace(folder / path.name)
        finally:
            staged.unlink(missing_ok=True)


def _link_or_copy(path: Path, target: Path) -> None:
    try:
        os.link(path, target)
    except OSError:
        shutil.copyfile(path, target)
