"""The cache of plans, addressed by a hash of everything that a plan is built from.

Each plan has a JSON note beside it, with its key and manifest entry. So every folder of plans is a cache: a stage's
folder in a bundle, and a folder that bundles share."""

import hashlib
import json
import os
import shutil
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from ...runtime.engines.tensorrt.plan_header import find_contradiction
from ...schemas.errors import CheckpointError
from ...schemas.json_text import load_json
from ...schemas.plan_entries import PlanEntry
from ...storage.file_hashes import sha256_of
from .worker_request import WorkerRequest

FORMAT = 1  # of the key; with another format no existing plan is found
KEY_DIGITS = 16  # digits of the key in file names
SUFFIX = ".plan"


def key_of(request: WorkerRequest, version: str, sources: Iterable[str], device: str | None) -> str:
    """SHA-256, in hexadecimal, of everything that decides the content of a plan.

    `sources` are the SHA-256s of the graph and its weights files, in order. Backend, `version`, targets or GPU
    (`device`), profiles and flags decide it too."""
    settings = asdict(request)
    for path in ("graph", "output", "timing_cache"):
        del settings[path]
    settings["weight_inputs"] = []  # a former field; plans that were built with it keep their keys
    content = {"format": FORMAT, "version": version, "sources": list(sources), "device": device, **settings}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def file_name(request: WorkerRequest, graph: str, precision: str, key: str) -> str:
    """File name of a plan: graph, precision, GPUs or backend, and the first digits of the key."""
    return "-".join((graph, precision, *(request.targets or (request.backend,)), key[:KEY_DIGITS])) + SUFFIX


def find(folder: Path, name: str, key: str) -> PlanEntry | str | None:
    """The entry of the plan called `name` in `folder`; None when there is none, a description of any damage."""
    path = folder / name
    try:
        content: dict[str, Any] = load_json(path.with_suffix(".json").read_text(encoding="utf-8"))
        plan = PlanEntry.model_validate(content["plan"])
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, ValidationError) as error:
        return f"{path.with_suffix('.json')}: {type(error).__name__}"
    if content.get("key") != key:
        return f"{path}: its note has another key than its file name"
    problem = find_contradiction(path, plan) or _changed_content(path, plan)
    return f"{path}: {problem}" if problem else plan


def _changed_content(path: Path, plan: PlanEntry) -> str | None:
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
    """Hard-link or copy a plan into `folder`, then its note: a plan without a note is ignored."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in (plan, plan.with_suffix(".json")):
        staged = folder / f".{path.name}.{os.getpid()}"
        try:
            try:
                os.link(path, staged)
            except OSError:
                shutil.copyfile(path, staged)
            staged.replace(folder / path.name)
        finally:
            staged.unlink(missing_ok=True)
