"""CPUs on which ONNX Runtime multiplies 8-bit integers inexactly."""

import platform

from ...schemas.manifest import Manifest
from ...schemas.quantization import Quantization
from .cpu_flags import cpu_flags

EXACT = frozenset({"avx512_vnni", "avx_vnni", "amx_int8"})  # flags of x86 CPUs that add the products in 32 bits


def int8_saturates() -> bool:
    """True if ONNX Runtime's products of unsigned and signed 8-bit integers saturate on this CPU.

    Its kernels for x86 CPUs without VNNI add two products in 16 bits, and large values overflow there. See "When and
    why do I need to try U8U8?" in ONNX Runtime's documentation. False where the CPU's features are unknown."""
    flags = cpu_flags() if platform.machine() in ("x86_64", "AMD64") else frozenset()
    return bool(flags) and not EXACT & flags


def int8_warning(manifest: Manifest, engine: str) -> str | None:
    """A warning for a bundle whose int8-dynamic stages lose precision on this CPU; None for any other."""
    stages = [stage for stage, entry in manifest.stages.items() if entry.quantization is Quantization.INT8_DYNAMIC]
    if not stages or not engine.startswith("onnxruntime") or not int8_saturates():
        return None
    return (
        f"this CPU has no VNNI, so ONNX Runtime's 8-bit products of {', '.join(stages)} saturate and images differ; "
        'export it again with `cascadekit export MODEL -o BUNDLE --quantize int8`, or set engine="openvino"'
    )
