"""Licences and model cards found beside the weights, carried into what is made of them.

Stable Cascade and most of its offspring come under licences that must travel with the weights.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from ...schemas.errors import ConversionError
from ...schemas.folders import PLACES, TOKENIZER_FOLDERS

MAX_BYTES = 1_000_000  # no licence or card is longer; what is, is something else

# Files of these names lie beside a program, whose licence says nothing about weights lying there too.
PROGRAM_FILES = ("pyproject.toml", "setup.py", "package.json", "Cargo.toml", "CMakeLists.txt")

_TEXT = r"(\.(md|txt|rst|html|pdf))?"
_PAPER = re.compile(
    rf"(licen[cs]e|copying|copyright|notice)([-_. ][\w .-]*?)?{_TEXT}"  # LICENSE, LICENSE-2.0, NOTICE.txt
    r"|[\w .-]*(licen[cs]e|use[-_ ]?policy|terms[-_ ]of[-_ ]use)[\w .-]*\.(md|txt|pdf)"
    r"|(readme|[\w .-]*model[-_ ]?card)(\.(md|txt|rst))?",
    re.IGNORECASE,
)
_NO_TEXT = re.compile(
    r".*\.(py|pyc|json|ya?ml|bin|pt|pth|ckpt|pkl|safetensors|onnx|so|exe|sh|zip|gz|tar)", re.IGNORECASE
)

_LICENCE_FIELD = re.compile(
    r"(.*[._])?(licen[cs]e([._](name|link|url|id))?|copyright|authors?|attribution|merged_from)", re.IGNORECASE
)


def is_provenance_name(name: str) -> bool:
    """Whether a file of this name (no folders) is a licence, a notice or a model card."""
    return bool(_PAPER.fullmatch(name)) and not _NO_TEXT.fullmatch(name)


def provenance_files(sources: Sequence[Path]) -> tuple[Path, ...]:
    """The licences, notices and model cards that belong to `sources`, each once.

    They are looked for in a source's own folder and, when that is a component's folder such as prior/, in the
    one above; in the Hub's cache in all above, up to the repository's root. Left out are files over MAX_BYTES,
    links that lead elsewhere, and a program's licence."""
    folders = dict.fromkeys(folder for source in sources for folder in _folders_of(source))
    found = (path for folder in folders for path in _papers_in(folder))
    return tuple({path.resolve(): path for path in found}.values())


def copy_provenance(files: Sequence[Path], target_folder: Path) -> tuple[Path, ...]:
    """Copy `files` into `target_folder`, which exists; returns where each is now.

    What is there stays: a file of the same content counts as the copy, and beside another one the copy takes its
    source's name along, as in README-stable-cascade.md. Raises ConversionError when a file cannot be copied."""
    return tuple(_copy(file, target_folder) for file in files)


def licence_fields(metadata: Mapping[str, str]) -> dict[str, str]:
    """The entries of a safetensors file's metadata that say under which licence and by whom it is, such as
    "modelspec.license" and "modelspec.author"; empty ones are left out."""
    return {key: text for key, text in metadata.items() if text.strip() and _LICENCE_FIELD.fullmatch(key)}


def _folders_of(source: Path) -> Iterator[Path]:
    folder = (source if source.is_dir() else source.parent).absolute()
    yield folder
    if _hub_repository(folder):  # then everything up to the repository's root belongs
        commit = next(parent for parent in (folder, *folder.parents) if parent.parent.name == "snapshots")
        yield from (parent for parent in folder.parents if parent.is_relative_to(commit))
        return
    for name in dict.fromkeys((*(place.folder for place in PLACES), "controlnet", *TOKENIZER_FOLDERS)):
        parts = tuple(name.split("/"))
        if folder.parts[-len(parts) :] == parts:
            yield folder.parents[len(parts) - 1]


def _papers_in(folder: Path) -> list[Path]:
    try:
        entries = sorted(folder.iterdir())
    except OSError:
        return []  # whoever reads the weights says so better
    if any(entry.name in PROGRAM_FILES for entry in entries):
        return []
    return [entry for entry in entries if is_provenance_name(entry.name) and _is_paper(entry, folder)]


def _is_paper(path: Path, folder: Path) -> bool:
    """A short file that lies in `folder`."""
    return lies_in(path, folder) and path.stat().st_size <= MAX_BYTES


def lies_in(path: Path, folder: Path) -> bool:
    """Whether a regular file lies at `path` and in `folder`. A link out of it might show the world what is only the
    user's, and anybody can put one into a folder of weights; those of the Hub's cache into its own store are in
    order."""
    try:
        target = path.resolve(strict=True)
        homes = [home.resolve() for home in (folder, *_hub_stores(folder.absolute()))]
        return target.is_file() and any(map(target.is_relative_to, homes))
    except (OSError, RuntimeError):  # RuntimeError: a link that leads to itself
        return False


def _hub_stores(folder: Path) -> tuple[Path, ...]:
    """Where the links of a snapshot in the Hub's cache lead: the repository's blobs, and those several share."""
    repository = _hub_repository(folder)
    return (repository / "blobs", repository.parent / "blobs") if repository else ()


def _hub_repository(folder: Path) -> Path | None:
    """CACHE/models--OWNER--NAME for CACHE/models--OWNER--NAME/snapshots/COMMIT and what is below."""
    parents = (parent.parent for parent in (folder, *folder.parents) if parent.name == "snapshots")
    return next((parent for parent in parents if parent.name.startswith("models--")), None)


def _copy(file: Path, folder: Path) -> Path:
    try:
        content = file.read_bytes()
        for name in _names(file):
            target = folder / name
            try:
                with target.open("xb") as out:
                    out.write(content)
                return target
            except FileExistsError:
                if target.is_file() and target.read_bytes() == content:
                    return target
    except OSError as error:
        raise ConversionError(f"{file}: cannot be copied to {folder}: {error.strerror or error}") from error
    raise AssertionError("names never end")


def _names(file: Path) -> Iterator[str]:
    """The file's own name, then with its source's name, then with numbers too."""
    yield file.name
    folder = file.absolute().parent
    repository = _hub_repository(folder)
    label = repository.name.removeprefix("models--") if repository else folder.name or "source"
    stem, suffix = (file.stem, file.suffix) if file.suffix.lower() in (".md", ".txt", ".rst") else (file.name, "")
    yield f"{stem}-{label}{suffix}"
    number = 2
    while True:
        yield f"{stem}-{label}-{number}{suffix}"
        number += 1
