"""Finds licences and model cards beside the weights, and copies them into the output.

The licences of Stable Cascade and of most models derived from it must travel with the weights.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import count
from pathlib import Path

from ...schemas.errors import ConversionError
from ...schemas.folders import PLACES, TOKENIZER_FOLDERS
from ...schemas.messages import reason

MAX_BYTES = 1_000_000  # no licence or card is longer

# Files of these names lie beside a program. The licence of a program does not hold for weights in its folder.
PROGRAM_FILES = ("pyproject.toml", "setup.py", "package.json", "Cargo.toml", "CMakeLists.txt")

_TEXT = r"(\.(md|txt|rst|html|pdf))?"
_PROVENANCE = re.compile(
    rf"(licen[cs]e|copying|copyright|notice)([-_. ][\w .-]*?)?{_TEXT}"  # LICENSE, LICENSE-2.0, NOTICE.txt
    r"|[\w .-]*(licen[cs]e|use[-_ ]?policy|terms[-_ ]of[-_ ]use)[\w .-]*\.(md|txt|pdf)"
    r"|(readme|[\w .-]*model[-_ ]?card)(\.(md|txt|rst))?",
    re.IGNORECASE,
)
_OTHER_FORMAT = re.compile(
    r".*\.(py|pyc|json|ya?ml|bin|pt|pth|ckpt|pkl|safetensors|onnx|so|exe|sh|zip|gz|tar)", re.IGNORECASE
)

_LICENCE_FIELD = re.compile(
    r"(.*[._])?(licen[cs]e([._](name|link|url|id))?|copyright|authors?|attribution|merged_from)", re.IGNORECASE
)


def is_provenance_name(name: str) -> bool:
    """Return whether a file of this name (no folders) is a licence, a notice or a model card."""
    return bool(_PROVENANCE.fullmatch(name)) and not _OTHER_FORMAT.fullmatch(name)


def provenance_files(sources: Sequence[Path]) -> tuple[Path, ...]:
    """Return the licences, notices and model cards that belong to `sources`, each once.

    The folder of each source is searched, and for a component's folder such as prior/ the folder above. In the Hub's
    cache, every folder up to the repository's root is searched. Left out are files over MAX_BYTES, links that lead
    elsewhere, and the licence of a program."""
    folders = dict.fromkeys(folder for source in sources for folder in _folders_of(source))
    found = (path for folder in folders for path in _provenance_in(folder))
    return tuple({path.resolve(): path for path in found}.values())


def copy_provenance(files: Sequence[Path], target_folder: Path) -> tuple[Path, ...]:
    """Copy `files` into `target_folder`, which exists. Returns the path of each copy.

    No file is overwritten. A file of the same name and content counts as the copy. Beside any other file, the copy gets
    the name of its source too, as in README-stable-cascade.md. Raises ConversionError when a file cannot be
    copied."""
    return tuple(_copy(file, target_folder) for file in files)


def licence_fields(metadata: Mapping[str, str]) -> dict[str, str]:
    """Return the entries of a file's metadata that state its licence and authors, such as "modelspec.license".

    Empty entries are left out."""
    return {key: text for key, text in metadata.items() if text.strip() and _LICENCE_FIELD.fullmatch(key)}


def _folders_of(source: Path) -> Iterator[Path]:
    folder = (source if source.is_dir() else source.parent).absolute()
    yield folder
    if repository := _hub_repository(folder):  # then every folder up to the root of the snapshot belongs to the source
        snapshots = repository / "snapshots"
        yield from (parent for parent in folder.parents if snapshots in parent.parents)
        return
    for name in dict.fromkeys((*(place.folder for place in PLACES), "controlnet", *TOKENIZER_FOLDERS)):
        parts = tuple(name.split("/"))
        if folder.parts[-len(parts) :] == parts:
            yield folder.parents[len(parts) - 1]


def _provenance_in(folder: Path) -> list[Path]:
    try:
        entries = sorted(folder.iterdir())
    except OSError:
        return []  # reading the weights raises a better error
    if any(entry.name in PROGRAM_FILES for entry in entries):
        return []
    named = (entry for entry in entries if is_provenance_name(entry.name))
    return [entry for entry in named if lies_in(entry, folder) and entry.stat().st_size <= MAX_BYTES]


def lies_in(path: Path, folder: Path) -> bool:
    """Return whether `path` is a regular file in `folder`, or a link to one.

    A link out of the folder may lead to a private file, and anybody can put one into a folder of weights. Links of the
    Hub's cache into its own store are allowed."""
    try:
        target = path.resolve(strict=True)
        homes = [home.resolve() for home in (folder, *_hub_stores(folder.absolute()))]
        return target.is_file() and any(map(target.is_relative_to, homes))
    except (OSError, RuntimeError):  # RuntimeError: a link that leads to itself
        return False


def _hub_stores(folder: Path) -> tuple[Path, ...]:
    """Return the folders that the links of a snapshot lead to: the repository's blobs, and blobs that several share."""
    repository = _hub_repository(folder)
    return (repository / "blobs", repository.parent / "blobs") if repository else ()


def _hub_repository(folder: Path) -> Path | None:
    """Return CACHE/models--OWNER--NAME for a folder in CACHE/models--OWNER--NAME/snapshots; None for other folders."""
    parents = (parent.parent for parent in (folder, *folder.parents) if parent.name == "snapshots")
    return next((parent for parent in parents if parent.name.startswith("models--")), None)


def _copy(file: Path, folder: Path) -> Path:
    try:
        content = file.read_bytes()
        for name in _possible_names(file):
            target = folder / name
            try:
                with target.open("xb") as out:
                    out.write(content)
                return target
            except FileExistsError:
                if target.is_file() and target.read_bytes() == content:
                    return target
    except OSError as error:
        raise ConversionError(f"{file}: cannot be copied to {folder}: {reason(error)}") from error
    raise AssertionError("names never end")


def _possible_names(file: Path) -> Iterator[str]:
    """Yield the file's own name, then names with its source's name, then names with numbers too."""
    yield file.name
    folder = file.absolute().parent
    repository = _hub_repository(folder)
    label = repository.name.removeprefix("models--") if repository else folder.name or "source"
    stem, suffix = (file.stem, file.suffix) if file.suffix.lower() in (".md", ".txt", ".rst") else (file.name, "")
    yield f"{stem}-{label}{suffix}"
    yield from (f"{stem}-{label}-{number}{suffix}" for number in count(2))
