"""Packages of the networks in PyTorch, compiled ahead of time by AOTInductor for the CPU or the GPU of this machine."""
