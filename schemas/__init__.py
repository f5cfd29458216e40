"""What things are: stages, configs, layouts, key maps, ports, manifests, errors. No I/O, no torch, no onnx."""
