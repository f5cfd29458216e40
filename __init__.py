"""cascadekit: convert, export, run and verify Stable Cascade.

Each public name is imported when it is first used, so `import cascadekit` is quick and works without onnx and torch.
The import also tells ONNX Runtime and huggingface_hub not to report usage; see `runtime.engines.telemetry`.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .runtime.engines.telemetry import switch_off_telemetry

if TYPE_CHECKING:
    from .converters.checkpoints.convert import convert as convert
    from .converters.checkpoints.inspect_checkpoint import inspect as inspect
    from .converters.export.export import export as export
    from .converters.export.export_options import ExportOptions as ExportOptions
    from .converters.export.validate import validate as validate
    from .converters.lora.bundle_cache import with_loras as with_loras
    from .converters.lora.convert_lora import convert_lora as convert_lora
    from .converters.lora.inspect_lora import inspect_lora as inspect_lora
    from .converters.lora.merge_bundle import apply_loras as apply_loras
    from .converters.lora.merge_bundle import undo_loras as undo_loras
    from .converters.lora.merge_checkpoint import merge_loras as merge_loras
    from .converters.tensorrt.builder import build as build
    from .converters.tensorrt.plans_to_build import BuildOptions as BuildOptions
    from .parity.checkpoints.compare_tensors import compare_checkpoints as compare_checkpoints
    from .parity.demo import make_demo as make_demo
    from .parity.results import Report as Report
    from .parity.verify import record_reference as record_reference
    from .parity.verify import verify as verify
    from .runtime.cascade import Cascade as Cascade
    from .runtime.images.png import to_images as to_images
    from .runtime.sampling.noise import PlacedSeed as PlacedSeed
    from .runtime.text.prompts import PromptEmbeds as PromptEmbeds
    from .schemas.settings import Settings as Settings

switch_off_telemetry()  # before the command line or a worker imports one of those libraries

_PUBLIC = {
    "BuildOptions": (".converters.tensorrt.plans_to_build", "BuildOptions"),
    "Cascade": (".runtime.cascade", "Cascade"),
    "ExportOptions": (".converters.export.export_options", "ExportOptions"),
    "PlacedSeed": (".runtime.sampling.noise", "PlacedSeed"),
    "PromptEmbeds": (".runtime.text.prompts", "PromptEmbeds"),
    "Report": (".parity.results", "Report"),
    "Settings": (".schemas.settings", "Settings"),
    "build": (".converters.tensorrt.builder", "build"),
    "compare_checkpoints": (".parity.checkpoints.compare_tensors", "compare_checkpoints"),
    "convert": (".converters.checkpoints.convert", "convert"),
    "export": (".converters.export.export", "export"),
    "validate": (".converters.export.validate", "validate"),
    "make_demo": (".parity.demo", "make_demo"),
    "to_images": (".runtime.images.png", "to_images"),
    "with_loras": (".converters.lora.bundle_cache", "with_loras"),
    "apply_loras": (".converters.lora.merge_bundle", "apply_loras"),
    "convert_lora": (".converters.lora.convert_lora", "convert_lora"),
    "inspect_lora": (".converters.lora.inspect_lora", "inspect_lora"),
    "merge_loras": (".converters.lora.merge_checkpoint", "merge_loras"),
    "undo_loras": (".converters.lora.merge_bundle", "undo_loras"),
    "inspect": (".converters.checkpoints.inspect_checkpoint", "inspect"),
    "record_reference": (".parity.verify", "record_reference"),
    "verify": (".parity.verify", "verify"),
}

__all__ = [
    "BuildOptions",
    "Cascade",
    "ExportOptions",
    "PlacedSeed",
    "PromptEmbeds",
    "Report",
    "Settings",
    "apply_loras",
    "build",
    "compare_checkpoints",
    "convert",
    "convert_lora",
    "export",
    "inspect",
    "inspect_lora",
    "make_demo",
    "merge_loras",
    "record_reference",
    "to_images",
    "undo_loras",
    "validate",
    "verify",
    "with_loras",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return import_module("importlib.metadata").version(__name__)
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, attribute = _PUBLIC[name]
    return getattr(import_module(module, __name__), attribute)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
