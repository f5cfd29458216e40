"""Runs the cascade: text, sampling, images, memory, batches, engines, the page. Nothing here imports torch."""
