"""The options of ONNX Runtime's providers and sessions on a GPU, as tables.

The reasons are in docs/gpu.md. ONNX Runtime takes all values as text.
"""

from collections.abc import Mapping

from ...schemas.hoisted import STEP
from ...schemas.manifest import MAIN_GRAPH
from ...schemas.stages import Stage
from ...storage.user_cache import user_cache

CUDA_PROVIDER = "CUDAExecutionProvider"
TENSORRT_PROVIDER = "TensorrtExecutionProvider"

# cuDNN's heuristic names an algorithm for each convolution; the default builds plans until one works. Doubling arenas
# reserve up to twice what a stage needs.
CUDA: Mapping[str, str] = {"cudnn_conv_algo_search": "HEURISTIC", "arena_extend_strategy": "kSameAsRequested"}
TENSORRT: Mapping[str, str] = {"trt_engine_cache_enable": "1", "trt_timing_cache_enable": "1"}
TENSORRT_FOLDERS = ("trt_engine_cache_path", "trt_timing_cache_path")

RECORD_ASSIGNMENT = "session.record_ep_graph_assignment_info"
# Entries of a session's configuration. Weights get blocks of their own size, outside the arena.
GPU_SESSION: Mapping[str, str] = {RECORD_ASSIGNMENT: "1", "session.use_device_allocator_for_initializers": "1"}

# The graphs that run once for a step. The others run once for an image or a prompt, where capturing costs more than it
# saves. The text encoder also has a GatherND, which was reported to be unsafe in a CUDA graph.
CAPTURED = ((Stage.PRIOR, MAIN_GRAPH), (Stage.PRIOR, STEP), (Stage.DECODER, MAIN_GRAPH), (Stage.DECODER, STEP))


def provider_options(
    provider: str, *, tf32: bool = False, cuda_graph: bool = False, nhwc: bool = False
) -> dict[str, str]:
    """The options of one execution provider; the CPU has none. The three switches concern the CUDA provider.

    `nhwc` asks for convolutions on channels last, which the graphs have: the two transposes around each convolution go.
    There are kernels in fp32 and fp16. In fp32 the convolutions were slower where others measured them."""
    if provider == CUDA_PROVIDER:
        switched_on = [name for name, on in (("prefer_nhwc", nhwc), ("enable_cuda_graph", cuda_graph)) if on]
        return {**CUDA, "use_tf32": str(int(tf32)), **dict.fromkeys(switched_on, "1")}
    if provider == TENSORRT_PROVIDER:
        cache = str(user_cache("onnxruntime"))
        return {**TENSORRT, **dict.fromkeys(TENSORRT_FOLDERS, cache)}
    return {}
