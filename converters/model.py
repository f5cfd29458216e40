"""Opens what a user may call a model: files, a folder of original files, a model folder, one component's folder."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..schemas.config_json import from_json
from ..schemas.errors import CascadeError, CheckpointError, UsageError
from ..schemas.stages import NetworkConfig, Stage
from .identify import Component, identify
from .safetensors_file import read_header

# Names a component's weights go by in its folder, the plain one first.
WEIGHT_FILES = tuple(
    f"{stem}{variant}.safetensors"
    for variant in ("", ".fp32", ".bf16", ".fp16")
    for stem in ("diffusion_pytorch_model", "model")
)


@dataclass(frozen=True)
class Model:
    """The stages found, and the tokenizer folder if one lies beside them."""

    components: dict[Stage, Component]
    tokenizer: Path | None = None
    notes: tuple[str, ...] = ()

    def component(self, stage: Stage) -> Component:
        """The component of `stage`, sound. Raises UsageError when the model has none."""
        if stage not in self.components:
            have = ", ".join(self.components) or "nothing"
            raise UsageError(f"the model has no {stage}; it has {have}")
        return self.components[stage].require_sound()


def open_model(
    sources: Sequence[str | Path], *, text_encoder: str | Path | None = None, image_encoder: str | Path | None = None
) -> Model:
    """Read the headers of every stage in `sources`; the two encoders may be given apart.

    Raises UsageError when a path does not exist, holds no stage, or two files hold the same one."""
    paths = [Path(source) for source in sources]
    found = [component for path in paths for component in _components_at(path)]
    for stage, path in ((Stage.TEXT_ENCODER, text_encoder), (Stage.IMAGE_ENCODER, image_encoder)):
        if path is not None:
            found = [c for c in found if c.stage is not stage] + [open_component(Path(path), stage)]
    components: dict[Stage, Component] = {}
    for component in found:
        other = components.setdefault(component.stage, component)
        if other is not component:
            raise UsageError(f"{other.path} and {component.path} both hold the {component.stage}; name one of them")
    tokenizer = next((path / "tokenizer" for path in paths if (path / "tokenizer").is_dir()), None)
    return Model(components, tokenizer, tuple(_misnamed(components.values())))


def inspect(path: str | Path) -> Model:
    """What the file or folder at `path` holds, from its headers alone; problems are listed per component."""
    return open_model([Path(path)])


def open_component(path: Path, expected: Stage | None = None) -> Component:
    """The component in a safetensors file, or in a folder that holds its weights and perhaps a config.json."""
    if path.is_dir():
        weights = _weights_in(path)
        header = read_header(weights)
        return identify(header, _config_in(path, expected), expected)
    _require_exists(path)
    return identify(read_header(path), None, expected)


def _components_at(source: Path) -> list[Component]:
    _require_exists(source)
    if source.is_file() or (source / "config.json").is_file():
        return [open_component(source)]
    folders = [(stage, source / stage) for stage in Stage if (source / stage).is_dir()]
    files = sorted(source.glob("*.safetensors"))
    if not folders and not files:
        raise UsageError(
            f"{source}: no model here; expected folders such as prior/ and decoder/, "
            "or stage_a, stage_b and stage_c .safetensors files"
        )
    return [open_component(path) for path in files] + [open_component(path, stage) for stage, path in folders]


def _weights_in(folder: Path) -> Path:
    for name in WEIGHT_FILES:
        if (folder / name).is_file():
            return folder / name
    if any(folder.glob("*.index*.json")):
        raise CheckpointError(
            f"{folder}: its weights are in several shards, which cannot be read yet; save them as one"
        )
    if any(folder.glob("*.bin")):
        raise CheckpointError(f"{folder}: holds only pickled weights (.bin); get the .safetensors file instead")
    raise CheckpointError(f"{folder}: no weights; expected {WEIGHT_FILES[0]} or {WEIGHT_FILES[1]}")


def _config_in(folder: Path, expected: Stage | None) -> NetworkConfig | None:
    path = folder / "config.json"
    if not path.is_file():
        return None
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(values, dict):
            raise ValueError("it is not an object")
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: not a readable config: {error}") from error
    try:
        return from_json(expected or _stage_of_config(values), values)
    except CascadeError as error:
        raise type(error)(f"{path}: {error}") from error


def _stage_of_config(values: dict[str, object]) -> Stage:
    name = values.get("_class_name", values.get("model_type"))
    match name:
        case "StableCascadeUNet":
            return Stage.PRIOR if values.get("effnet_in_channels") is None else Stage.DECODER
        case "PaellaVQModel":
            return Stage.VQGAN
        case "clip_text_model":
            return Stage.TEXT_ENCODER
        case "clip_vision_model":
            return Stage.IMAGE_ENCODER
    raise UsageError(f"a config of class {name}, which is no part of Stable Cascade")


def _require_exists(path: Path) -> None:
    if not path.exists():
        raise UsageError(f"{path}: no such file or folder")


def _misnamed(components: Iterable[Component]) -> list[str]:
    """Notes on files whose name says another stage than their content."""
    names = {Stage.PRIOR: "stage_c", Stage.DECODER: "stage_b", Stage.VQGAN: "stage_a"}
    return [
        f"{component.path} is named like {name} but holds the {component.stage}; going by its content"
        for component in components
        for stage, name in names.items()
        if component.path.name.startswith(name) and component.stage is not stage
    ]
