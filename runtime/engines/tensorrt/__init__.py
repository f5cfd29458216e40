"""Runs TensorRT and TensorRT-RTX plans."""
