"""The reference: the networks in PyTorch, loaded from any model, in any precision. Importing it imports torch."""

from ...runtime.engines.pytorch.networks import build_reference, load_reference, load_vqgan_encoder

__all__ = ["build_reference", "load_reference", "load_vqgan_encoder"]
