"""Names of engines, as `--engine` takes them."""

ENGINES = (
    "onnxruntime",
    "onnxruntime-mapped",
    "onnxruntime-tensorrt",
    "openvino",
    "openvino-bf16",
    "tensorrt-rtx",
    "tensorrt",
)
