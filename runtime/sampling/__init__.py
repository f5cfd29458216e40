"""Noise, samplers and the loop that denoises latents."""
