"""Writes model repositories for Triton Inference Server."""
