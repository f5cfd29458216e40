"""Writes the graphs of a bundle as OpenVINO IR: an .xml and a .bin file for each, for programs with OpenVINO.

Weights are stored as the bundle stores them. cascadekit's own engine goes on reading the ONNX graphs: it takes as long
to load them.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..runtime.engines.openvino import import_openvino, require_no_bf16
from ..runtime.engines.protocol import REASON_LENGTH
from ..runtime.text.tokenizer_file import WHOLE_NAME, shipped
from ..schemas.callbacks import Say, ignored
from ..schemas.created_by import created_by
from ..schemas.errors import ConversionError, EngineError, UsageError
from ..schemas.hoisted import CONDITIONING, STEP
from ..schemas.json_text import dump_json
from ..schemas.manifest import Manifest
from ..schemas.messages import one_line
from ..schemas.stages import Stage
from ..storage.atomic_output import staged_output
from ..storage.bundle import Bundle, open_bundle
from ..storage.hub_cache_links import without_links
from .checkpoints.model_folder import TOKENIZER_FOLDER

REPEATED = (CONDITIONING, STEP)  # graphs whose weights are those of the main graph
METADATA = "cascadekit"  # the section of the .xml file's rt_info


def write_openvino_ir(
    bundle: str | Path, output: str | Path, *, force: bool = False, say: Say = ignored
) -> dict[str, int]:
    """Write the bundle at `bundle` as OpenVINO IR into the folder `output`: STAGE/GRAPH.xml, .bin, and the tokenizer.

    The graphs "conditioning" and "step" are left out. The rt_info of each .xml file says what it was made of. Returns
    the size of each file by its path.

    Raises UsageError and ConversionError as `staged_output` does, and CheckpointError when a file of the bundle is
    damaged. Raises EngineError when OpenVINO is not installed, cannot read a graph, or computes it wrongly."""
    opened, output = open_bundle(Path(bundle)), Path(output)
    openvino = import_openvino()
    graphs = dict(_graphs(opened))
    if not graphs:
        raise UsageError(f"{opened.root}: has no stages to write")
    for stage, entry in opened.manifest.stages.items():
        require_no_bf16(stage, entry.precision)
    tokenizer = f"{TOKENIZER_FOLDER}/{WHOLE_NAME}"
    names = [tokenizer, *(f"{place}{suffix}" for place in graphs for suffix in (".xml", ".bin"))]
    with staged_output(output, force=force, sources=[opened.root], files=names, say=say) as staged:
        for place, (stage, graph) in graphs.items():
            (staged / place).parent.mkdir(parents=True, exist_ok=True)
            _write(openvino, opened, stage, graph, staged / f"{place}.xml")
        (staged / tokenizer).parent.mkdir()
        text = shipped() if opened.tokenizer is None else opened.tokenizer.read_text(encoding="utf-8")
        (staged / tokenizer).write_text(text, encoding="utf-8")
        return {name: (staged / name).stat().st_size for name in names}


def _graphs(bundle: Bundle) -> Iterator[tuple[str, tuple[Stage, str]]]:
    """The place of each graph in the output, without a suffix, and its stage and name."""
    for stage, entry in bundle.manifest.stages.items():
        for graph in entry.graphs:
            if graph not in REPEATED:
                yield f"{stage}/{graph}", (stage, graph)


def _write(openvino: Any, bundle: Bundle, stage: Stage, graph: str, path: Path) -> None:
    source = bundle.graph(stage, graph)
    try:
        with without_links(source) as alone:
            model = openvino.Core().read_model(str(alone))
    except Exception as error:  # OpenVINO raises RuntimeError for everything
        raise EngineError(f"{source}: openvino cannot read the {stage}: {one_line(error, REASON_LENGTH)}") from error
    for name, value in _facts(bundle.manifest, stage).items():
        model.set_rt_info(value, [METADATA, name])
    try:
        openvino.save_model(model, str(path), compress_to_fp16=False)
    except Exception as error:
        raise ConversionError(f"{path}: openvino cannot write the {stage}: {one_line(error, REASON_LENGTH)}") from error


def _facts(manifest: Manifest, stage: Stage) -> dict[str, str]:
    """Return what the stage was made of. The metadata of the ONNX graph are kept by OpenVINO, in "framework"."""
    facts = {
        "default_size": manifest.default_size,
        "vqgan_scale": manifest.vqgan_scale,
        "sources": [source.model_dump(mode="json") for source in manifest.stages[stage].sources],
        "loras": [lora.model_dump(mode="json") for lora in manifest.lora.loras] if manifest.lora else [],
    }
    described = {name: dump_json(value) for name, value in facts.items()}
    return {"created_by": created_by(), **described}
