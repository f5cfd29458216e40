"""cascadekit: convert, export, run and verify Stable Cascade.

Each public name is imported when it is first used, so `import cascadekit` is quick and works without onnx and torch.
The import also tells ONNX Runtime and huggingface_hub not to report usage; see `runtime.engines.telemetry`.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .runtime.engines.telemetry import switch_off_telemetry

if TYPE_CHECKING:  # for type checkers and editors; `_PUBLIC` says the same at run time
    from .converters.checkpoints.convert import convert as convert
    from .converters.checkpoints.inspect_checkpoint import inspect as inspect
    from .converters.contents import contents_of as contents_of
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
    from .runtime.sampling.controlnets import ControlPicture as ControlPicture
    from .runtime.sampling.noise import PlacedSeed as PlacedSeed
    from .runtime.text.prompts import PromptEmbeds as PromptEmbeds
    from .schemas.errors import CascadeError as CascadeError
    from .schemas.errors import CheckpointError as CheckpointError
    from .schemas.errors import ConversionError as ConversionError
    from .schemas.errors import EngineError as EngineError
    from .schemas.errors import ExportError as ExportError
    from .schemas.errors import ForeignError as ForeignError
    from .schemas.errors import LayoutError as LayoutError
    from .schemas.errors import MissingPackageError as MissingPackageError
    from .schemas.errors import OutsideProfileError as OutsideProfileError
    from .schemas.errors import ParityError as ParityError
    from .schemas.errors import UnsoundError as UnsoundError
    from .schemas.errors import UsageError as UsageError
    from .schemas.forecast import Forecast as Forecast
    from .schemas.settings import Settings as Settings
    from .schemas.stages import Stage as Stage

switch_off_telemetry()  # before the command line or a worker imports one of those libraries

# The public names, and the module of each.
_PUBLIC = {
    "BuildOptions": ".converters.tensorrt.plans_to_build",
    "Cascade": ".runtime.cascade",
    "CascadeError": ".schemas.errors",
    "CheckpointError": ".schemas.errors",
    "ControlPicture": ".runtime.sampling.controlnets",
    "ConversionError": ".schemas.errors",
    "EngineError": ".schemas.errors",
    "ExportError": ".schemas.errors",
    "ExportOptions": ".converters.export.export_options",
    "Forecast": ".schemas.forecast",
    "ForeignError": ".schemas.errors",
    "LayoutError": ".schemas.errors",
    "MissingPackageError": ".schemas.errors",
    "OutsideProfileError": ".schemas.errors",
    "ParityError": ".schemas.errors",
    "PlacedSeed": ".runtime.sampling.noise",
    "PromptEmbeds": ".runtime.text.prompts",
    "Report": ".parity.results",
    "Settings": ".schemas.settings",
    "Stage": ".schemas.stages",
    "UnsoundError": ".schemas.errors",
    "UsageError": ".schemas.errors",
    "apply_loras": ".converters.lora.merge_bundle",
    "build": ".converters.tensorrt.builder",
    "compare_checkpoints": ".parity.checkpoints.compare_tensors",
    "contents_of": ".converters.contents",
    "convert": ".converters.checkpoints.convert",
    "convert_lora": ".converters.lora.convert_lora",
    "export": ".converters.export.export",
    "inspect": ".converters.checkpoints.inspect_checkpoint",
    "inspect_lora": ".converters.lora.inspect_lora",
    "make_demo": ".parity.demo",
    "merge_loras": ".converters.lora.merge_checkpoint",
    "record_reference": ".parity.verify",
    "to_images": ".runtime.images.png",
    "undo_loras": ".converters.lora.merge_bundle",
    "validate": ".converters.export.validate",
    "verify": ".parity.verify",
    "with_loras": ".converters.lora.bundle_cache",
}

__all__ = [*_PUBLIC]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return import_module("importlib.metadata").version(__name__)
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_PUBLIC[name], __name__), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
