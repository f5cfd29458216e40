"""Folders of diffusers' modular pipelines: a model folder whose pipeline is Python code in it.

| file | contents |
|---|---|
| modular_model_index.json | for each component its library, its class and where it is loaded from |
| modular_config.json | the class of the pipeline's blocks, in `auto_map` |
| block.py | the blocks; ours is `data/modular/block.py.txt` |

diffusers runs block.py when a user loads the folder with `trust_remote_code=True`. Nothing here runs it.
"""

from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from ...schemas.errors import CheckpointError
from ...schemas.folders import MODULAR_FILES
from ...schemas.messages import listed
from ...schemas.stages import Stage
from .find_weights import read_json
from .model_folder import INDEX_ENTRIES, OPTIONAL, write_json

INDEX, CONFIG, BLOCK = MODULAR_FILES
OUR_BLOCK = Path(__file__).with_name("data") / "modular" / "block.py.txt"
BLOCKS_CLASS = "StableCascadeBlocks"  # in our block.py
LOADER = "ModularPipelineBlocks"  # the key of auto_map
MODULAR_VERSION = "0.42.1"  # of diffusers, in which our block.py was run

# diffusers finds the vqgan's library because block.py has imported it by that name.
ENTRIES: Mapping[str, tuple[str, str]] = {
    **INDEX_ENTRIES,
    "vqgan": ("diffusers.pipelines.deprecated.wuerstchen", "PaellaVQModel"),
    "tokenizer": ("transformers", "CLIPTokenizer"),
}
NEEDED = (Stage.PRIOR, Stage.DECODER, Stage.VQGAN, Stage.TEXT_ENCODER)


def write_modular_files(folder: Path, stages: Collection[Stage], variant: str) -> None:
    """Write the index, the config and block.py for a folder that holds `stages`.

    `variant` is the variant in the names of the weights files, "" for none."""
    absent = {str(stage) for stage in Stage if stage not in stages}
    if Stage.IMAGE_ENCODER not in stages:
        absent |= {*OPTIONAL}
    names = [name for name in ENTRIES if name not in absent]
    versions = {"_diffusers_version": MODULAR_VERSION}
    head = {"_blocks_class_name": BLOCKS_CLASS, "_class_name": "ModularPipeline", **versions}
    write_json(folder / INDEX, head | {name: _entry(name, variant) for name in names})
    auto_map = {LOADER: f"{Path(BLOCK).stem}.{BLOCKS_CLASS}"}
    write_json(folder / CONFIG, {"_class_name": BLOCKS_CLASS, **versions, "auto_map": auto_map})
    (folder / BLOCK).write_bytes(OUR_BLOCK.read_bytes())


def _entry(name: str, variant: str) -> list[Any]:
    library, class_name = ENTRIES[name]
    spec = {
        "pretrained_model_name_or_path": None,  # this folder
        "subfolder": name,
        "variant": variant or None if name in [*Stage] else None,
        "revision": None,
        "type_hint": [library, class_name],
    }
    return [library, class_name, spec]


def notes_on_missing(stages: Collection[Stage]) -> Iterator[str]:
    """Yield a note when stages that the blocks need are not among `stages`."""
    if missing := [str(stage) for stage in NEEDED if stage not in stages]:
        yield f"the pipeline also needs {listed(missing)}; load these with `pipe.update_components` (diffusers)"


def read_modular_folder(folder: Path, without: Collection[Stage] = ()) -> tuple[dict[Stage, Path], list[str]]:
    """Read the index and the config of a modular folder, except for stages `without`.

    Returns the folders of stages that have other names than usual, and notes. Raises CheckpointError for wrong JSON,
    and for a component of the cascade whose folder is missing."""
    path = folder / INDEX
    folders: dict[Stage, Path] = {}
    notes = []
    for name, entry in read_json(path).items():
        if name not in ENTRIES or name in without:
            continue
        subfolder, source = _place(path, name, entry)
        place = folder / subfolder
        if _is_folder_in(place, folder):
            if name in [*Stage] and subfolder != name:
                folders[Stage(name)] = place
        elif source is not None:
            notes.append(f"{path}: the {name} is loaded from {source}, which is not read here")
        else:
            raise CheckpointError(f"{path}: the {name} is to be in {place}, which is no folder; download it again")
    return folders, [*notes, *_notes_on_code(folder)]


def _is_folder_in(place: Path, folder: Path) -> bool:
    try:
        return place.is_dir() and place.resolve().is_relative_to(folder.resolve())
    except OSError:  # the name is too long
        return False


def _place(path: Path, name: str, entry: Any) -> tuple[str, str | None]:
    """Return the subfolder of an entry, and the repository or folder that it names; None for the folder itself."""
    spec = entry[2] if isinstance(entry, list) and len(entry) == 3 else None
    if isinstance(spec, dict):
        subfolder, source = spec.get("subfolder") or "", spec.get("pretrained_model_name_or_path")
        if isinstance(subfolder, str) and (source is None or isinstance(source, str)):
            return subfolder, source
    raise CheckpointError(
        f"{path}: damaged: {name}: expected [library, class, {{pretrained_model_name_or_path, subfolder, ...}}], "
        f"found {str(entry)[:80]}; download it again"
    )


def _notes_on_code(folder: Path) -> Iterator[str]:
    """Yield a note when the folder's code is missing or is not ours."""
    remedy = 'to="modular" writes it'
    if not (folder / CONFIG).is_file():
        yield f"{folder / CONFIG}: missing, diffusers cannot load the pipeline without it; {remedy}"
        return
    auto_map = read_json(folder / CONFIG).get("auto_map")
    target = auto_map.get(LOADER) if isinstance(auto_map, dict) else None
    if not isinstance(target, str) or "." not in target:
        form = f'an auto_map with "{LOADER}": "block.CLASS"'
        raise CheckpointError(f"{folder / CONFIG}: damaged: expected {form}; download it again")
    code = folder / f"{target.partition('.')[0]}.py"
    if not code.is_file():
        yield f"{code}: missing, diffusers cannot load the pipeline without it; {remedy}"
    elif code.stat().st_size != OUR_BLOCK.stat().st_size or code.read_bytes() != OUR_BLOCK.read_bytes():
        yield f"{code}: is not the code that cascadekit writes; it is not run here, but diffusers would run it"
