"""Runs the cascade: engines, sampler, pipeline, parity. Imports neither torch, diffusers nor transformers."""
