"""PyTorch as an engine: the networks, their weights from a bundle, and packages compiled ahead of time."""
