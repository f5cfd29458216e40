"""Exports a model as a bundle: for each stage an ONNX graph whose weights stay in safetensors files."""

import hashlib
import os
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path

import onnx

from ..schemas.bundle import GRAPH_NAME, MANIFEST_NAME, FileEntry, Manifest, PortEntry, SourceEntry, StageEntry
from ..schemas.config_json import to_json
from ..schemas.errors import ConversionError, ExportError, UsageError
from ..schemas.ports import ports_of
from ..schemas.stages import NetworkConfig, Stage, Variant, VQGANConfig
from .identify import Component
from .model import Model, open_model
from .onnx import GraphOptions, Weight, opset_of, write_graph
from .outputs import staged_output
from .plans import TensorPlan
from .quantize_export import Quantize, QuantizedStage, quantize_stage
from .safetensors_file import Progress, TensorRange, read_header
from .safetensors_writer import write_file

EXPORTED = (Stage.TEXT_ENCODER, Stage.PRIOR, Stage.DECODER, Stage.VQGAN)
WEIGHTS_NAME = "weights.safetensors"
FLOATS = ("F32", "BF16", "F16")

DEFAULT_SIDE = {Variant.TINY: 256}  # any other cascade was trained at 1024

StartFile = Callable[[str, int], Progress]


def export(
    model: Model | str | Path,
    output: str | Path,
    *,
    stages: Sequence[Stage] = (),
    weights: str = "copy",
    quantize: Quantize | None = None,
    vqgan_scale: float | None = None,
    force: bool = False,
    start_file: StartFile | None = None,
) -> Manifest:
    """Write the bundle of `model` (opened, or the path of one) at `output`: cascade.json, and a folder for each stage
    (all there are, or `stages`).

    `weights` is "copy" (the bundle has its own file) or "link" (hard links to the model's files, which must then
    never change). `quantize` says how Linears are quantised, where they bear it; that takes copied weights.
    `vqgan_scale` overrides the scale that the model's layout implies. Graphs compute in fp32; 16-bit weights stay
    16-bit on disk. Raises a CascadeError, and leaves nothing behind, when a stage is missing
    or damaged or the output unwritable."""
    output = Path(output)
    model = model if isinstance(model, Model) else open_model([model])
    chosen = list(stages) or [stage for stage in EXPORTED if stage in model.components]
    if not chosen:
        raise UsageError(f"nothing to export: the model has none of {', '.join(EXPORTED)}")
    unknown = [stage for stage in chosen if stage not in EXPORTED]
    if unknown:
        raise UsageError(f"{', '.join(unknown)}: not exported yet; there are {', '.join(EXPORTED)}")
    if quantize and weights == "link":
        raise UsageError("quantised weights are not those of the model's files: use --weights copy")
    components = {stage: _scaled(model.component(stage), vqgan_scale) for stage in chosen}
    with staged_output(output, force=force) as staged:
        staged.mkdir()
        entries = {}
        for stage, component in components.items():
            entries[stage] = _export_stage(component, staged / stage, weights, quantize, start_file)
        manifest = Manifest(
            created_by=f"cascadekit {version('cascadekit')}",
            default_size=_default_size(components),
            vqgan_scale=_vqgan_scale(components),
            tokenizer=_copy_tokenizer(model, staged),
            stages=entries,
        )
        (staged / MANIFEST_NAME).write_text(manifest.model_dump_json(indent=2) + "\n", encoding="utf-8")
    return manifest


def _export_stage(
    component: Component, folder: Path, mode: str, quantize: Quantize | None, start_file: StartFile | None
) -> StageEntry:
    _require_floats(component)
    folder.mkdir()
    linked = _source_files(component) if mode == "link" else []
    tensors = component.tensors if linked else _copy_weights(component, folder, start_file)
    stage = QuantizedStage(tensors, GraphOptions())
    if quantize:
        stage = quantize_stage(component.config, tensors, quantize, start_file)
    onnx.save_model(write_graph(component.config, _weights(stage.tensors), stage.options), folder / GRAPH_NAME)
    _check_graph(folder, linked)
    for source in linked:
        _link(source, folder)
    return _entry(component, folder, mode, stage.options)


def _copy_weights(component: Component, folder: Path, start_file: StartFile | None) -> dict[str, TensorRange]:
    path = folder / WEIGHTS_NAME
    plans = {name: TensorPlan(t.dtype, t.shape, (t,)) for name, t in component.tensors.items()}
    total = sum(plan.nbytes for plan in plans.values())
    progress = start_file(f"{component.stage}/{WEIGHTS_NAME}", total) if start_file else None
    write_file(path, plans, {"format": "pt", **component.metadata}, progress)
    return read_header(path).tensors


def _check_graph(folder: Path, linked: Iterable[Path]) -> None:
    """Have onnx check the graph by path, so that it follows the weights too. It refuses files with several hard
    links, so a hole of the same size stands in for each file that is to be linked."""
    holes = {folder / source.name: source.stat().st_size for source in linked}
    for hole, size in holes.items():
        hole.touch()
        os.truncate(hole, size)
    onnx.checker.check_model(folder / GRAPH_NAME, full_check=True)
    for hole in holes:
        hole.unlink()


def _link(source: Path, folder: Path) -> None:
    """A hard link: ONNX wants its data inside the model's folder and refuses symbolic links."""
    try:
        os.link(source.resolve(), folder / source.name)
    except OSError as error:
        raise ExportError(
            f"{source}: cannot be hard-linked into {folder.parent}: {error.strerror}; use --weights copy"
        ) from error


def _weights(tensors: Mapping[str, TensorRange]) -> dict[str, Weight]:
    """Where each tensor lies, seen from the folder its file is in. Raises ExportError for one that lies transposed."""
    turned = [name for name, tensor in tensors.items() if tensor.transposed]
    if turned:
        raise ExportError(f"{tensors[turned[0]].path}: {turned[0]} lies transposed; use --weights copy")
    return {name: Weight(t.dtype, t.shape, t.path.name, t.offset, t.nbytes) for name, t in tensors.items()}


def _entry(component: Component, folder: Path, mode: str, options: GraphOptions) -> StageEntry:
    ports = ports_of(component.config)
    sources = tuple(_source(path, component) for path in _source_files(component))
    linked = {source.name: source.sha256 for source in sources} if mode == "link" else {}  # hashed already
    graph, *rest = sorted(folder.iterdir(), key=lambda path: path.name != GRAPH_NAME)
    return StageEntry(
        variant=component.variant,
        config=to_json(component.config),
        precision="fp32",
        quantization=str(options.quantization),
        opset=opset_of(options),
        weights="link" if mode == "link" else "copy",
        sources=sources,
        inputs=tuple(PortEntry(**asdict(port)) for port in ports.inputs),
        outputs=tuple(PortEntry(**asdict(port)) for port in ports.outputs),
        files=tuple(
            FileEntry(
                path=f"{folder.name}/{path.name}",
                bytes=path.stat().st_size,
                sha256=linked.get(path.name) or _sha256(path),
            )
            for path in (graph, *rest)
        ),
    )


def _source_files(component: Component) -> list[Path]:
    return sorted({tensor.path for tensor in component.tensors.values()})


def _source(path: Path, component: Component) -> SourceEntry:
    return SourceEntry(name=path.name, bytes=path.stat().st_size, sha256=_sha256(path), layout=component.layout)


def _sha256(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise ConversionError(f"{path}: cannot be read: {error.strerror}") from error


def _require_floats(component: Component) -> None:
    odd = [dtype for dtype in component.dtypes if dtype not in FLOATS]
    if odd:
        raise ExportError(
            f"{component.path}: the {component.stage} has weights of dtype {', '.join(odd)}; "
            f"graphs take {', '.join(FLOATS)}"
        )


def _scaled(component: Component, scale: float | None) -> Component:
    if scale is None or not isinstance(component.config, VQGANConfig):
        return component
    return replace(component, config=replace(component.config, scale_factor=scale))


def _vqgan_scale(components: dict[Stage, Component]) -> float | None:
    config: NetworkConfig | None = components[Stage.VQGAN].config if Stage.VQGAN in components else None
    return config.scale_factor if isinstance(config, VQGANConfig) else None


def _default_size(components: dict[Stage, Component]) -> tuple[int, int]:
    sides = [DEFAULT_SIDE.get(component.variant, 1024) for component in components.values()]
    return min(sides), min(sides)


def _copy_tokenizer(model: Model, folder: Path) -> str | None:
    """The model's own tokenizer goes along, as it may know more words; otherwise the package's is used."""
    source = model.tokenizer / "tokenizer.json" if model.tokenizer else None
    if source is None or not source.is_file():
        return None
    (folder / "tokenizer").mkdir()
    shutil.copyfile(source, folder / "tokenizer" / "tokenizer.json")
    return "tokenizer/tokenizer.json"
