"""Tries whether an execution provider of ONNX Runtime starts here. ONNX Runtime lists providers that cannot start."""

from ...schemas.errors import EngineError
from ...schemas.messages import one_line
from .installed_packages import provider_problem
from .onnxruntime import FATAL, PROVIDERS, import_onnxruntime, quiet_options

# An ONNX model in opset 20: y = Identity(x), float32 [1]. A session of it shows which providers can start.
PROBE = bytes.fromhex(
    "08093a370a100a017812017922084964656e746974791201675a0f0a0178120a0a08080112040a020801620f0a0179120a0a08080112"
    "040a02080142040a001014"
)


def why_not(device: str) -> str:
    """Why ONNX Runtime cannot use `device`, a key of PROVIDERS; empty if it can."""
    wanted = PROVIDERS[device][0]
    try:
        ort = import_onnxruntime(device)
    except EngineError as error:
        return str(error)
    options = quiet_options(ort)
    options.log_severity_level = FATAL
    try:
        session = ort.InferenceSession(PROBE, options, providers=[wanted], enable_fallback=0)
    except Exception as error:  # onnxruntime has an exception class for each status code
        return provider_problem(ort, wanted) or one_line(error)
    if wanted in session.get_providers():
        return ""
    return provider_problem(ort, wanted) or f"its {wanted} does not start; see nvidia-smi"
