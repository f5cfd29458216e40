"""From a file to another file: checkpoints, model folders, ONNX bundles."""
