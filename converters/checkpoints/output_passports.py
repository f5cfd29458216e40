"""Gives the files of a conversion their passports: weights in their metadata, a model folder in its index."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from ...schemas.created_by import created_by
from ...schemas.layouts import Layout
from ...schemas.passport import Passport, PassportSource, of_generations, passport_text, passport_values
from ...schemas.passport_keys import FOLDER_KEY, KEY
from ...schemas.paths import problem_of_path
from ...storage.content_digest import fill_in_digest
from ...storage.file_hashes import sha256_of
from ...storage.replaceable_folders import files_in
from ..passports import in_order, stamped
from .find_weights import read_json
from .model_folder import write_json
from .plan_output import FilePlan, OutputOptions, OutputPlan

WEIGHTS = (".safetensors", ".gguf")  # which have passports of their own


def with_passports(plan: OutputPlan, sources: Mapping[Path, PassportSource]) -> OutputPlan:
    """Return the plan with a passport in the metadata of every weights file. `sources` describes those of the plan."""
    return replace(plan, files=tuple(_with_passport(file, plan.options, sources) for file in plan.files))


def _with_passport(file: FilePlan, options: OutputOptions, sources: Mapping[Path, PassportSource]) -> FilePlan:
    passport = Passport(
        created_by=created_by(),
        layout=options.layout,
        values="copied" if file.is_copied else "calculated",
        dtypes=dict(Counter(plan.dtype for plan in file.tensors.values())),
        quantization=None if file.is_copied else options.quantize,
        sources=in_order(sources[path] for path in file.sources),
    )
    if file.path.suffix.lower() == WEIGHTS[1]:
        return replace(file, metadata={**file.metadata, KEY: passport_text(of_generations(passport))})
    metadata, restored = stamped(file.tensors, file.metadata, passport)
    return replace(file, metadata=metadata, restored=restored)


def write_folder_passport(index: Path, layout: Layout, sources: Mapping[Path, PassportSource]) -> None:
    """Add to the `index` of a finished model folder the passport of its JSON, text and code."""
    folder = index.parent
    names = [name for name in files_in(folder) if not name.endswith(WEIGHTS) and not problem_of_path(name)]
    passport = Passport(
        created_by=created_by(),
        layout=layout,
        sources=in_order(sources.values()),
        files={name: sha256_of(folder / name) for name in names if folder / name != index},
    )
    write_json(index, {**read_json(index), FOLDER_KEY: passport_values(of_generations(passport))})
    fill_in_digest(index)
