"""Measures a GPU with stages of real size and random weights, phase by phase, and packs what a bare machine needs."""
